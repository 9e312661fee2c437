"""Data sets of detection and segmentation: their place in a config, their classes, and the check before a run."""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import matplotlib
import mmcv
import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import Registry
from PIL import Image

from ..common.errors import RunError, plural, some
from .configs import leaf_datasets, set_num_classes

SAMPLE = 500  # files of each part that are opened, unless all are asked for
Colour = tuple[int, ...]  # red, green, blue


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


class Findings(NamedTuple):
    """How much there is of each class, by its number; what keeps a part from being trained on; what is passed over."""

    counts: dict[int, int]
    problems: list[str]
    remarks: list[str]


class DataCheck(ABC):
    """What is done with a data set before a run; `coco` and `labelmaps` know its two kinds.

    A part, train or val, is what `find` returns.
    """

    kind: ClassVar[str]  # for messages
    unit: ClassVar[str]  # what is counted
    registry: ClassVar[Registry]  # of the library's data sets

    def __init__(self, cfg: Config, request: Request):
        self.cfg = cfg
        self.request = request
        self.parts: dict[str, Any] = {}
        self.complete = True  # whether all was counted, not only a sample

    @abstractmethod
    def fits(self, dataset: ConfigDict) -> bool:
        """Whether a data set of the config is of this kind."""

    @abstractmethod
    def find(self, name: str, dataset: ConfigDict) -> Any:
        """Find the files of a part, in the places of the config, else in the usual ones."""

    @abstractmethod
    def point(self, loader: str, dataset: ConfigDict, part: Any) -> None:
        """Let a data set of the config, and what evaluates it, read these files."""

    @abstractmethod
    def choose_classes(self) -> list[str]:
        """The class names of the run, in the order of their numbers; the config gets them too."""

    @abstractmethod
    def examine(self, name: str, part: Any, classes: list[str]) -> Findings:
        """Look into the files of a part."""

    def run(self) -> str:
        """See `adapt_to_data`."""
        if self.request.classes == "config" and self.request.check == "none":
            return ""
        for name, loader in self.request.parts.items():
            if self.cfg.get(loader) is not None:
                datasets = self._same_place(loader)
                self.parts[name] = self.find(name, datasets[loader])
                for place, dataset in datasets.items():
                    self.point(place, dataset, self.parts[name])
        classes = self.choose_classes()
        if self.request.check == "none":
            return ""
        found = {name: self.examine(name, part, classes) for name, part in self.parts.items()}
        problems = [problem for each in found.values() for problem in each.problems]
        absent = {name: [i for i, _ in enumerate(classes) if not each.counts.get(i)] for name, each in found.items()}
        if self.complete and not problems and len(found) == 2:
            unseen = [classes[i] for i in absent["train"] if i not in absent["val"]]
            problems = [f"classes that val has and train does not have: {some(unseen)}"] if unseen else []
        if problems:
            raise RunError(
                "the data set cannot be trained on as it is:"
                + "".join(f"\n  - {problem}" for problem in problems)
                + "\n  (--skip-data-check starts all the same)"
            )
        for name, each in found.items():
            missing = [classes[i] for i in absent[name]] if self.complete else []
            for remark in [*each.remarks, *counted("class", f"without {self.unit}", missing)]:
                print_log(f"{name}: {remark}", "current", logging.WARNING)
        if not self.complete:
            print_log(f"looked into {SAMPLE} files or fewer of each part; --check-data looks into all", "current")
        return _class_table(classes, {name: each.counts for name, each in found.items()}, self.unit)

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
        return items if self.request.check == "all" else items[:: max(1, -(-len(items) // SAMPLE))]

    @property
    def dataset(self) -> ConfigDict:
        """That of the config which is asked for its classes and settings: of training, or of the test."""
        return leaf_datasets(self.cfg)[next(iter(self.request.parts.values()))]

    @property
    def own_classes(self) -> list[str]:
        """The classes of the config."""
        standard = self.registry.get(self.dataset.type).METAINFO
        return list((self.dataset.get("metainfo") or {}).get("classes") or standard.get("classes") or [])


def counted(noun: str, what: str, entries: Sequence[object], place: Path | None = None) -> list[str]:
    """A message such as '2 images that cannot be read: a.jpg, b.jpg (in PLACE)', or none without entries."""
    where = f" (in {place})" if place else ""
    return [f"{plural(len(entries), noun)} {what}: {some(entries)}{where}"] if entries else []


def in_threads(look: Callable[[Any], Any], items: Iterable[Any]) -> dict[Any, Any]:
    """What `look` returns, by item; for files, whose reading is mostly waiting."""
    items = list(items)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(items, pool.map(look, items), strict=True))


def image_size(path: Path, decode: bool) -> tuple[int, int] | None:
    """Width and height of an image, None if it cannot be read; the whole of it with `decode`, as in training."""
    try:
        with Image.open(path) as image:
            size = image.size
        return None if decode and mmcv.imread(path) is None else size
    except Exception:  # Pillow's plugins and OpenCV raise whatever their formats provoke
        return None


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
    width = max(len("class"), *map(len, names))
    rows: list[tuple[Any, ...]] = [("class", *(f"{part} {unit}" for part in counts))]
    rows += [(name, *(count.get(i, 0) for count in counts.values())) for i, name in enumerate(names)]
    return "\n".join(f"{name:{width}}" + "".join(f"  {value:>16}" for value in values) for name, *values in rows)
