"""COCO-format data sets: where their parts are, which classes they have, what is wrong with them."""

import json
import logging
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.logging import print_log

from ..common.errors import RunError
from .datasets import (
    Request,
    class_table,
    complain,
    leaf_datasets,
    missing_in_training,
    needed_datasets,
    picture_size,
    read_names,
    set_classes,
    some,
)

TYPES = ("CocoDataset", "mmdet.CocoDataset")
SPLITS = {"train": ("train2017", "train", "training"), "val": ("val2017", "val", "valid", "validation")}
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
SAMPLE = 500

# COCO itself has two boxes of no height among 860 001; mmdet passes over them
TOLERATED_BOXES = 1 / 1000


@dataclass
class Part:
    """One part of a data set, with its annotation file read."""

    name: str
    file: Path
    images: Path
    content: dict[str, Any]

    @property
    def categories(self) -> dict[int, str]:
        return {category["id"]: category["name"] for category in self.content["categories"]}


def prepare(cfg: Config, request: Request) -> str:
    """Point the config at the files and classes of its data set and check them.

    Returns:
        A table of the annotations of each class, or '' if nothing was to be checked.

    Raises:
        RunError: what is missing or wrong, one line each.
    """
    if request.classes == "config" and request.check == "none":
        return ""
    parts = []
    for name, chosen, datasets in needed_datasets(cfg, request, lambda each: each.type in TYPES, "single CocoDataset"):
        part = _find(chosen, name)
        parts.append(part)
        for each, dataset in datasets.items():
            dataset.update(ann_file=str(part.file.resolve()), data_prefix=dict(img=str(part.images.resolve())))
            _point_evaluator(cfg.get(each.replace("dataloader", "evaluator")), part.file)

    names = _choose_classes(cfg, parts[0], request.classes)
    if request.check == "none":
        return ""
    first = leaf_datasets(cfg)[next(iter(request.parts.values()))]
    with_masks = any(step.get("with_mask") for step in first.pipeline)
    counts = {part.name: _count(part, names) for part in parts}
    problems = [problem for part in parts for problem in _problems(part, with_masks, request.check == "all")]
    problems += _differences(parts)
    smallest = (first.get("filter_cfg") or {}).get("min_size", 0)
    complain(problems or missing_in_training(names, counts) or _nothing_left(parts[0], names, smallest))
    for part in parts:
        _remark(part, names, smallest)
    return class_table(names, counts, "boxes")


def _find(dataset: dict[str, Any], name: str) -> Part:
    """Find annotation file and images of a part, in the places of the config, else in the usual ones."""
    root = Path(dataset.get("data_root") or "")
    candidates = [root / dataset.get("ann_file", "")]
    candidates += [root / place.format(split) for split in SPLITS[name] for place in ANNOTATIONS]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        without = "" if name == "train" else f"\n  ({WITHOUT_VALIDATION})"
        raise RunError(f"there is no annotation file for {name} in {root.resolve()}; expected is{TREE}{without}")
    content = _read(file)
    folders = [root / dataset.get("data_prefix", {}).get("img", "")]
    folders += [root / place.format(split) for split in SPLITS[name] for place in IMAGES] + [file.parent]
    images = content["images"]
    sample = [image["file_name"] for image in images[:: -(-len(images) // 50)]]
    folder = max(folders, key=lambda folder: sum(os.path.isfile(folder / file_name) for file_name in sample))
    return Part(name, file, folder, content)


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
                    raise RunError(f"{file}: {lacking} {key} have no {field!r}, the first has id {entry.get('id')!r}")
                if not isinstance(entry[field], kinds):
                    raise RunError(f"{file}: {key} with id {entry.get('id')!r} has {field} {entry[field]!r:.80}")
    return content


def _point_evaluator(evaluator: Any, file: Path) -> None:
    for metric in evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]:
        if metric and "ann_file" in metric:
            metric["ann_file"] = str(file.resolve())


def _choose_classes(cfg: Config, part: Part, choice: str) -> list[str]:
    """The class names of the run, in the order of their numbers, which is that of the annotation file."""
    dataset = next(iter(leaf_datasets(cfg).values()))
    own = list((dataset.get("metainfo") or {}).get("classes") or DATASETS.get(dataset.type).METAINFO["classes"])
    names = list(part.categories.values())
    ids = [category["id"] for category in part.content["categories"]]
    for what, values in (("name", names), ("id", ids)):
        value, times = Counter(values).most_common(1)[0]
        if times > 1:
            raise RunError(f"{part.file}: {times} categories have the {what} {value!r}")
    if choice != "auto":
        source = "the config" if choice == "config" else choice
        wanted = own if choice == "config" else read_names(Path(choice))
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise RunError(f"{part.file} has no category {some(unknown)}, which {source} has; it has {some(names, 20)}")
        names = [name for name in names if name in wanted]
    set_classes(cfg, names)
    if names != own:
        print_log(
            f"{len(names)} classes from {part.file} in place of the config's {len(own)}: {some(names, 20)}",
            logger="current",
        )
    return names


def _count(part: Part, names: list[str]) -> dict[int, int]:
    """Annotations of each class, by the number of the class."""
    numbers = {key: names.index(name) for key, name in part.categories.items() if name in names}
    found = Counter(annotation["category_id"] for annotation in part.content["annotations"])
    return {numbers[key]: count for key, count in found.items() if key in numbers}


def _problems(part: Part, with_masks: bool, everything: bool) -> list[str]:
    """What keeps a part from being trained on."""
    problems = []
    images = {image["id"]: image for image in part.content["images"]}
    annotations = part.content["annotations"]
    categories = part.categories

    def report(what: str, entries: list[Any]) -> None:
        if entries:
            problems.append(f"{part.name}: {len(entries)} {what}: {some(entries)} (in {part.file})")

    files = {image["file_name"]: image for image in images.values()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        there = dict(zip(files, pool.map(lambda name: os.path.isfile(part.images / name), files), strict=True))
        looked = [name for name in files if there[name]]
        looked = looked[:: 1 if everything else max(1, -(-len(looked) // SAMPLE))]
        found = pool.map(lambda name: picture_size(part.images / name, everything), looked)
        sizes = dict(zip(looked, found, strict=True))
    report(f"images are not in {part.images}", [name for name in files if not there[name]])
    report("images cannot be read", [name for name, size in sizes.items() if not size])
    report(
        "images have another size than the file says",
        [name for name, size in sizes.items() if size and {*size} != {files[name]["width"], files[name]["height"]}],
    )
    report("images share an id", [key for key, n in Counter(i["id"] for i in part.content["images"]).items() if n > 1])
    report("annotations share an id", [key for key, n in Counter(a["id"] for a in annotations).items() if n > 1])
    report(
        f"category ids of annotations are unknown, the categories have {some([*categories], 20)}",
        sorted({a["category_id"] for a in annotations} - {*categories}, key=str),
    )
    report(
        "annotations belong to images that are not listed",
        [a["id"] for a in annotations if a["image_id"] not in images],
    )
    report("boxes are not four numbers, annotations", [a["id"] for a in annotations if not _is_box(a["bbox"])])
    bad = [a["id"] for a in annotations if a["image_id"] in images and not _fits(a, images[a["image_id"]])]
    if len(bad) > TOLERATED_BOXES * len(annotations):
        report("boxes have no size or reach out of the image (x, y, width, height in pixels), annotations", bad)
    if with_masks:
        report("annotations have no segmentation", [a["id"] for a in annotations if not a.get("segmentation")])
        report(
            "annotations have a segmentation that is neither polygons of three points or more nor RLE",
            [
                a["id"]
                for a in annotations
                if a.get("segmentation") and a["image_id"] in images and not _is_mask(a, images[a["image_id"]])
            ],
        )
    return problems


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
    except TypeError:  # one is no number
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


def _trainable(part: Part, names: list[str], smallest: int) -> set[Any]:
    """Ids of the images that mmdet trains on: large enough, and with a box of a class that is no crowd."""
    wanted = {key for key, name in part.categories.items() if name in names}
    images = {i["id"]: i for i in part.content["images"] if min(i["width"], i["height"]) >= smallest}
    return {
        a["image_id"]
        for a in part.content["annotations"]
        if a["category_id"] in wanted and not a["iscrowd"] and a["image_id"] in images
    }


def _nothing_left(part: Part, names: list[str], smallest: int) -> list[str]:
    if part.name != "train" or _trainable(part, names, smallest):
        return []
    return [f"train: no image of {smallest} pixels or more has a box of the classes {some(names)} that is no crowd"]


def _is_box(values: list[Any]) -> bool:
    return len(values) == 4 and all(isinstance(value, NUMBER) and math.isfinite(value) for value in values)


def _fits(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    """Whether a box has a size and lies in its image, give or take a pixel of rounding."""
    if not _is_box(annotation["bbox"]):
        return False
    x, y, width, height = annotation["bbox"]
    inside = x >= -1 and y >= -1 and x + width <= image["width"] + 1 and y + height <= image["height"] + 1
    return width > 0 and height > 0 and annotation["area"] > 0 and inside


def _differences(parts: list[Part]) -> list[str]:
    """Category tables of two parts must agree, in ids, names and order: the order gives the class numbers."""
    if len(parts) < 2 or list(parts[0].categories.items()) == list(parts[1].categories.items()):
        return []
    first, second = (part.categories for part in parts)
    only = [f"{name} (id {key}) only in {parts[0].name}" for key, name in first.items() if second.get(key) != name]
    only += [f"{name} (id {key}) only in {parts[1].name}" for key, name in second.items() if first.get(key) != name]
    return [f"the categories of train and val differ: {some(only) or 'their order'}"]


def _remark(part: Part, names: list[str], smallest: int) -> None:
    """Say what training will pass over without calling it a mistake."""
    remarks = []
    images = {image["id"]: image for image in part.content["images"]}
    if part.name == "train":
        left = _trainable(part, names, smallest)
        unused = [image["file_name"] for key, image in images.items() if key not in left]
        if unused:
            remarks.append(
                f"{len(unused)} images are not trained on, having no box of a class, or being smaller than "
                f"{smallest} pixels: {some(unused)}"
            )
    bad = [a["id"] for a in part.content["annotations"] if not _fits(a, images[a["image_id"]])]
    counts = _count(part, names)
    absent = [name for i, name in enumerate(names) if i not in counts]
    if bad:
        remarks.append(f"{len(bad)} boxes have no size or reach out of the image, annotations {some(bad)}")
    if absent:
        remarks.append(f"{len(absent)} classes have no annotation: {some(absent)}")
    for remark in remarks:
        print_log(f"{part.name}: {remark}", logger="current", level=logging.WARNING)
