"""A look at the images: which copies are found, which are not, and what is counted."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits, load_sample_images

from convmlp.classification.check import Duplicate, Findings, look, write_duplicates
from convmlp.classification.folders import Item
from convmlp.classification.sources import FileSource, MultiLabelSource
from convmlp.common.errors import RunError

SIDE = 100  # px


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """48 parts of two photographs; four of them are so smooth that a near copy of them cannot be told."""
    folder = tmp_path_factory.mktemp("photos")
    for number, photo in enumerate(load_sample_images().images):
        for y in range(0, photo.shape[0] - SIDE + 1, SIDE):
            for x in range(0, photo.shape[1] - SIDE + 1, SIDE):
                Image.fromarray(photo[y : y + SIDE, x : x + SIDE]).save(folder / f"{number}_{y}_{x}.png")
    return folder


def files(folder, label="a"):
    return FileSource([Item(str(path), label) for path in sorted(folder.iterdir())], [label])


def write(folder, images):
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number:04}.png")
    return files(folder)


COPIES = {
    "quality": lambda image, path: image.save(path.with_suffix(".jpg"), quality=70),
    "size": lambda image, path: image.resize((70, 70)).save(path),
    "brightness": lambda image, path: ImageEnhance.Brightness(image).enhance(1.05).save(path),
    "crop": lambda image, path: image.crop((1, 1, SIDE - 1, SIDE - 1)).save(path),
    "kind of file": lambda image, path: image.save(path.with_suffix(".webp"), lossless=True),
}


@pytest.mark.parametrize("way", COPIES)
def test_near_copies_are_found(photos, tmp_path, way):
    for path in photos.iterdir():
        COPIES[way](Image.open(path), tmp_path / path.name)
    found = look(files(tmp_path), files(photos)).duplicates
    assert len(found) >= 43 and all(each.kind == "near" and each.leaks for each in found)
    assert all(Path(each.path).stem == Path(each.duplicate_of).stem for each in found)


def test_mirrored_and_turned_images_are_not_copies(photos, tmp_path):
    ways = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_90)
    others = write(tmp_path / "others", [Image.open(p).transpose(way) for p in photos.iterdir() for way in ways])
    assert look(others, files(photos)).duplicates == []


def test_an_image_and_another_colour_of_it_are_not_copies(photos, tmp_path):
    others = write(tmp_path / "others", [Image.merge("RGB", Image.open(p).split()[::-1]) for p in photos.iterdir()])
    coloured = sum(np.ptp(np.asarray(Image.open(p)).mean((0, 1))[[0, 2]]) > 12 for p in photos.iterdir())
    assert len(look(others, files(photos)).duplicates) <= 48 - coloured < 48


def test_small_images_that_look_alike_are_not_copies(tmp_path):
    images = [Image.fromarray((digit * 15).astype("uint8")) for digit in load_digits().images[:200]]
    assert look(write(tmp_path / "a", images[:100]), write(tmp_path / "b", images[100:])).duplicates == []


def test_images_with_hardly_any_detail_are_copies_only_if_they_are_the_same(tmp_path):
    pages = [Image.new("L", (64, 64), level) for level in (240, 244)]
    for page in pages:
        page.paste(page.getpixel((0, 0)) - 2, (20, 20, 28, 28))
    (duplicate,) = look(write(tmp_path / "a", pages), write(tmp_path / "b", pages[:1])).duplicates
    assert (duplicate.kind, Path(duplicate.path).name) == ("exact", "0000.png")


@pytest.mark.parametrize(
    ("train", "val", "expected"),
    [
        ("image", "image", [("0000", "0000", "exact")]),
        ("image", "small other image", [("0000", "0002", "exact")]),
        ("small", "image", [("0000", "0000", "near")]),
        ("image image", "small", [("0000", "0000", "near"), ("0001", "0000", "near")]),
    ],
)
def test_a_copy_is_of_a_validation_image_and_exact_where_there_is_one(photos, tmp_path, train, val, expected):
    image, other = (Image.open(path) for path in sorted(photos.iterdir())[5:7])
    known = {"image": image, "other": other, "small": image.resize((80, 80))}
    sides = [
        write(tmp_path / side, [known[word] for word in words.split()])
        for side, words in zip("tv", (train, val), strict=True)
    ]
    leaks = [each for each in look(*sides).duplicates if each.split == "train"]
    assert all(each.leaks for each in leaks)
    assert [(Path(each.path).stem, Path(each.duplicate_of).stem, each.kind) for each in leaks] == expected


def test_copies_within_a_side_do_not_leak(photos, tmp_path):
    first, second = (Image.open(path) for path in sorted(photos.iterdir())[5:7])
    found = look(write(tmp_path / "train", [first, first, first.resize((80, 80))]), write(tmp_path / "val", [second]))
    assert [(each.kind, each.leaks) for each in found.duplicates] == [("exact", False), ("near", False)]
    assert any("1 exact and 1 near copies within the training images, such as" in line for line in found.lines())


def test_images_are_counted_and_measured_and_unreadable_ones_named(tmp_path):
    train = write(tmp_path / "train", [Image.new("L", (side, 40), side) for side in (20, 30, 64, 90)])
    val = write(tmp_path / "val", [Image.new("RGB", (30, 30))])
    (tmp_path / "train" / "0001.png").write_bytes(b"")
    (tmp_path / "train" / "0002.png").write_bytes(b"not an image at all")
    found = look(train, val)
    assert (found.n_images, found.counts) == (3, {"train": {"a": 2}, "val": {"a": 1}})
    assert (found.smallest_side, found.median_side, found.largest_side) == (20, 30, 90)
    folder = tmp_path / "train"
    assert found.unreadable == [f"{folder / '0001.png'} (an empty file)", f"{folder / '0002.png'} (not an image)"]
    table = found.table()
    assert "2 images cannot be read: " + ", ".join(found.unreadable) in table
    assert "looked at 3 images of 20 to 90 px (median 30), 2 to 2 a class in training" in table


def test_an_image_of_several_labels_counts_for_each(photos):
    paths = sorted(map(str, photos.iterdir()))[:4]
    items = [Item(path, label) for path, label in zip(paths, ("cat;dog", "dog", "", "bird"), strict=True)]
    train, val = (MultiLabelSource(part, ["bird", "cat", "dog"]) for part in (items[:3], items[3:]))
    found = look(train, val)
    assert found.counts == {"train": {"bird": 0, "cat": 1, "dog": 2}, "val": {"bird": 1, "cat": 0, "dog": 0}}


def test_data_without_one_readable_image_is_an_error(tmp_path):
    train, val = (write(tmp_path / side, [Image.new("L", (8, 8))]) for side in ("train", "val"))
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(RunError, match=r"not one image can be read: .*0000.png \(an empty file\) and 1 more"):
        look(train, val)


def test_the_table_lists_the_classes_and_the_leaks():
    duplicates = [Duplicate("t.png", "v.png", kind, "train", "val") for kind in ("exact", "near")]
    counts = {"train": {"cat": 7, "elephant": 3}, "val": {"cat": 2, "elephant": 0}}
    lines = Findings(12, counts, 8, 9, 10, [], duplicates).table().splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["class", "training", "validation"],
        ["cat", "7", "2"],
        ["elephant", "3", "0"],
    ]
    assert lines[-1] == "1 exact and 1 near copies of validation images in training, such as t.png of v.png"


def test_duplicates_are_written_as_a_table(tmp_path):
    write_duplicates(tmp_path / "duplicates.csv", [Duplicate("a, b.png", "c.png", "near", "train", "val")])
    lines = (tmp_path / "duplicates.csv").read_text().splitlines()
    assert lines == ["path,duplicate_of,kind,split,duplicate_split", '"a, b.png",c.png,near,train,val']
