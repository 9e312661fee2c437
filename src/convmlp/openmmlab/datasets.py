"""Data sets of detection and segmentation: their place in a config, their classes, and the check before a run."""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import matplotlib
import mmcv
import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import Registry
from PIL import Image

from ..common.errors import RunError, plural, some

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
SAMPLE = 500  # files of each part that are opened, unless all are asked for
Colour = tuple[int, ...]  # red, green, blue
Part = TypeVar("Part")


@dataclass(frozen=True)
class Request:
    """What the command line asks of the data: see --classes, --reduce-zero-label, --check-data, --skip-data-check."""

    classes: str = "auto"
    reduce_zero_label: bool = False
    testing: bool = False
    check: str = "sample"  # "all", "sample" or "none"

    @property
    def parts(self) -> dict[str, str]:
        """The parts of the data set that are needed, with the loaders that read them."""
        return {"val": "test_dataloader"} if self.testing else {"train": "train_dataloader", "val": "val_dataloader"}


def adapt_to_data(cfg: Config, request: Request) -> str:
    """Point a config at the files and classes of its data set, and check them.

    Returns:
        A table of the boxes or pixels of each class, or '' if nothing was to be checked.

    Raises:
        RunError: what is missing or wrong, one line each.
    """
    kind = "labelmaps" if cfg.get("default_scope") == "mmseg" else "coco"  # which import mmseg or mmdet
    return import_module(f".{kind}", __package__).Check(cfg, request).run()


class DataCheck(ABC, Generic[Part]):
    """What is done with a data set before a run; `coco` and `labelmaps` know its two kinds.

    A part, train or val, is what `find` returns.
    """

    kind: ClassVar[str]  # for messages
    unit: ClassVar[str]  # what is counted
    registry: ClassVar[Registry]  # of the library's data sets

    def __init__(self, cfg: Config, request: Request):
        self.cfg = cfg
        self.request = request
        self.parts: dict[str, Part] = {}
        self.complete = True  # whether all was counted, not only a sample

    @abstractmethod
    def fits(self, dataset: ConfigDict) -> bool:
        """Whether a data set of the config is of this kind."""

    @abstractmethod
    def find(self, name: str, dataset: ConfigDict) -> Part:
        """Find the files of a part, in the places of the config, else in the usual ones."""

    @abstractmethod
    def point(self, loader: str, dataset: ConfigDict, part: Part) -> None:
        """Let a data set of the config, and what evaluates it, read these files."""

    @abstractmethod
    def choose_classes(self) -> list[str]:
        """The class names of the run, in the order of their numbers; the config gets them too."""

    @abstractmethod
    def examine(self, name: str, part: Part, classes: list[str]) -> tuple[dict[int, int], list[str]]:
        """How much there is of each class, by its number, and what keeps the part from being trained on."""

    def compare(self, classes: list[str]) -> list[str]:
        """What keeps the parts from being used together."""
        return []

    def remark(self, name: str, part: Part, classes: list[str]) -> list[str]:
        """What training will pass over without an error."""
        return []

    def run(self) -> str:
        """See `adapt_to_data`."""
        if self.request.classes == "config" and self.request.check == "none":
            return ""
        for name, loader in self.request.parts.items():
            if self.cfg.get(loader) is not None:
                datasets = self._same_place(loader)
                part = self.parts[name] = self.find(name, datasets[loader])
                for each, dataset in datasets.items():
                    self.point(each, dataset, part)
        classes = self.choose_classes()
        if self.request.check == "none":
            return ""
        found = {name: self.examine(name, part, classes) for name, part in self.parts.items()}
        counts = {name: count for name, (count, _) in found.items()}
        problems = [problem for _, problems in found.values() for problem in problems] + self.compare(classes)
        _refuse(problems or (_missing_in_training(classes, counts) if self.complete else []))
        for name, part in self.parts.items():
            absent = [label for i, label in enumerate(classes) if not counts[name].get(i)]
            remarks = self.remark(name, part, classes)
            if absent and self.complete:
                remarks.append(f"{plural(len(absent), 'class')} without {self.unit}: {some(absent)}")
            for remark in remarks:
                print_log(f"{name}: {remark}", "current", logging.WARNING)
        if not self.complete:
            print_log(f"looked into {SAMPLE} files or fewer of each part; --check-data looks into all", "current")
        return _class_table(classes, counts, self.unit)

    def _same_place(self, loader: str) -> dict[str, ConfigDict]:
        """By loader the data set of this one, and others that read the same files: test is mostly val once more."""
        datasets = leaf_datasets(self.cfg)
        if loader not in datasets or not self.fits(datasets[loader]):
            raise RunError(
                f"{loader} of {self.cfg.filename} is not a {self.kind}, so its data cannot be checked, nor its classes "
                "read; --classes config --skip-data-check runs the config as it is"
            )

        def place(name: str) -> list[Any]:
            return [datasets[name].get(key) for key in ("type", "data_root", "ann_file", "data_prefix")]

        return {name: dataset for name, dataset in datasets.items() if place(name) == place(loader)}

    def set_classes(self, names: Sequence[str], **settings: Any) -> None:
        """Give every data set of the config these classes and settings, and every head of its model their number."""
        for dataset in leaf_datasets(self.cfg).values():
            meta = dict(dataset.get("metainfo") or {})
            if list(names) != list(self.registry.get(dataset.type).METAINFO.get("classes") or ()):
                meta["palette"] = choose_palette([meta], names)
            dataset.update(metainfo={**meta, "classes": tuple(names)}, **settings)
        set_num_classes(self.cfg.model, len(names))

    def sample(self, items: Sequence[Any]) -> Sequence[Any]:
        """Those to look into: all, or some from all over."""
        step = 1 if self.request.check == "all" else -(-len(items) // SAMPLE)
        return items[:: max(1, step)]

    @property
    def own_classes(self) -> list[str]:
        """The classes of the config."""
        dataset = next(iter(leaf_datasets(self.cfg).values()))
        standard = self.registry.get(dataset.type).METAINFO
        return list((dataset.get("metainfo") or {}).get("classes") or standard.get("classes") or [])


def in_threads(look: Callable[[Any], Any], items: Iterable[Any]) -> dict[Any, Any]:
    """What `look` returns, by item; for files, whose reading is mostly waiting."""
    items = list(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(items, pool.map(look, items), strict=True))


def leaf_datasets(cfg: Config) -> dict[str, ConfigDict]:
    """The data set of each loader, out of wrappers such as RepeatDataset.

    A loader of several data sets (ConcatDataset) is left out: nothing here can follow it.
    """
    found = {}
    for loader in LOADERS:
        dataset = (cfg.get(loader) or {}).get("dataset")
        while dataset is not None and "dataset" in dataset:
            dataset = dataset.dataset
        if dataset is not None and "datasets" not in dataset:
            found[loader] = dataset
    return found


def replace_root(cfg: Config, root: str) -> None:
    """Put `root` in the place of every data_root of the config, wherever a path starts with it.

    Raises:
        RunError: the config names no data_root, or there is no folder `root`.
    """
    if not Path(root).is_dir():
        raise RunError(f"no such data folder: {root}")
    roots = {cfg.get("data_root"), *(dataset.get("data_root") for dataset in leaf_datasets(cfg).values())}
    olds = sorted((old.rstrip("/") for old in roots if old), key=len, reverse=True)
    if not olds:
        raise RunError(f"{cfg.filename} names no data_root that DATA could replace")
    new = Path(root)

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(replaced(item) for item in value)
        if isinstance(value, str):
            for old in olds:
                if value.rstrip("/") == old:
                    return str(new)
                if value.startswith(old + "/"):
                    return str(new / value[len(old) + 1 :])
        return value

    for key in cfg:
        cfg[key] = replaced(cfg[key])


def image_size(path: Path, decode: bool) -> tuple[int, int] | None:
    """Width and height of an image, None if it cannot be read; the whole of it with `decode`, as in training."""
    try:
        with Image.open(path) as image:
            size = image.size
        return None if decode and mmcv.imread(path) is None else size
    except Exception:  # Pillow's plugins and OpenCV raise whatever their formats provoke
        return None


def set_num_classes(model: Any, number: int) -> None:
    """Give every head of a model in a config this number of classes.

    Raises:
        RunError: a loss weighs another number of classes.
    """
    if isinstance(model, dict):
        for key, value in model.items():
            if key == "num_classes" and not str(model.get("type")).endswith("RPNHead"):
                model[key] = number
            elif key == "class_weight" and isinstance(value, (list, tuple)):
                if len(value) not in (number, number + 1):  # the one more is for the background
                    raise RunError(f"class_weight of a loss in the config has {len(value)} values for {number} classes")
            else:
                set_num_classes(value, number)
    elif isinstance(model, (list, tuple)):
        for item in model:
            set_num_classes(item, number)


def choose_palette(metas: Iterable[Mapping[str, Any]], names: Sequence[str]) -> list[Colour]:
    """A colour for each class: those that belong to the names in a data set's meta information, else tab20's.

    For more classes than those the colours are mmseg's random ones, which it gives to all data sets without a palette;
    of a few classes some would be hard to tell apart.
    """
    number = len(names)
    random = np.random.RandomState(42).randint(0, 255, (number, 3)).tolist()
    for meta in metas:
        palette = [list(colour) for colour in meta.get("palette") or ()]
        if list(meta.get("classes") or ()) == list(names) and len(palette) == number and palette != random:
            return [tuple(colour) for colour in palette]
    strong_first = [*range(0, 20, 2), *range(1, 20, 2)]
    table = random if number > 20 else (255 * np.asarray(matplotlib.colormaps["tab20"](strong_first))[:, :3]).round()
    colours = [tuple(int(value) for value in colour) for colour in table]
    return [(0, 0, 0) if name == "background" else colour for name, colour in zip(names, colours, strict=False)]


def _class_table(names: Sequence[str], counts: Mapping[str, Mapping[int, int]], unit: str) -> str:
    """Classes with what each part has of them, as aligned text."""
    width = max(len("class"), *(len(name) for name in names))
    lines = [f"{'class':{width}}" + "".join(f"  {f'{part} {unit}':>16}" for part in counts)]
    for i, name in enumerate(names):
        lines.append(f"{name:{width}}" + "".join(f"  {count.get(i, 0):>16}" for count in counts.values()))
    return "\n".join(lines)


def _missing_in_training(names: Sequence[str], counts: Mapping[str, Mapping[int, int]]) -> list[str]:
    """Classes that validation asks for and training never shows."""
    if "train" not in counts or "val" not in counts:
        return []
    unseen = [name for i, name in enumerate(names) if counts["val"].get(i, 0) and not counts["train"].get(i, 0)]
    return [f"classes that val has and train does not have: {some(unseen)}"] if unseen else []


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise RunError(f"the data set cannot be trained on as it is:{lines}\n  (--skip-data-check starts all the same)")
