"""Folders of images: which of them hold the training and the validation images, and what is in them."""

import logging
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from timm.data.readers import create_reader
from timm.utils.misc import natural_key

from ..common.classes import SPLITS
from ..common.errors import RunError, plural, some
from ..common.images import EXTENSIONS
from .settings import Data

_logger = logging.getLogger(__name__)

TABLES = (".csv", ".tsv", ".parquet")


class Item(NamedTuple):
    """An image file, its label, and its split: train or val, or nothing before the data is divided."""

    path: str
    label: str
    split: str = ""


def labels_of(item: Item, multi_label: bool) -> list[str]:
    """The labels of an image: one, or with `multi_label` as many as stand in its cell, such as cat;dog."""
    if not multi_label:
        return [item.label]
    return [label for part in re.split("[;|]", item.label) if (label := part.strip())]


def synonyms(split: str) -> list[str]:
    """The names under which a split may be found, its own first."""
    return list(dict.fromkeys([split, *(name for names in SPLITS.values() if split in names for name in names)]))


def natural_order(names: Iterable[str]) -> list[str]:
    """Names once each, 2 before 10, in an order that depends on them alone.

    timm's own key leaves names that differ in case alone, such as A and a, to chance.
    """
    return sorted(set(names), key=lambda name: (natural_key(name), name))


def real_path(path: str | Path) -> str:
    """The file that a path leads to, however it is named."""
    folder, name = os.path.split(path)
    joined = os.path.join(_real_folder(folder), name)
    return os.path.realpath(joined) if os.path.islink(joined) else joined


@lru_cache(maxsize=10_000)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def data_path(options: Data) -> Path:
    """DATA, which must be a folder or a table.

    Raises:
        RunError: it is missing, or another kind of file.
    """
    if not options.data_dir:
        raise RunError("no data folder: name it last on the command line, or data_dir in the config")
    path = Path(options.data_dir)
    if path.is_dir() or path.is_file() and path.suffix.lower() in TABLES:
        return path
    if not path.exists():
        raise RunError(f"no such data folder: {path}")
    kind = "an image" if path.suffix.lower() in EXTENSIONS else "neither a folder nor a table"
    raise RunError(f"DATA {path} is {kind}; it takes a folder of images, or a table of them ({', '.join(TABLES)})")


def find_split(root: Path, split: str) -> Path | None:
    """root/SPLIT or root/SPLIT.tar, also under the other usual names of the split."""
    candidates = [root / f"{name}{end}" for end in ("", ".tar") for name in synonyms(split)]
    return next((path for path in candidates if path.exists()), None)


def require_split(options: Data, split: str) -> Path:
    """The folder or tar file of a split, or a `RunError` that says what there is instead."""
    root = data_path(options)
    path = find_split(root, split)
    if path is None:
        found = some(sorted(p.name for p in root.iterdir()), 5) or "nothing"
        raise RunError(
            f"no {split} folder in {root} (it holds {found}); expected {root}/{split}/CLASS/IMAGE (see "
            f"--train-split and --val-split), {root}/CLASS/IMAGE, or as DATA a table with the columns path and label"
        )
    return path


def find_undivided(options: Data) -> Path | None:
    """What holds training and validation images together: a table, class folders, or a train folder without a val one.

    None where each split has its own folder or tar file, or where one was asked for that is not there.
    """
    root = data_path(options)
    if root.is_file():
        return root
    train, val = find_split(root, options.train_split), find_split(root, options.val_split)
    if val or options.val_split not in SPLITS["val"]:
        return None
    if train and train.is_file():
        return None
    if train and _has_folders(train):
        _logger.info(f"{root} has no validation folder: {train} is divided")
        return train
    # A class may be called train
    return root if options.train_split in SPLITS["train"] and _has_folders(root) else None


def _has_folders(folder: Path) -> bool:
    return any(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir())


def list_folder(root: Path, options: Data, class_names: list[str]) -> list[Item]:
    """The images below a folder in natural order, labelled by the names of their folders; hidden folders are skipped.

    Given names of classes, what is not in a folder of theirs is left out, and the log names the folders.

    Raises:
        RunError: there is no image; or, unless names are given, one lies outside of a class folder, or a class folder
            is empty or shares its name.
    """
    try:
        reader = create_reader("", str(root), input_key=";".join(EXTENSIONS))
    except (RuntimeError, OSError) as error:
        raise RunError(f"cannot read {root}: {error or type(error).__name__}") from error
    folders: dict[str, Path] = {}
    items = []
    for path, _ in reader.samples:
        folder = Path(path).relative_to(root).parent
        if any(part.startswith(".") for part in folder.parts):
            continue
        if not class_names and not folder.name:
            raise RunError(f"{root} holds images beside its class folders; expected {root}/CLASS/IMAGE")
        if not class_names and folders.setdefault(folder.name, folder) != folder:
            raise RunError(f"two class folders in {root} have one name: {folders[folder.name]} and {folder}")
        items.append(Item(path, folder.name))
    inside = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if class_names:
        left_out = [name for name in inside if name not in class_names]
        if left_out:
            folders_there = f"{plural(len(left_out), 'folder')} of {root}"
            _logger.warning(f"{options.class_map} lacks {folders_there}: {some(left_out, 5)}")
        return [item for item in items if item.label in class_names]
    filled = {folder.parts[0] for folder in folders.values()}
    empty = [name for name in inside if name not in filled]
    if empty:
        raise RunError(f"class folder {root / empty[0]} holds no images ({len(empty)} such); remove or fill it")
    return items
