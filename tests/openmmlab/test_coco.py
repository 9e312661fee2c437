"""Data sets in COCO's format: layouts, classes, and every mistake in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from digit_scenes import CLASSES as DIGITS
from mmengine.config import Config
from small_runs import own_config

from convmlp.openmmlab.configs import replace_root
from convmlp.openmmlab.datasets import Request, adapt_to_data

RETINANET = "detection/retinanet_convmlp_s_fpn_1x_coco.py"
MASKRCNN = "detection/maskrcnn_convmlp_s_fpn_1x_coco.py"
VAL_DIGIT = 3  # one that occurs in the few images of val


def change(data: Path, split: str, edit: Callable[[dict], object]) -> None:
    file = data / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_a_good_data_set_is_counted_by_class(detection, check):
    code, said = check(RETINANET, detection)
    content = json.loads((detection / "annotations/instances_train2017.json").read_text())
    eights = sum(a["category_id"] == 9 for a in content["annotations"])
    assert code == 0, said
    assert "The data set is in order." in said
    assert any(line.split()[:2] == ["eight", str(eights)] for line in said.splitlines())
    assert "10 classes from" in said and "in place of the config's 80: zero, one," in said


def missing_folder(data: Path) -> None:
    shutil.rmtree(data / "annotations")


def absent_images(data: Path) -> None:
    (data / "train2017/000002.jpg").unlink()
    (data / "train2017/000004.jpg").unlink()


def not_json(data: Path) -> None:
    (data / "annotations/instances_train2017.json").write_text('{"images": [')


def zero_size(content: dict) -> None:
    content["annotations"][0]["bbox"][2] = 0


def outside(content: dict) -> None:
    content["annotations"][0]["bbox"] = [50, 10, 40, 10]


def truncate_one(data: Path) -> None:
    (data / "train2017/000002.jpg").write_bytes(b"")


def crowds(content: dict) -> None:
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


def tiny(content: dict) -> None:
    """Images of 30 pixels, as the file has it; all boxes go where they fit."""
    for annotation in content["annotations"]:
        annotation.update(bbox=[0, 0, 20, 20])
    for image in content["images"]:
        image.update(width=30)


def drop_class(data: Path, split: str, digit: int) -> None:
    change(data, split, lambda c: c.update(annotations=[a for a in c["annotations"] if a["category_id"] != digit + 1]))


def corners(content: dict) -> None:
    """x1, y1, x2, y2 instead of x, y, width, height, the commonest mistake of all."""
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["bbox"] = [x, y, x + width, y + height]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing_folder, "there is no annotation file for train in"),
        (absent_images, "train: 2 images not found in"),
        (not_json, "instances_train2017.json is not valid JSON"),
        (lambda d: change(d, "train", lambda c: c.pop("categories")), "it has no list 'categories'"),
        (lambda d: change(d, "val", lambda c: c.update(annotations=[])), "instances_val2017.json has no annotations"),
        (
            lambda d: change(d, "train", lambda c: c.update(annotations=[])),
            "instances_train2017.json has no annotations",
        ),
        (lambda d: change(d, "train", lambda c: c["annotations"][3].pop("area")), "1 annotations without 'area'"),
        (
            lambda d: change(d, "train", lambda c: c["annotations"][0].update(category_id=77)),
            "1 category id of annotations that is not one of 1, 2, 3,",
        ),
        (
            lambda d: change(d, "train", lambda c: c["annotations"][0].update(image_id=999)),
            "1 annotation of images that are not listed: 1 ",
        ),
        (
            lambda d: change(d, "train", zero_size),
            "train: 1 annotation with a box that has no size or leaves the image",
        ),
        (lambda d: change(d, "train", outside), "train: 1 annotation with a box that has no size or leaves the image"),
        (
            lambda d: change(d, "train", corners),
            "annotations with a box that has no size or leaves the image (x, y, width, height",
        ),
        (
            lambda d: change(d, "val", lambda c: c["categories"][3].update(name="trois")),
            "the categories of train and val differ: three (id 4) only in train, trois (id 4) only in val",
        ),
        (
            lambda d: change(d, "val", lambda c: c["categories"].reverse()),
            "the categories of train and val differ: their order",
        ),
        (
            lambda d: drop_class(d, "train", VAL_DIGIT),
            f"classes that val has and train does not have: {DIGITS[VAL_DIGIT]}",
        ),
        (
            lambda d: change(d, "train", lambda c: c["annotations"][1].update(id=c["annotations"][0]["id"])),
            "1 id of several annotations",
        ),
        (
            lambda d: change(d, "train", lambda c: c["images"][1].update(id=c["images"][0]["id"])),
            "1 id of several images",
        ),
        (truncate_one, "train: 1 image that cannot be read: 000002.jpg"),
        (
            lambda d: change(d, "train", lambda c: c["images"][0].update(width=128, height=128)),
            "train: 1 image of another size than the file says: 000001.jpg",
        ),
        (
            lambda d: change(d, "train", lambda c: c["categories"].append({"id": 1, "name": "bis"})),
            "2 categories have the id 1",
        ),
        (
            lambda d: change(d, "train", lambda c: c["categories"][1].update(name="zero")),
            "2 categories have the name 'zero'",
        ),
        (
            lambda d: change(d, "train", crowds),
            "train: no image of 32 pixels or more has a box of the classes zero, one,",
        ),
        (lambda d: change(d, "train", lambda c: c["categories"].append("eleven")), "categories holds 'eleven'"),
        (lambda d: change(d, "train", lambda c: c["images"][0].update(width="64")), "images with id 1 has width '64'"),
        (lambda d: change(d, "train", lambda c: c["annotations"][0].update(area=None)), "has area None"),
    ],
)
def test_every_mistake_in_a_coco_data_set_is_one_clear_line(detection, check, spoil, message):
    spoil(detection)
    code, said = check(RETINANET, detection)
    assert code == 2
    assert message in said
    assert "Traceback" not in said


def test_the_expected_tree_is_shown(tmp_path, check):
    code, said = check(RETINANET, tmp_path)
    assert code == 2
    assert "DATA/annotations/instances_train2017.json" in said and "DATA/val2017/*.jpg" in said


def test_several_mistakes_are_told_at_once(detection, check):
    absent_images(detection)
    change(detection, "val", zero_size)
    code, said = check(RETINANET, detection)
    assert code == 2
    assert "train: 2 images not found in" in said and "val: 1 annotation with a box that has no size" in said


def test_masks_are_asked_for_only_where_they_are_needed(detection, check):
    change(detection, "train", lambda c: c["annotations"][0].pop("segmentation"))
    change(detection, "train", lambda c: c["annotations"][1].update(segmentation=[[1, 2, 3, 4]]))
    assert check(RETINANET, detection)[0] == 0
    code, said = check(MASKRCNN, detection)
    assert code == 2 and "train: 1 annotation without a segmentation" in said
    assert "1 annotation with a segmentation that is neither polygons of three points or more nor RLE" in said


def test_a_few_bad_boxes_among_thousands_are_only_named(detection, check):
    """As in COCO itself, which has two boxes of no height among 860 001."""

    def repeat(content: dict) -> None:
        first = content["annotations"][0]
        start = len(content["annotations"]) + 1
        content["annotations"] += [{**first, "id": start + i} for i in range(2000)]
        content["annotations"][-1]["bbox"] = [5, 5, 10, 0]

    change(detection, "train", repeat)
    code, said = check(RETINANET, detection)
    assert code == 0
    assert "WARNING - train: 1 annotation with a box that has no size" in said


def test_images_that_training_passes_over_are_named(detection, check):
    def empty(content: dict) -> None:
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != content["images"][0]["id"]]

    change(detection, "val", empty)
    assert "not trained on" not in check(RETINANET, detection)[1]
    change(detection, "train", empty)
    change(detection, "val", lambda c: c.update(annotations=c["annotations"][:1]))
    _, said = check(RETINANET, detection)
    reason = "without a box of a class, or smaller than 32 pixels: 000001.jpg"
    assert f"WARNING - train: 1 image not trained on, {reason}" in said


def test_a_missing_first_image_does_not_hide_the_others(detection, tmp_path, check):
    own = tmp_path / "own"
    for split in ("train", "val"):
        shutil.copytree(detection / f"{split}2017", own / "images" / split)
    shutil.copytree(detection / "annotations", own / "annotations")
    (own / "images/train/000001.jpg").unlink()
    code, said = check(RETINANET, own)
    assert code == 2 and f"train: 1 image not found in {own}/images/train: 000001.jpg" in said


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/{}.json", "{}"),
        ("annotations/instances_{}.json", "images/{}"),
        ("annotations/{}.json", "images"),
        ("{}/_annotations.coco.json", "{}"),
        ("{}.json", ""),
    ],
)
def test_other_usual_layouts_are_found(detection, tmp_path, check, annotations, images):
    own = tmp_path / "own"
    for split in ("train", "val"):
        target = own / images.format(split)
        target.mkdir(parents=True, exist_ok=True)
        rename = {}
        for image in (detection / f"{split}2017").iterdir():
            rename[image.name] = f"{split}_{image.name}"
            shutil.copy(image, target / rename[image.name])
        file = own / annotations.format(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = json.loads((detection / f"annotations/instances_{split}2017.json").read_text())
        for image in content["images"]:
            image["file_name"] = rename[image["file_name"]]
        file.write_text(json.dumps(content))
    code, said = check(RETINANET, own)
    assert code == 0, said


def test_classes_of_a_text_file_are_a_choice_of_the_categories(detection, tmp_path, check):
    names = tmp_path / "names.txt"
    names.write_text("seven\nthree\n")
    code, said = check(RETINANET, detection, "--classes", str(names))
    assert code == 0
    assert "2 classes from" in said and ": three, seven" in said  # in the order of the annotation file
    names.write_text("seven\ntrois\n")
    code, said = check(RETINANET, detection, "--classes", str(names))
    assert code == 2 and "has no category trois, which" in said and "names.txt has; it has zero, one," in said


def test_classes_of_the_config_must_be_there(detection, check):
    code, said = check(RETINANET, detection, "--classes", "config")
    assert code == 2 and "has no category person, bicycle, car and 77 more, which the config has" in said


def test_heads_count_the_classes_of_the_config_too(scenes):
    """A config that names its classes and forgets the heads would fail in the first validation."""
    root = scenes / "detection"
    names = [name for name in reversed(DIGITS) if name != "two"]
    meta = f"metainfo=dict(classes={names!r})"
    loaders = "\n".join(f"{part}_dataloader = dict(dataset=dict({meta}))" for part in ("train", "val"))
    cfg = Config.fromfile(own_config(MASKRCNN, f"data_root = 'elsewhere/'\n{loaders}"))
    replace_root(cfg, str(root))
    adapt_to_data(cfg, Request(classes="config"))
    assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 9
    # mmdet numbers classes in the order of the annotation file, whatever order a config has
    assert cfg.train_dataloader.dataset.metainfo.classes == tuple(name for name in DIGITS if name != "two")
    assert cfg.train_dataloader.dataset.ann_file.startswith(str(root))
