"""Data sets in COCO's format: where their parts are, which classes they have, what is wrong with them."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import ConfigDict
from mmengine.logging import print_log

from ..common.classes import SPLITS, read_class_names
from ..common.errors import RunError, plural, some
from .datasets import DataCheck, Findings, counted, image_size, in_threads

TYPES = ("CocoDataset", "mmdet.CocoDataset")
ANNOTATIONS = ("annotations/instances_{}.json", "annotations/{}.json", "{}/_annotations.coco.json", "{}.json")
IMAGES = ("{}", "images/{}", "images", "")
TREE = """
  DATA/annotations/instances_train2017.json   (or instances_train.json, train.json)
  DATA/annotations/instances_val2017.json
  DATA/train2017/*.jpg                        (or train/, images/train/, images/)
  DATA/val2017/*.jpg"""

WITHOUT_VALIDATION = "to train without: --cfg-options val_dataloader=None val_cfg=None val_evaluator=None"
NUMBER = (int, float)
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "images": dict(id=(int, str), file_name=str, width=NUMBER, height=NUMBER),
    "categories": dict(id=(int, str), name=str),
    "annotations": dict(
        id=(int, str), image_id=(int, str), category_id=(int, str), bbox=list, area=NUMBER, iscrowd=(int, bool)
    ),
}
# COCO itself has two boxes of no height among 860 001; mmdet passes over them
TOLERATED_BOXES = 1 / 1000
Fault = tuple[str, str, list[Any]]  # what kind of things, what is wrong with them, and which


@dataclass
class Part:
    """One part of a data set, with its annotation file read."""

    file: Path
    folder: Path
    content: dict[str, Any]

    @cached_property
    def images(self) -> dict[int | str, dict[str, Any]]:
        return {image["id"]: image for image in self.content["images"]}

    @property
    def annotations(self) -> list[dict[str, Any]]:
        return self.content["annotations"]

    def annotations_that(self, wrong: Callable[[dict[str, Any], dict[str, Any] | None], Any]) -> list[Any]:
        """Ids of the annotations that are `wrong`, of which it is given each, and its image."""
        return [each["id"] for each in self.annotations if wrong(each, self.images.get(each["image_id"]))]

    @cached_property
    def categories(self) -> dict[int | str, str]:
        return {category["id"]: category["name"] for category in self.content["categories"]}


class Check(DataCheck):
    """The check of data sets in COCO's format, see `datasets.adapt_to_data`."""

    kind, unit, registry = "single CocoDataset", "boxes", DATASETS

    def fits(self, dataset: ConfigDict) -> bool:
        return dataset.type in TYPES

    def find(self, name: str, dataset: ConfigDict) -> Part:
        root = Path(dataset.get("data_root") or "")
        splits = (f"{name}2017", *SPLITS[name])
        candidates = [root / dataset.get("ann_file", "")]
        candidates += [root / place.format(split) for split in splits for place in ANNOTATIONS]
        file = next((path for path in candidates if path.is_file()), None)
        if file is None:
            without = "" if name == "train" else f"\n  ({WITHOUT_VALIDATION})"
            raise RunError(f"there is no annotation file for {name} in {root.resolve()}; expected:{TREE}{without}")
        content = _read(file)
        folders = [root / dataset.get("data_prefix", {}).get("img", "")]
        folders += [root / place.format(split) for split in splits for place in IMAGES] + [file.parent]
        images = content["images"]
        sample = [image["file_name"] for image in images[:: -(-len(images) // 50)]]
        folder = max(folders, key=lambda folder: sum(os.path.isfile(folder / file_name) for file_name in sample))
        return Part(file, folder, content)

    def point(self, loader: str, dataset: ConfigDict, part: Part) -> None:
        file = str(part.file.resolve())
        dataset.update(ann_file=file, data_prefix=dict(img=str(part.folder.resolve())))
        metrics = self.cfg.get(loader.replace("dataloader", "evaluator"))
        for metric in metrics if isinstance(metrics, (list, tuple)) else [metrics]:
            if metric and "ann_file" in metric:
                metric["ann_file"] = file

    def choose_classes(self) -> list[str]:
        """The order of their numbers is that of the annotation file."""
        part, choice, own = next(iter(self.parts.values())), self.request.classes, self.own_classes
        for key in ("name", "id"):
            value, times = Counter(category[key] for category in part.content["categories"]).most_common(1)[0]
            if times > 1:
                raise RunError(f"{part.file}: {times} categories have the {key} {value!r}")
        names = list(part.categories.values())
        if choice != "auto":
            source = "the config" if choice == "config" else choice
            wanted = own if choice == "config" else read_class_names(choice)
            unknown = [name for name in wanted if name not in names]
            if unknown:
                known = some(names, 20)
                raise RunError(f"{part.file} has no category {some(unknown)}, which {source} has; it has {known}")
            names = [name for name in names if name in wanted]
        self.set_classes(names)
        if names != own:
            change = f"{plural(len(names), 'class')} from {part.file} in place of the config's {len(own)}"
            print_log(f"{change}: {some(names, 20)}", "current")
        return names

    def examine(self, name: str, part: Part, classes: list[str]) -> Findings:
        numbers = {key: classes.index(label) for key, label in part.categories.items() if label in classes}
        found = Counter(each["category_id"] for each in part.annotations)
        counts = {numbers[key]: count for key, count in found.items() if key in numbers}
        faults = [*self._image_faults(part), *self._annotation_faults(part)]
        box = "with a box that has no size or leaves the image"
        outside = part.annotations_that(lambda each, image: image is not None and not _fits(each, image))
        if len(outside) > TOLERATED_BOXES * len(part.annotations):
            faults.append(("annotation", f"{box} (x, y, width, height in pixels)", outside))
        problems = [f"{name}: {line}" for fault in faults for line in counted(*fault, part.file)]
        remarks = counted("annotation", box, outside)
        if name == "val" and "train" in self.parts:
            problems += _compare_categories(self.parts["train"], part)
        if name == "train":
            smallest = (self.dataset.get("filter_cfg") or {}).get("min_size", 0)
            large = {key for key, image in part.images.items() if min(image["width"], image["height"]) >= smallest}
            boxes = [each for each in part.annotations if each["category_id"] in numbers and not each["iscrowd"]]
            trainable = {each["image_id"] for each in boxes} & large  # by mmdet
            unused = [image["file_name"] for key, image in part.images.items() if key not in trainable]
            reason = f"without a box of a class, or smaller than {smallest} pixels"
            remarks += counted("image", f"not trained on, {reason}", unused)
            if not trainable:
                kind = f"{smallest} pixels or more has a box of the classes {some(classes)} that is not a crowd"
                problems.append(f"train: no image of {kind}")
        return Findings(counts, problems, remarks)

    def _image_faults(self, part: Part) -> list[Fault]:
        files = {image["file_name"]: image for image in part.content["images"]}
        there = in_threads(lambda name: os.path.isfile(part.folder / name), files)
        looked = self.sample([name for name in files if there[name]])
        sizes = in_threads(lambda name: image_size(part.folder / name, self.request.check == "all"), looked)
        other = [
            name for name, size in sizes.items() if size and {*size} != {files[name]["width"], files[name]["height"]}
        ]
        return [
            ("image", f"not found in {part.folder}", [name for name in files if not there[name]]),
            ("image", "that cannot be read", [name for name, size in sizes.items() if not size]),
            ("image", "of another size than the file says", other),
            ("id", "of several images", _repeated(part.content["images"])),
        ]

    def _annotation_faults(self, part: Part) -> list[Fault]:
        categories = part.categories
        unknown = sorted({each["category_id"] for each in part.annotations} - {*categories}, key=str)
        ids = part.annotations_that
        faults = [
            ("id", "of several annotations", _repeated(part.annotations)),
            ("category id", f"of annotations that is not one of {some(categories, 20)}", unknown),
            ("annotation", "of images that are not listed", ids(lambda each, image: image is None)),
            ("annotation", "with a box that is not four numbers", ids(lambda each, image: not _is_box(each["bbox"]))),
        ]
        if any(step.get("with_mask") for step in self.dataset.pipeline):
            no_mask = ids(lambda each, image: not each.get("segmentation"))
            bad_mask = ids(lambda each, image: each.get("segmentation") and image and not _is_mask(each, image))
            shape = "neither polygons of three points or more nor RLE"
            faults += [
                ("annotation", "without a segmentation", no_mask),
                ("annotation", f"with a segmentation that is {shape}", bad_mask),
            ]
        return faults


def _compare_categories(train: Part, val: Part) -> list[str]:
    """Categories must agree in ids, names and order, which gives the class numbers."""
    tables = {"train": [*train.categories.items()], "val": [*val.categories.items()]}
    if tables["train"] == tables["val"]:
        return []
    only = [
        f"{label} (id {key}) only in {name}"
        for name, other in (("train", "val"), ("val", "train"))
        for key, label in tables[name]
        if (key, label) not in tables[other]
    ]
    return [f"the categories of train and val differ: {some(only) or 'their order'}"]


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{file} is not a COCO annotation file: not a mapping")
    for key, fields in FIELDS.items():
        entries = content.get(key)
        if not isinstance(entries, list):
            raise RunError(f"{file} is not a COCO annotation file: it has no list {key!r}")
        if not entries:
            raise RunError(f"{file} has no {key}")
        for field, kinds in fields.items():
            for entry in entries:
                if not isinstance(entry, dict):
                    raise RunError(f"{file}: {key} holds {entry!r:.80}, which is not a mapping")
                if field not in entry:
                    lacking = sum(field not in other for other in entries if isinstance(other, dict))
                    raise RunError(f"{file}: {lacking} {key} without {field!r}, the first has id {entry.get('id')!r}")
                if not isinstance(entry[field], kinds):
                    raise RunError(f"{file}: {key} with id {entry.get('id')!r} has {field} {entry[field]!r:.80}")
    return content


def _is_mask(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    """Whether pycocotools can draw a mask: it checks nothing, and damaged ones may end the whole process."""
    segmentation, size = annotation["segmentation"], [image["height"], image["width"]]
    if isinstance(segmentation, dict):
        lengths = segmentation.get("counts")
        lengths = _decode_lengths(lengths) if isinstance(lengths, str) else lengths
        return (
            segmentation.get("size") == size
            and isinstance(lengths, list)
            and all(isinstance(length, int) and length >= 0 for length in lengths)
            and sum(lengths) == math.prod(size)
        )
    return isinstance(segmentation, list) and all(_is_polygon(polygon, max(size)) for polygon in segmentation)


def _is_polygon(points: Any, side: int) -> bool:
    """Whether these are x, y, x, y, ... of three points or more, not far out of an image of this longer side."""
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return False
    try:  # a large data set has fifty million of them
        return math.isfinite(sum(points)) and -side <= min(points) and max(points) <= 2 * side
    except TypeError:  # one is not a number
        return False


def _decode_lengths(text: str) -> list[int] | None:
    """The run lengths in COCO's compressed form, six bits a character, differences from the third on; None if damaged.

    The sixth bit says that the number goes on, the fifth of its last character is its sign.
    """
    lengths: list[int] = []
    number = shift = 0
    for bits in (ord(character) - 48 for character in text):
        if not 0 <= bits < 64 or shift > 60:
            return None
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (1 << shift) if bits & 16 else 0
            lengths.append(number + (lengths[-2] if len(lengths) > 2 else 0))
            number = shift = 0
    return None if shift else lengths


def _is_box(values: list[Any]) -> bool:
    return len(values) == 4 and all(isinstance(value, NUMBER) and math.isfinite(value) for value in values)


def _fits(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    """Whether a box has a size and lies in its image, give or take a pixel of rounding."""
    if not _is_box(annotation["bbox"]):
        return False
    x, y, width, height = annotation["bbox"]
    inside = x >= -1 and y >= -1 and x + width <= image["width"] + 1 and y + height <= image["height"] + 1
    return width > 0 and height > 0 and annotation["area"] > 0 and inside


def _repeated(entries: list[dict[str, Any]]) -> list[Any]:
    return [key for key, count in Counter(entry["id"] for entry in entries).items() if count > 1]
