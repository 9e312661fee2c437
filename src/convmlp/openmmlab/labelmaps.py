"""Data sets of images and label maps: where their parts are, which classes they have, what is wrong with them.

A label map is a picture of one channel whose pixels are class numbers; 255 means that a pixel is left out.
"""

import inspect
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.logging import print_log
from mmseg.registry import DATASETS
from PIL import Image

from ..common.errors import RunError
from .datasets import (
    IMAGE_SUFFIXES,
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

IGNORED = 255
SPLITS = {"train": ("training", "train"), "val": ("validation", "val", "valid")}
PLACES = (
    ("images/{}", "annotations/{}"),
    ("images/{}", "labels/{}"),
    ("images/{}", "masks/{}"),
    ("{}/images", "{}/annotations"),
    ("{}/images", "{}/labels"),
    ("{}/images", "{}/masks"),
)
TREE = """
  DATA/images/training/NAME.jpg           (or images/train/)
  DATA/images/validation/NAME.jpg         (or images/val/)
  DATA/annotations/training/NAME.png      (or labels/, masks/)
  DATA/annotations/validation/NAME.png
  DATA/classes.txt                        names in the order of their numbers, for other classes than the config's"""
CLASSES = "classes.txt"
SINGLE_CHANNEL = ("L", "P", "1")
SAMPLE = 500


@dataclass
class Part:
    """One part of a data set: its folders, and the stems of the files in them."""

    name: str
    images: Path
    labels: Path
    image_suffix: str
    label_suffix: str

    @property
    def image_stems(self) -> list[str]:
        return _stems(self.images, self.image_suffix)

    @property
    def label_stems(self) -> list[str]:
        return _stems(self.labels, self.label_suffix)


@dataclass
class LabelMap:
    """What the check reads off a label map: pixels by value, or what is wrong with it."""

    counts: np.ndarray
    problem: str = ""


def prepare(cfg: Config, request: Request) -> str:
    """Point the config at the files and classes of its data set and check them.

    Returns:
        A table of the pixels of each class, or '' if nothing was to be checked.

    Raises:
        RunError: what is missing or wrong, one line each.
    """
    if request.classes == "config" and request.check == "none":
        return ""
    parts = []
    for name, dataset, datasets in needed_datasets(cfg, request, _is_folder, "single folder of label maps"):
        part = _find(dataset, name)
        parts.append(part)
        suffixes = dict(img_suffix=part.image_suffix, seg_map_suffix=part.label_suffix)
        for each in datasets.values():
            each["data_prefix"] = dict(img_path=str(part.images.resolve()), seg_map_path=str(part.labels.resolve()))
            each.update({key: value for key, value in suffixes.items() if value != _setting(each, key)})

    names = _choose_classes(cfg, request)
    if request.check == "none":
        return ""
    reduce_zero_label = _setting(next(iter(leaf_datasets(cfg).values())), "reduce_zero_label")
    problems: list[str] = []
    counts = {}
    everything = True
    for part in parts:
        stems = sorted({*part.label_stems} & {*part.image_stems})
        step = 1 if request.check == "all" else -(-len(stems) // SAMPLE)
        everything = everything and step <= 1
        chosen = stems[:: max(step, 1)]
        found, wrong = _examine(part, chosen, len(names), reduce_zero_label, request.check == "all")
        counts[part.name] = found
        problems += _pairs(part) + wrong
    complain(problems or (missing_in_training(names, counts) if everything else []))
    for name, found in counts.items():
        absent = [label for i, label in enumerate(names) if not found.get(i)]
        if absent and everything:
            print_log(f"{name}: {len(absent)} classes never occur: {some(absent)}", "current", logging.WARNING)
    if not everything:
        print_log(f"looked into {SAMPLE} label maps or fewer of each part; --check-data looks into all", "current")
    return class_table(names, counts, "pixels")


def _is_folder(dataset: dict[str, Any]) -> bool:
    return not dataset.get("ann_file") and "seg_map_path" in dataset.get("data_prefix", {})


def _find(dataset: dict[str, Any], name: str) -> Part:
    """Find images and label maps of a part, in the places of the config, else in the usual ones."""
    root = Path(dataset.get("data_root") or "")
    prefix = dataset["data_prefix"]
    candidates = [(root / prefix["img_path"], root / prefix["seg_map_path"])]
    candidates += [(root / a.format(split), root / b.format(split)) for split in SPLITS[name] for a, b in PLACES]
    for images, labels in candidates:
        if images.is_dir() and labels.is_dir():
            break
    else:
        nested = next((path.parent.parent for path in root.glob("*/images/training")), None)
        hint = f"\n  The folder {nested} looks like it: give that as DATA" if nested else ""
        raise RunError(f"there are no images and label maps for {name} in {root.resolve()}; expected is{TREE}{hint}")
    image_suffix = _suffix(images, _setting(dataset, "img_suffix"))
    return Part(name, images, labels, image_suffix, _suffix(labels, _setting(dataset, "seg_map_suffix")))


def _setting(dataset: dict[str, Any], name: str) -> Any:
    """What a data set is given as an argument, else the default of its class, or of the one that this builds on."""
    if name in dataset:
        return dataset[name]
    signatures = (inspect.signature(each).parameters for each in DATASETS.get(dataset["type"]).__mro__)
    return next(parameters[name].default for parameters in signatures if name in parameters)


def _suffix(folder: Path, expected: str) -> str:
    """The ending of the files in a folder: the expected one if a file has it, else the commonest."""
    names = [path.name for path in _files(folder)]
    if any(name.endswith(expected) for name in names):
        others = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.endswith(expected)]
        if others:
            print_log(
                f"{folder}: {len(others)} files do not end in {expected}: {some(others)}", "current", logging.WARNING
            )
        return expected
    endings = Counter(Path(name).suffix for name in names if name.lower().endswith(IMAGE_SUFFIXES))
    if not endings:
        raise RunError(f"{folder} holds no pictures ({', '.join(IMAGE_SUFFIXES)})")
    return endings.most_common(1)[0][0]


def _stems(folder: Path, suffix: str) -> list[str]:
    return sorted(
        str(path.relative_to(folder))[: -len(suffix)] for path in _files(folder) if path.name.endswith(suffix)
    )


def _files(folder: Path) -> list[Path]:
    """All files in a folder and below, as mmengine finds them: through links, without hidden ones."""
    walk = os.walk(folder, followlinks=True)
    return [Path(place, name) for place, _, names in walk for name in names if not name.startswith(".")]


def _choose_classes(cfg: Config, request: Request) -> list[str]:
    """The class names of the run, in the order of their numbers."""
    dataset = next(iter(leaf_datasets(cfg).values()))
    own = (dataset.get("metainfo") or {}).get("classes") or DATASETS.get(dataset.type).METAINFO.get("classes")
    source = None
    if request.classes == "auto":
        file = Path(dataset.get("data_root") or "") / CLASSES
        source = file if file.is_file() else None
    elif request.classes != "config":
        source = Path(request.classes)
    if source is None and not own:
        raise RunError("the config names no classes: give --classes FILE, or put classes.txt into the data folder")
    names = list(own) if source is None else read_names(source)
    if len(names) > IGNORED:
        raise RunError(f"label maps have room for {IGNORED} classes, {source} names {len(names)}")
    if source is None and request.classes == "auto":
        print_log(
            f"no {CLASSES} in the data folder: its label maps are taken for the config's {len(names)} classes, "
            f"{some(names)}",
            logger="current",
        )
    if names == list(own or []) and not request.reduce_zero_label:
        set_classes(cfg, names)
        return names
    for each in leaf_datasets(cfg).values():
        each.update({key: _setting(each, key) for key in ("img_suffix", "seg_map_suffix")}, type="BaseSegDataset")
        for step in each.pipeline:
            if step["type"] == "LoadAnnotations":
                step.pop("reduce_zero_label", None)
    set_classes(cfg, names, reduce_zero_label=request.reduce_zero_label)
    meaning = "0 is left out and 1" if request.reduce_zero_label else "0"
    print_log(
        f"{len(names)} classes from {source or 'the config'} in place of the config's {len(own or [])} "
        f"(label {meaning} is the first): {some(names, 20)}",
        logger="current",
    )
    return names


def _pairs(part: Part) -> list[str]:
    """Complaints about images without label maps and the other way round."""
    problems = []
    images, labels = {*part.image_stems}, {*part.label_stems}
    lonely = sorted(images - labels)
    if lonely:
        problems.append(f"{part.name}: {len(lonely)} images have no label map in {part.labels}: {some(lonely)}")
    lonely = sorted(labels - images)
    if lonely:
        problems.append(f"{part.name}: {len(lonely)} label maps have no image in {part.images}: {some(lonely)}")
    return problems


def _examine(
    part: Part, stems: list[str], classes: int, reduce_zero_label: bool, decode: bool
) -> tuple[dict[int, int], list[str]]:
    """Pixels of each class in the label maps, and complaints about them; with `decode` the images are read whole."""

    def look(stem: str) -> LabelMap:
        image = part.images / f"{stem}{part.image_suffix}"
        return _read_label_map(part.labels / f"{stem}{part.label_suffix}", image, decode)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        maps = dict(zip(stems, pool.map(look, stems), strict=True))
    problems = []
    wrong = Counter(each.problem for each in maps.values() if each.problem)
    for problem, count in wrong.items():
        names = [f"{stem}{part.label_suffix}" for stem, each in maps.items() if each.problem == problem]
        problems.append(f"{part.name}: {count} label maps {problem}: {some(names)} (in {part.labels})")
    total = sum((each.counts for each in maps.values()), np.zeros(256, dtype=np.int64))
    values = [value for value in np.flatnonzero(total).tolist() if value != IGNORED]
    first = 1 if reduce_zero_label else 0
    last = classes - 1 + first
    outside = [value for value in values if value > last]
    if outside:
        names = [stem for stem, each in maps.items() if each.counts[outside].any()]
        problems.append(
            f"{part.name}: label values {some(outside, 10)} are outside of the {classes} classes ({first} to {last}) "
            f"and not {IGNORED}, in {len(names)} label maps: {some(names)} (in {part.labels})"
        )
    elif not wrong and stems and not any(value >= first for value in values):
        problems.append(f"{part.name}: no pixel of the label maps in {part.labels} belongs to a class")
    elif not wrong and values == [0] and total[IGNORED] and classes > 1:
        problems.append(
            f"{part.name}: the label maps in {part.labels} hold nothing but 0 and {IGNORED}; {IGNORED} means left "
            "out, so a mask of 0 and 255 must become 0 and 1"
        )
    return {value - first: int(total[value]) for value in values if first <= value <= last}, problems


def _read_label_map(path: Path, image: Path, decode: bool) -> LabelMap:
    nothing = np.zeros(256, dtype=np.int64)
    size = picture_size(image, decode)
    if size is None:
        return LabelMap(nothing, "belong to images that cannot be read")
    try:
        with Image.open(path) as picture:
            if picture.size != size:
                return LabelMap(nothing, "differ in size from their image")
            if min(size) == 1:  # mmseg squeezes the side away
                return LabelMap(nothing, "are a single pixel wide or high; two are needed")
            if picture.mode.startswith("I"):
                return LabelMap(nothing, "have 16 bits or more; 8 are needed")
            if picture.mode not in SINGLE_CHANNEL:
                return LabelMap(
                    nothing, f"have several channels (mode {picture.mode}); one channel of class numbers is needed"
                )
            return LabelMap(np.bincount(np.asarray(picture, dtype=np.uint8).reshape(-1), minlength=256))
    except Exception:  # Pillow's plugins raise whatever their formats provoke
        return LabelMap(nothing, "cannot be read")
