"""Data sets of images and label maps: where their parts are, which classes they have, what is wrong with them.

A label map is an image of one channel whose pixels are class numbers; 255 means that a pixel is left out.
"""

import inspect
import logging
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import ConfigDict
from mmengine.fileio import list_dir_or_file
from mmengine.logging import print_log
from mmseg.registry import DATASETS
from PIL import Image

from ..common.classes import SPLITS, read_class_names
from ..common.errors import RunError, plural, some
from .configs import leaf_datasets
from .datasets import DataCheck, Findings, counted, image_size, in_threads

IGNORED = 255
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
LABELS = ("annotations", "labels", "masks")
LAYOUTS = ("{kind}/{split}", "{split}/{kind}")
TREE = """
  DATA/images/training/NAME.jpg           (or images/train/)
  DATA/images/validation/NAME.jpg         (or images/val/)
  DATA/annotations/training/NAME.png      (or labels/, masks/)
  DATA/annotations/validation/NAME.png
  DATA/classes.txt                        names in the order of their numbers, for other classes than the config's"""
CLASSES = "classes.txt"
SINGLE_CHANNEL = ("L", "P", "1")


@dataclass
class Files:
    """The images in a folder and below, with one suffix; `stems` are their paths without it."""

    folder: Path
    suffix: str
    stems: set[str]

    def path(self, stem: str) -> Path:
        return self.folder / f"{stem}{self.suffix}"


class Part(NamedTuple):
    """One part of a data set."""

    images: Files
    labels: Files


class Check(DataCheck):
    """The check of label maps, see `datasets.adapt_to_data`."""

    kind, unit, registry = "single folder of label maps", "pixels", DATASETS

    def fits(self, dataset: ConfigDict) -> bool:
        return not dataset.get("ann_file") and "seg_map_path" in dataset.get("data_prefix", {})

    def find(self, name: str, dataset: ConfigDict) -> Part:
        root = Path(dataset.get("data_root") or "")
        prefix = dataset["data_prefix"]
        candidates = [(root / prefix["img_path"], root / prefix["seg_map_path"])]
        candidates += [
            (root / layout.format(kind="images", split=split), root / layout.format(kind=kind, split=split))
            for split in SPLITS[name]
            for layout in LAYOUTS
            for kind in LABELS
        ]
        for images, labels in candidates:
            if images.is_dir() and labels.is_dir():
                break
        else:
            nested = next((path.parent.parent for path in root.glob("*/images/training")), None)
            hint = f"\n  The folder {nested} looks like it: give that as DATA" if nested else ""
            raise RunError(f"there are no images and label maps for {name} in {root.resolve()}; expected:{TREE}{hint}")
        img_suffix, map_suffix = _setting(dataset, "img_suffix"), _setting(dataset, "seg_map_suffix")
        return Part(_find_images(images, img_suffix), _find_images(labels, map_suffix))

    def point(self, loader: str, dataset: ConfigDict, part: Part) -> None:
        dataset["data_prefix"] = dict(
            img_path=str(part.images.folder.resolve()), seg_map_path=str(part.labels.folder.resolve())
        )
        suffixes = dict(img_suffix=part.images.suffix, seg_map_suffix=part.labels.suffix)
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
        file = Path(self.dataset.get("data_root") or "") / CLASSES
        return file if file.is_file() else None

    def examine(self, name: str, part: Part, classes: list[str]) -> Findings:
        images, labels = part.images, part.labels
        problems = counted("image", f"without a label map in {labels.folder}", sorted(images.stems - labels.stems))
        problems += counted("label map", f"without an image in {images.folder}", sorted(labels.stems - images.stems))
        pairs = sorted(images.stems & labels.stems)
        chosen = self.sample(pairs)
        self.complete = self.complete and len(chosen) == len(pairs)
        found = in_threads(lambda stem: _look(part, stem, decode=self.request.check == "all"), chosen)
        pixels = {stem: each for stem, each in found.items() if isinstance(each, np.ndarray)}
        wrong = defaultdict(list)
        for stem, each in found.items():
            if isinstance(each, str):
                wrong[each].append(f"{stem}{labels.suffix}")
        for problem, names in wrong.items():
            problems += counted("label map", problem, names, labels.folder)
        counts, of_values = self._count(labels.folder, pixels, len(classes), complete=len(pixels) == len(found))
        return Findings(counts, [f"{name}: {problem}" for problem in problems + of_values], [])

    def _count(
        self, folder: Path, pixels: dict[str, np.ndarray], classes: int, complete: bool
    ) -> tuple[dict[int, int], list[str]]:
        """Pixels of each class, and what is wrong with their values; of incomplete maps nothing is said of all."""
        total = sum(pixels.values(), np.zeros(256, dtype=np.int64))
        values = [value for value in np.flatnonzero(total).tolist() if value != IGNORED]
        first = int(bool(_setting(self.dataset, "reduce_zero_label")))
        last = classes - 1 + first
        outside = [value for value in values if value > last]
        problems = []
        if outside:
            names = [stem for stem, counts in pixels.items() if counts[outside].any()]
            problems.append(
                f"label values {some(outside, 10)} are outside of the {plural(classes, 'class')} ({first} to {last}) "
                f"and not {IGNORED}, in {plural(len(names), 'label map')}: {some(names)} (in {folder})"
            )
        elif complete and pixels and not any(value >= first for value in values):
            problems.append(f"no pixel of the label maps in {folder} belongs to a class")
        elif complete and values == [0] and total[IGNORED] and classes > 1:
            problems.append(
                f"the label maps in {folder} hold nothing but 0 and {IGNORED}; {IGNORED} means left out, so a "
                "mask of 0 and 255 must become 0 and 1"
            )
        return {value - first: int(total[value]) for value in values if first <= value <= last}, problems


def _setting(dataset: ConfigDict, name: str) -> Any:
    """What a data set is given as an argument, else the default of its class, or of the one that this builds on."""
    if name in dataset:
        return dataset[name]
    signatures = (inspect.signature(each).parameters for each in DATASETS.get(dataset["type"]).__mro__)
    return next(parameters[name].default for parameters in signatures if name in parameters)


def _find_images(folder: Path, expected: str) -> Files:
    """The images in a folder with the expected suffix if there are any, else with the commonest."""
    names = list(list_dir_or_file(folder, list_dir=False, recursive=True))  # as mmseg finds them
    others = [name for name in names if name.lower().endswith(SUFFIXES) and not name.endswith(expected)]
    if any(name.endswith(expected) for name in names):
        suffix = expected
        for message in counted("file", f"with another ending than {expected}", others):
            print_log(f"{folder}: {message}", "current", logging.WARNING)
    elif others:
        suffix = Counter(Path(name).suffix for name in others).most_common(1)[0][0]
    else:
        raise RunError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return Files(folder, suffix, {name.removesuffix(suffix) for name in names if name.endswith(suffix)})


def _look(part: Part, stem: str, decode: bool) -> np.ndarray | str:
    """Pixels of a label map by value, or what is wrong with it; with `decode` its image is read whole."""
    size = image_size(part.images.path(stem), decode)
    if size is None:
        return "of images that cannot be read"
    try:
        with Image.open(part.labels.path(stem)) as image:
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
