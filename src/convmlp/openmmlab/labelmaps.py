"""Data sets of images and label maps: where their parts are, which classes they have, what is wrong with them.

A label map is an image of one channel whose pixels are class numbers; 255 means that a pixel is left out.
"""

import inspect
import logging
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmseg.registry import DATASETS
from PIL import Image

from ..common.classes import SPLITS, read_class_names
from ..common.errors import RunError, plural, some
from .datasets import DataCheck, image_size, in_threads, leaf_datasets

IGNORED = 255
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
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


@dataclass
class Part:
    """One part of a data set: its folders, and how the files in them end."""

    images: Path
    labels: Path
    image_suffix: str
    label_suffix: str

    @cached_property
    def image_stems(self) -> set[str]:
        return _stems(self.images, self.image_suffix)

    @cached_property
    def label_stems(self) -> set[str]:
        return _stems(self.labels, self.label_suffix)


class Check(DataCheck[Part]):
    """The check of label maps, see `datasets.adapt_to_data`."""

    kind, unit, registry = "single folder of label maps", "pixels", DATASETS

    def fits(self, dataset: ConfigDict) -> bool:
        return not dataset.get("ann_file") and "seg_map_path" in dataset.get("data_prefix", {})

    def find(self, name: str, dataset: ConfigDict) -> Part:
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
            raise RunError(
                f"there are no images and label maps for {name} in {root.resolve()}; expected is{TREE}{hint}"
            )
        suffixes = (
            _suffix(images, _setting(dataset, "img_suffix")),
            _suffix(labels, _setting(dataset, "seg_map_suffix")),
        )
        return Part(images, labels, *suffixes)

    def point(self, loader: str, dataset: ConfigDict, part: Part) -> None:
        dataset["data_prefix"] = dict(img_path=str(part.images.resolve()), seg_map_path=str(part.labels.resolve()))
        suffixes = dict(img_suffix=part.image_suffix, seg_map_suffix=part.label_suffix)
        dataset.update({key: value for key, value in suffixes.items() if value != _setting(dataset, key)})

    def choose_classes(self) -> list[str]:
        """From a file of names, else from the config."""
        request, own, source = self.request, self.own_classes, self._names_file()
        if source is None and not own:
            raise RunError("the config names no classes: give --classes FILE, or put classes.txt into the data folder")
        names = own if source is None else read_class_names(source)
        if len(names) > IGNORED:
            raise RunError(f"label maps have room for {IGNORED} classes, {source} names {len(names)}")
        if source is None and request.classes == "auto":
            meaning = f"its label maps are taken for the config's {plural(len(names), 'class')}, {some(names)}"
            print_log(f"no {CLASSES} in the data folder: {meaning}", "current")
        if names == own and not request.reduce_zero_label:
            self.set_classes(names)
            return names
        for each in leaf_datasets(self.cfg).values():
            each.update({key: _setting(each, key) for key in ("img_suffix", "seg_map_suffix")}, type="BaseSegDataset")
            for step in each.pipeline:
                if step["type"] == "LoadAnnotations":
                    step.pop("reduce_zero_label", None)
        self.set_classes(names, reduce_zero_label=request.reduce_zero_label)
        first = "0 is left out and 1" if request.reduce_zero_label else "0"
        change = f"{plural(len(names), 'class')} from {source or 'the config'} in place of the config's {len(own)}"
        print_log(f"{change} (label {first} is the first): {some(names, 20)}", "current")
        return names

    def _names_file(self) -> Path | None:
        if self.request.classes == "config":
            return None
        if self.request.classes != "auto":
            return Path(self.request.classes)
        file = Path(next(iter(leaf_datasets(self.cfg).values())).get("data_root") or "") / CLASSES
        return file if file.is_file() else None

    def examine(self, name: str, part: Part, classes: list[str]) -> tuple[dict[int, int], list[str]]:
        images, labels = part.image_stems, part.label_stems
        problems = [
            f"{plural(len(stems), noun)} {what}: {some(sorted(stems))}"
            for noun, what, stems in (
                ("image", f"without a label map in {part.labels}", images - labels),
                ("label map", f"without an image in {part.images}", labels - images),
            )
            if stems
        ]
        pairs = sorted(images & labels)
        chosen = self.sample(pairs)
        self.complete = self.complete and len(chosen) == len(pairs)
        found = in_threads(lambda stem: _look(part, stem, decode=self.request.check == "all"), chosen)
        wrong = {stem: each for stem, each in found.items() if isinstance(each, str)}
        for problem, count in Counter(wrong.values()).items():
            names = [f"{stem}{part.label_suffix}" for stem, each in wrong.items() if each == problem]
            problems.append(f"{plural(count, 'label map')} {problem}: {some(names)} (in {part.labels})")
        pixels = {stem: each for stem, each in found.items() if stem not in wrong}
        counts, more = self._count(part, pixels, len(classes), bool(wrong))
        return counts, [f"{name}: {problem}" for problem in problems + more]

    def _count(
        self, part: Part, pixels: dict[str, np.ndarray], classes: int, spoiled: bool
    ) -> tuple[dict[int, int], list[str]]:
        """Pixels of each class, and what is wrong with their values; of spoiled maps nothing is said of all."""
        total = sum(pixels.values(), np.zeros(256, dtype=np.int64))
        values = [value for value in np.flatnonzero(total).tolist() if value != IGNORED]
        first = int(bool(_setting(next(iter(leaf_datasets(self.cfg).values())), "reduce_zero_label")))
        last = classes - 1 + first
        outside = [value for value in values if value > last]
        problems = []
        if outside:
            names = [stem for stem, counts in pixels.items() if counts[outside].any()]
            problems.append(
                f"label values {some(outside, 10)} are outside of the {plural(classes, 'class')} ({first} to {last}) "
                f"and not {IGNORED}, in {plural(len(names), 'label map')}: {some(names)} (in {part.labels})"
            )
        elif pixels and not spoiled and not any(value >= first for value in values):
            problems.append(f"no pixel of the label maps in {part.labels} belongs to a class")
        elif not spoiled and values == [0] and total[IGNORED] and classes > 1:
            problems.append(
                f"the label maps in {part.labels} hold nothing but 0 and {IGNORED}; {IGNORED} means left out, so a "
                "mask of 0 and 255 must become 0 and 1"
            )
        return {value - first: int(total[value]) for value in values if first <= value <= last}, problems


def _setting(dataset: dict[str, Any], name: str) -> Any:
    """What a data set is given as an argument, else the default of its class, or of the one that this builds on."""
    if name in dataset:
        return dataset[name]
    signatures = (inspect.signature(each).parameters for each in DATASETS.get(dataset["type"]).__mro__)
    return next(parameters[name].default for parameters in signatures if name in parameters)


def _suffix(folder: Path, expected: str) -> str:
    """The ending of the files in a folder: the expected one if a file has it, else the commonest."""
    names = [name for name in _files(folder) if name.lower().endswith(SUFFIXES) or name.endswith(expected)]
    others = [name for name in names if not name.endswith(expected)]
    if len(others) < len(names):
        if others:
            message = f"{folder}: {plural(len(others), 'file')} with another ending than {expected}: {some(others)}"
            print_log(message, "current", logging.WARNING)
        return expected
    if not others:
        raise RunError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return Counter(Path(name).suffix for name in others).most_common(1)[0][0]


def _stems(folder: Path, suffix: str) -> set[str]:
    return {name.removesuffix(suffix) for name in _files(folder) if name.endswith(suffix)}


def _files(folder: Path) -> list[str]:
    """All files in a folder and below, as mmengine finds them: through links, without hidden ones."""
    walk = os.walk(folder, followlinks=True)
    paths = (os.path.join(place, name) for place, _, names in walk for name in names if not name.startswith("."))
    return [os.path.relpath(path, folder) for path in paths]


def _look(part: Part, stem: str, decode: bool) -> np.ndarray | str:
    """Pixels of a label map by value, or what is wrong with it; with `decode` its image is read whole."""
    size = image_size(part.images / f"{stem}{part.image_suffix}", decode)
    if size is None:
        return "of images that cannot be read"
    try:
        with Image.open(part.labels / f"{stem}{part.label_suffix}") as image:
            if image.size != size:
                return "of another size than the image"
            if min(size) == 1:  # mmseg squeezes the side away
                return "a single pixel wide or high; two are needed"
            if image.mode.startswith("I"):
                return "of 16 bits or more; 8 are needed"
            if image.mode not in SINGLE_CHANNEL:
                return f"of several channels (mode {image.mode}); one channel of class numbers is needed"
            return np.bincount(np.asarray(image, dtype=np.uint8).reshape(-1), minlength=256)
    except Exception:  # Pillow's plugins raise whatever their formats provoke
        return "that cannot be read"
