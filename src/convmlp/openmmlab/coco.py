"""COCO-format data sets: where their parts are, which classes they have, what is wrong with them."""

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.logging import print_log

from ..errors import RunError
from .datasets import (
    Request,
    class_table,
    complain,
    in_same_place,
    leaf_dataset,
    leaf_datasets,
    missing_in_training,
    read_names,
    set_num_classes,
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
        A table of the annotations of each class, or '' if the data set is of another kind.

    Raises:
        RunError: what is missing or wrong, one line each.
    """
    parts = []
    for name, loader in request.parts.items():
        datasets = in_same_place(cfg, loader)
        if not datasets or datasets[loader].type not in TYPES:
            if cfg.get(loader):
                print_log(f"{loader}: no single CocoDataset, so its data is not checked", logger="current")
            continue
        part = _find(datasets[loader], name)
        parts.append(part)
        for each, dataset in datasets.items():
            dataset.update(ann_file=str(part.file.resolve()), data_prefix=dict(img=str(part.images.resolve())))
            _point_evaluator(cfg.get(each.replace("dataloader", "evaluator")), part.file)
    if not parts:
        return ""

    names = _choose_classes(cfg, parts[0], request.classes)
    if request.check == "none":
        return ""
    with_masks = any(step.get("with_mask") for step in leaf_dataset(cfg, request.parts[parts[0].name]).pipeline)
    counts = {part.name: _count(part, names) for part in parts}
    problems = [problem for part in parts for problem in _problems(part, with_masks)]
    problems += _differences(parts)
    complain(problems or missing_in_training(names, counts))
    for part in parts:
        _remark(part, names)
    return class_table(names, counts, "boxes")


def _find(dataset: dict[str, Any], name: str) -> Part:
    """Find annotation file and images of a part, in the places of the config, else in the usual ones."""
    root = Path(dataset.get("data_root") or "")
    candidates = [root / dataset.get("ann_file", "")]
    candidates += [root / place.format(split) for split in SPLITS[name] for place in ANNOTATIONS]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise RunError(f"there is no annotation file for {name} in {root.resolve()}; expected is{TREE}")
    content = _read(file)
    folders = [root / dataset.get("data_prefix", {}).get("img", "")]
    folders += [root / place.format(split) for split in SPLITS[name] for place in IMAGES] + [file.parent]
    first = content["images"][0]["file_name"]
    images = next((folder for folder in folders if (folder / first).is_file()), folders[0])
    return Part(name, file, images, content)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise RunError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{file} is not a COCO annotation file: not a mapping")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise RunError(f"{file} is not a COCO annotation file: it has no list {key!r}")
        if not content[key]:
            raise RunError(f"{file} has no {key}")
    needed = {"images": ("id", "file_name", "width", "height"), "categories": ("id", "name")}
    needed["annotations"] = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    for key, fields in needed.items():
        for field in fields:
            lacking = [entry.get("id") for entry in content[key] if field not in entry]
            if lacking:
                raise RunError(f"{file}: {len(lacking)} {key} have no {field!r}, the first has id {lacking[0]}")
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
    if len(names) != len({*names}):
        raise RunError(f"{part.file}: two categories have the name {Counter(names).most_common(1)[0][0]!r}")
    if choice not in ("auto", "config"):
        wanted = read_names(Path(choice))
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise RunError(f"{choice}: {part.file} has no category {some(unknown)}; it has {some(names, 20)}")
        names = [name for name in names if name in wanted]
    if choice == "config":
        unknown = [name for name in own if name not in names]
        if unknown:
            raise RunError(f"{part.file} has no category {some(unknown)}, which the config has; --classes auto")
        return own
    if names != own:
        for each in leaf_datasets(cfg).values():
            each["metainfo"] = dict(classes=tuple(names))
        set_num_classes(cfg.model, len(names))
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


def _problems(part: Part, with_masks: bool) -> list[str]:
    """What keeps a part from being trained on."""
    problems = []
    images = {image["id"]: image for image in part.content["images"]}
    annotations = part.content["annotations"]
    categories = part.categories

    def report(what: str, entries: list[Any]) -> None:
        if entries:
            problems.append(f"{part.name}: {len(entries)} {what}: {some(entries)} (in {part.file})")

    folders = {image["file_name"].rpartition("/")[0] for image in images.values()}
    there = {
        f"{folder}/{path.name}".lstrip("/")
        for folder in folders
        if (part.images / folder).is_dir()
        for path in (part.images / folder).iterdir()
    }
    absent = [image["file_name"] for image in images.values() if image["file_name"] not in there]
    report(f"images are not in {part.images}", absent)
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
    bad = [a["id"] for a in annotations if a["image_id"] in images and not _fits(a, images[a["image_id"]])]
    if len(bad) > TOLERATED_BOXES * len(annotations):
        report("boxes have no size or reach out of the image (x, y, width, height in pixels), annotations", bad)
    if with_masks:
        report("annotations have no segmentation", [a["id"] for a in annotations if not a.get("segmentation")])
    return problems


def _fits(annotation: dict[str, Any], image: dict[str, Any]) -> bool:
    """Whether a box has a size and lies in its image, give or take a pixel of rounding."""
    try:
        x, y, width, height = map(float, annotation["bbox"])
    except (TypeError, ValueError):
        return False
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


def _remark(part: Part, names: list[str]) -> None:
    """Say what training will pass over without calling it a mistake."""
    remarks = []
    used = {a["image_id"] for a in part.content["annotations"]}
    empty = [image["file_name"] for image in part.content["images"] if image["id"] not in used]
    tiny = [image["file_name"] for image in part.content["images"] if min(image["width"], image["height"]) < 32]
    images = {image["id"]: image for image in part.content["images"]}
    bad = [a["id"] for a in part.content["annotations"] if not _fits(a, images[a["image_id"]])]
    absent = [name for i, name in enumerate(names) if i not in _count(part, names)]
    if part.name == "train" and empty:
        remarks.append(f"{len(empty)} images have no annotations and are not trained on: {some(empty)}")
    if part.name == "train" and tiny:
        remarks.append(f"{len(tiny)} images are smaller than 32 pixels and are not trained on: {some(tiny)}")
    if bad:
        remarks.append(f"{len(bad)} boxes have no size or reach out of the image, annotations {some(bad)}")
    if absent:
        remarks.append(f"{len(absent)} classes have no annotation: {some(absent)}")
    for remark in remarks:
        print_log(f"{part.name}: {remark}", logger="current", level=logging.WARNING)
