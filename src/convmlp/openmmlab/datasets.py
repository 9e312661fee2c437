"""What the data sets of detection and segmentation have in common: their place in a config, classes, complaints."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmcv
from mmengine.config import Config, ConfigDict
from PIL import Image

from ..common.errors import RunError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


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


def in_same_place(cfg: Config, loader: str) -> dict[str, ConfigDict]:
    """The data set of a loader, and others that read the same files: test is mostly val once more."""
    datasets = leaf_datasets(cfg)
    if loader not in datasets:
        return {}

    def place(name: str) -> list[Any]:
        return [datasets[name].get(key) for key in ("type", "data_root", "ann_file", "data_prefix")]

    return {name: dataset for name, dataset in datasets.items() if place(name) == place(loader)}


def needed_datasets(
    cfg: Config, request: Request, fits: Callable[[ConfigDict], bool], kind: str
) -> Iterator[tuple[str, ConfigDict, dict[str, ConfigDict]]]:
    """Part by part what is needed: its name, its data set, and by loader all data sets in the same place.

    Raises:
        RunError: a data set is not of the kind that can be checked and whose classes can be read.
    """
    for name, loader in request.parts.items():
        if cfg.get(loader) is None:
            continue
        datasets = in_same_place(cfg, loader)
        if not datasets or not fits(datasets[loader]):
            raise RunError(
                f"{loader} of {cfg.filename} is not a {kind}, so its data cannot be checked, nor its classes read; "
                "--classes config --skip-data-check runs the config as it is"
            )
        yield name, datasets[loader], datasets


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


def picture_size(path: Path, decode: bool) -> tuple[int, int] | None:
    """Width and height of a picture, None if it cannot be read; the whole of it with `decode`, as in training."""
    try:
        with Image.open(path) as picture:
            size = picture.size
        return None if decode and mmcv.imread(path) is None else size
    except Exception:  # Pillow's plugins and OpenCV raise whatever their formats provoke
        return None


def read_names(path: Path) -> list[str]:
    """Class names from a text file, one a line."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"cannot read the class names in {path}: {error}") from error
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise RunError(f"{path}: one class name a line is needed, without empty lines")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise RunError(f"{path} names {repeated[0]!r} more than once")
    return names


def set_classes(cfg: Config, names: Sequence[str], **settings: Any) -> None:
    """Give every data set of a config these classes, and every head of its model their number.

    Raises:
        RunError: a loss weighs another number of classes.
    """
    for dataset in leaf_datasets(cfg).values():
        meta = {**(dataset.get("metainfo") or {}), "classes": tuple(names)}
        if len(meta.get("palette") or names) != len(names):
            del meta["palette"]
        dataset.update(metainfo=meta, **settings)
    _set_num_classes(cfg.model, len(names))


def _set_num_classes(model: Any, number: int) -> None:
    if isinstance(model, dict):
        for key, value in model.items():
            if key == "num_classes" and not str(model.get("type")).endswith("RPNHead"):
                model[key] = number
            elif key == "class_weight" and isinstance(value, (list, tuple)):
                if len(value) not in (number, number + 1):  # the one more is for the background
                    raise RunError(f"class_weight of a loss in the config has {len(value)} values for {number} classes")
            else:
                _set_num_classes(value, number)
    elif isinstance(model, (list, tuple)):
        for item in model:
            _set_num_classes(item, number)


def some(names: Sequence[Any], limit: int = 3) -> str:
    """The first names of many: 'a, b, c and 7 more'."""
    listed = ", ".join(str(name) for name in names[:limit])
    return f"{listed} and {len(names) - limit} more" if len(names) > limit else listed


def class_table(names: Sequence[str], counts: Mapping[str, Mapping[int, int]], unit: str) -> str:
    """Classes with what each part has of them, as aligned text."""
    width = max(len("class"), *(len(name) for name in names))
    lines = [f"{'class':{width}}" + "".join(f"  {f'{part} {unit}':>16}" for part in counts)]
    for i, name in enumerate(names):
        lines.append(f"{name:{width}}" + "".join(f"  {count.get(i, 0):>16}" for count in counts.values()))
    return "\n".join(lines)


def missing_in_training(names: Sequence[str], counts: Mapping[str, Mapping[int, int]]) -> list[str]:
    """Complaints about classes that validation asks for and training never shows."""
    if "train" not in counts or "val" not in counts:
        return []
    unseen = [name for i, name in enumerate(names) if counts["val"].get(i, 0) and not counts["train"].get(i, 0)]
    return [f"classes that val has and train has not: {some(unseen)}"] if unseen else []


def complain(problems: Sequence[str]) -> None:
    """Raise the problems of a data set, one a line."""
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise RunError(f"the data set cannot be trained on as it is:{lines}\n  (--skip-data-check starts all the same)")
