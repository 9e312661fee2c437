"""Images: which files a path names, and every kind of them as plain RGB or grey."""

import os
from pathlib import Path

import numpy as np
import pytest
from image_files import png_of_claimed_size
from PIL import Image
from skimage import data

from convmlp.common.errors import RunError
from convmlp.common.images import UnreadableImage, find_images, read_image


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(data.chelsea()).resize((60, 40))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_folder_gives_its_images_and_those_below(tmp_path, photo):
    for name in ("b.png", "a.JPG", "below/c.webp", ".hidden/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photo.save(tmp_path / name, format="PNG")
    assert [str(p.relative_to(tmp_path)) for p in find_images(tmp_path)] == ["a.JPG", "b.png", "below/c.webp"]


def test_a_pattern_gives_what_it_matches_and_a_file_itself(tmp_path, photo):
    for name in ("a1.png", "a2.png", "b.png"):
        photo.save(tmp_path / name)
    assert [p.name for p in find_images(f"{tmp_path}/a*.png")] == ["a1.png", "a2.png"]
    assert find_images(tmp_path / "b.png") == [tmp_path / "b.png"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path, photo):
    photo.save(tmp_path / "photo[1].png")
    assert find_images(tmp_path / "photo[1].png") == [tmp_path / "photo[1].png"]


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match="folder or pattern: nowhere"):
        find_images("nowhere")
    with pytest.raises(RunError, match=f"in the folder {tmp_path}"):
        find_images(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".ppm", ".webp", ".gif", ".jpg", ".jp2"])
def test_formats_are_read_by_content(tmp_path, photo, suffix):
    lossless = {"lossless": True} if suffix == ".webp" else {}
    photo.save(tmp_path / f"photo{suffix}", **lossless)
    (tmp_path / f"photo{suffix}").rename(tmp_path / "photo.dat")
    image = read_image(tmp_path / "photo.dat")
    assert image.mode == "RGB" and image.size == (60, 40)
    assert np.abs(pixels(image) - pixels(photo)).mean() < (0.01 if suffix in (".png", ".bmp", ".ppm", ".webp") else 12)


def test_exif_says_which_way_is_up(tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    photo.save(tmp_path / "turned.png", exif=exif)
    assert pixels(read_image(tmp_path / "turned.png")).tolist() == pixels(photo.rotate(-90, expand=True)).tolist()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, photo, mode):
    if mode == "P":
        image = photo.quantize(16)
        index = image.getpixel((0, 0))
        image.save(tmp_path / "x.png", transparency=index)
        hidden = np.asarray(image) == index
    else:
        image = photo.convert(mode)
        hidden = np.zeros((40, 60), bool)
        hidden[:20] = True
        image.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype("uint8")))
        image.save(tmp_path / "x.png")
    result = np.asarray(read_image(tmp_path / "x.png"))
    assert (result[hidden] == 255).all()
    assert (result[~hidden] == np.asarray(image.convert("RGB"))[~hidden]).all()


def test_cmyk_grey_and_bilevel_become_rgb(tmp_path, photo):
    photo.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    assert np.abs(pixels(read_image(tmp_path / "cmyk.jpg")) - pixels(photo)).mean() < 6
    for mode in ("L", "1"):
        photo.convert(mode).save(tmp_path / "grey.png")
        expected = pixels(photo.convert(mode).convert("RGB"))
        assert pixels(read_image(tmp_path / "grey.png")).tolist() == expected.tolist()


def test_16_bits_are_scaled_to_8(tmp_path):
    values = np.linspace(0, 65535, 60 * 40).astype(np.uint16).reshape(40, 60)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert pixels(read_image(tmp_path / "deep.png", "L")).tolist() == (values // 256).tolist()


@pytest.mark.parametrize(("dtype", "top"), [("float32", 1.0), ("float32", 255), ("float32", 65535), ("int32", 255)])
def test_numbers_of_other_types_are_scaled_by_what_they_reach(tmp_path, dtype, top):
    values = np.linspace(0, 1, 60 * 40).reshape(40, 60)
    Image.fromarray((values * top).astype(dtype)).save(tmp_path / "x.tiff")
    assert np.abs(pixels(read_image(tmp_path / "x.tiff", "L")) - values * 255).max() <= 1.5


def test_an_empty_text_is_not_a_folder():
    with pytest.raises(RunError, match="empty"):
        find_images("")


def test_an_animation_gives_its_first_frame(tmp_path, photo):
    photo.save(tmp_path / "x.gif", save_all=True, append_images=[photo.transpose(Image.Transpose.ROTATE_180)] * 2)
    assert np.abs(pixels(read_image(tmp_path / "x.gif")) - pixels(photo)).mean() < 8


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.png", b"", "an empty file"),
        ("text.png", b"no image at all", "not an? "),
        ("bomb.png", png_of_claimed_size(30000, 30000), "decompression bomb"),
    ],
)
def test_what_is_not_an_image_is_named_with_the_reason(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableImage, match=f"{name}: .*{reason}"):
        read_image(tmp_path / name)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".tiff", ".webp"])
def test_a_truncated_image_is_refused(tmp_path, photo, suffix):
    path = tmp_path / f"cut{suffix}"
    photo.save(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UnreadableImage, match=f"cut{suffix}"):
        read_image(path)


def test_a_missing_image_and_a_folder_are_named(tmp_path):
    with pytest.raises(UnreadableImage, match="gone.png: No such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(UnreadableImage, match="Is a directory"):
        read_image(Path(tmp_path))
