"""Data sets of label maps: layouts, classes, and every mistake in one line."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from digit_scenes import CLASSES as DIGITS
from mmengine.config import Config
from PIL import Image
from small_runs import own_config

from convmlp.openmmlab.configs import replace_root
from convmlp.openmmlab.datasets import Request, adapt_to_data

FPN = "segmentation/fpn_convmlp_s_512x512_40k_ade20k.py"
VAL_LABEL = 7  # one that occurs in the few images of val


def relabel(data: Path, split: str, edit: Callable[[np.ndarray], np.ndarray], name: str = "*") -> None:
    for file in sorted((data / "annotations" / split).glob(f"{name}.png")):
        Image.fromarray(edit(np.array(Image.open(file)))).save(file)


def test_good_label_maps_are_counted_by_class(segmentation, check):
    code, said = check(FPN, segmentation)
    total = sum(
        int((np.array(Image.open(f)) == 5).sum()) for f in (segmentation / "annotations/training").glob("*.png")
    )
    assert code == 0, said
    assert any(line.split()[:2] == ["four", str(total)] for line in said.splitlines())
    assert "11 classes from" in said and "(label 0 is the first): background, zero," in said


def resize_one(data: Path) -> None:
    file = data / "annotations/training/000001.png"
    Image.open(file).resize((32, 32)).save(file)


def colour_one(data: Path) -> None:
    file = data / "annotations/training/000001.png"
    Image.open(file).convert("RGB").save(file)


def deepen_one(data: Path) -> None:
    file = data / "annotations/training/000001.png"
    Image.fromarray(np.array(Image.open(file)).astype(np.uint16)).save(file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: shutil.rmtree(d / "annotations"), "there are no images and label maps for train in"),
        (lambda d: shutil.rmtree(d / "images/validation"), "there are no images and label maps for val in"),
        (lambda d: [f.unlink() for f in (d / "images/training").iterdir()], "holds no images"),
        (lambda d: (d / "images/training/000003.jpg").unlink(), "train: 1 label map without an image in"),
        (lambda d: (d / "annotations/training/000003.png").unlink(), "train: 1 image without a label map in"),
        (
            lambda d: relabel(d, "training", lambda m: np.where(m == 0, 11, m), "000002"),
            "label values 11 are outside of the 11 classes (0 to 10) and not 255, in 1 label map: 000002",
        ),
        (resize_one, "train: 1 label map of another size than the image: 000001.png"),
        (colour_one, "train: 1 label map of several channels (mode RGB); one channel of class numbers is needed"),
        (deepen_one, "train: 1 label map of 16 bits or more; 8 are needed: 000001.png"),
        (
            lambda d: relabel(d, "training", lambda m: np.where(m > 0, 255, 0).astype(np.uint8)),
            "hold nothing but 0 and 255; 255 means left out, so a mask of 0 and 255 must become 0 and 1",
        ),
        (lambda d: relabel(d, "training", lambda m: np.full_like(m, 255)), "no pixel of the label maps in"),
        (
            lambda d: relabel(d, "training", lambda m: np.where(m == VAL_LABEL, 0, m).astype(np.uint8)),
            f"classes that val has and train does not have: {DIGITS[VAL_LABEL - 1]}",
        ),
        (lambda d: (d / "annotations/training/000001.png").write_bytes(b"nonsense"), "1 label map that cannot be read"),
        (
            lambda d: (d / "images/training/000001.jpg").write_bytes(b"nonsense"),
            "1 label map of images that cannot be read",
        ),
        (lambda d: (d / "classes.txt").write_text("a\n\nb\n"), "without empty lines"),
    ],
)
def test_every_mistake_in_label_maps_is_one_clear_line(segmentation, check, spoil, message):
    spoil(segmentation)
    code, said = check(FPN, segmentation)
    assert code == 2
    assert message in said
    assert "Traceback" not in said


def test_the_folder_above_is_told_from_the_folder_itself(segmentation, check):
    code, said = check(FPN, segmentation.parent)
    assert code == 2 and "DATA/images/training/NAME.jpg" in said
    assert f"The folder {segmentation} looks like it" in said


def test_label_maps_with_a_palette_hold_class_numbers(segmentation, check):
    before = check(FPN, segmentation)[1].splitlines()[-13:]
    for file in (segmentation / "annotations").rglob("*.png"):
        image = Image.fromarray(np.array(Image.open(file)), "P")
        image.putpalette([value for i in range(256) for value in (255 - i, i, 3 * i % 256)])
        image.save(file)
    code, said = check(FPN, segmentation)
    assert code == 0 and said.splitlines()[-13:] == before


def test_zero_may_mean_unlabelled(segmentation, check):
    (segmentation / "classes.txt").write_text("\n".join(DIGITS))
    code, said = check(FPN, segmentation)
    assert code == 2 and "label values 10 are outside of the 10 classes (0 to 9)" in said
    code, said = check(FPN, segmentation, "--reduce-zero-label")
    assert code == 0, said
    assert "label 0 is left out and 1 is the first" in said


def test_without_own_names_the_classes_are_the_configs(segmentation, check):
    names = (segmentation / "classes.txt").rename(segmentation.parent / "names.txt")
    code, said = check(FPN, segmentation)
    assert code == 0 and "wall" in said and "classes without pixels" in said
    code, said = check(FPN, segmentation, "--classes", str(names))
    assert code == 0 and "11 classes from" in said


def test_zero_is_left_out_whatever_names_the_classes_come_from(segmentation):
    (segmentation / "classes.txt").unlink()
    cfg = Config.fromfile(
        own_config(
            FPN,
            f"meta = dict(classes={DIGITS!r})\n"
            "own = dict(type='BaseSegDataset', reduce_zero_label=False, metainfo=meta)\n"
            "train_dataloader = dict(dataset=own)\n"
            "val_dataloader = dict(dataset=own)\n"
            "test_dataloader = val_dataloader",
        )
    )
    replace_root(cfg, str(segmentation))
    adapt_to_data(cfg, Request(reduce_zero_label=True))
    assert cfg.train_dataloader.dataset.reduce_zero_label and cfg.test_dataloader.dataset.reduce_zero_label
    assert cfg.model.decode_head.num_classes == 10


def test_folders_are_listed_a_few_times_however_many_files_they_hold(segmentation, check, monkeypatch):
    """ADE20K has 20 000 label maps: a listing for each would take hours."""
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(str(folder)) or scandir(folder))

    def listings() -> int:
        return sum(folder.startswith(str(segmentation)) for folder in listed)

    assert check(FPN, segmentation)[0] == 0
    first = listings()
    assert first
    for kind, suffix in (("images", ".jpg"), ("annotations", ".png")):
        folder = segmentation / kind / "training"
        for i in range(50):
            shutil.copy(folder / f"000001{suffix}", folder / f"more{i}{suffix}")
    assert check(FPN, segmentation)[0] == 0
    assert listings() == 2 * first


def test_folders_behind_links_are_read(segmentation, tmp_path, check):
    for kind in ("images", "annotations"):
        folder = segmentation / kind / "training"
        folder.rename(tmp_path / kind)
        folder.mkdir()
        (folder / "more").symlink_to(tmp_path / kind)
        (folder / "._000001.png").touch()
    code, said = check(FPN, segmentation)
    assert code == 0, said


@pytest.mark.parametrize(
    ("images", "labels", "suffix"),
    [("images/{}", "labels/{}", ".png"), ("{}/images", "{}/masks", ".png"), ("images/{}", "masks/{}", ".jpeg")],
)
def test_other_usual_layouts_of_label_maps_are_found(segmentation, tmp_path, check, images, labels, suffix):
    own = tmp_path / "own"
    for split, name in (("training", "train"), ("validation", "val")):
        for image in (segmentation / "images" / split).iterdir():
            target = own / images.format(name) / f"{image.stem}{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(image).save(target)
        shutil.copytree(segmentation / "annotations" / split, own / labels.format(name))
    shutil.copy(segmentation / "classes.txt", own)
    code, said = check(FPN, own)
    assert code == 0, said
