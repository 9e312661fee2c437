"""Split of undivided images into training and validation, by their content; a run keeps it in split.csv."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from ..common.classes import SPLITS, read_class_names
from ..common.devices import count_cores
from ..common.errors import RunError, plural, some
from .folders import Item, data_path, find_undivided, labels_of, list_folder, natural_order, real_path, synonyms
from .settings import Data, Options
from .tables import check_files, read_table, write_table

_logger = logging.getLogger(__name__)

SPLIT = "split.csv"
PART = 16  # images that a thread takes at a time
TEST = "test"  # validates where a table names no other images for it

Input = TypeVar("Input")
Output = TypeVar("Output")


def divide(options: Options, kept: Path | None = None) -> list[Item] | None:
    """The images of DATA with their splits, where one folder or table holds both; else None.

    `kept` is the split.csv of a run that is continued or evaluated. It counts as long as it knows any of the images. An
    evaluation needs one split alone, and a table that itself names the splits is then taken at its word.

    Raises:
        RunError: something in DATA is missing or contradicts itself, or cannot be divided.
    """
    whole = None if options.dataset else find_undivided(options)
    if whole is None:
        if options.val_share != Data.val_share:
            _logger.info(f"--val-share {options.val_share} is not used: the data has a validation set")
        return None
    class_names = read_class_names(options.class_map) if options.class_map else []
    if options.multi_label and not whole.is_file():
        return None
    multi = options.multi_label
    items = read_table(whole, multi) if whole.is_file() else list_folder(whole, options, class_names)
    if class_names:
        items = _take_classes(items, options, class_names, whole)
    if whole.is_file() and options.eval and options.val_split == ".":
        items = [item._replace(split="val") for item in items]
    elif whole.is_file():
        items = _rename_splits(items, options, whole)
    if kept and kept.exists() and not (options.eval and items[0].split):
        items = _take_splits(items, kept, options)
    origin = data_path(options)
    if options.eval and items[0].split:
        items = [item for item in items if item.split == "val"]
        if not items:
            raise RunError(f"{kept} has no validation image among those of {origin}; --val-split . takes all images")
    check_files(items, origin)
    if not items[0].split:
        items = split_by_content(items, options, origin)
        if options.eval:
            _logger.info("the validation images are evaluated; --val-split . takes all images")
    if not options.eval:
        _check_splits(items, multi, origin)
    return items


def _take_classes(items: list[Item], options: Data, class_names: list[str], origin: Path) -> list[Item]:
    """The images all of whose labels are classes of --class-map."""
    taken = [item for item in items if {*labels_of(item, options.multi_label)} <= {*class_names}]
    if not taken:
        raise RunError(f"{origin} has no image of the classes in {options.class_map}: {some(class_names, 5)}")
    if len(taken) < len(items):
        _logger.warning(
            f"{options.class_map} lacks the classes of {plural(len(items) - len(taken), 'image')} of {origin}"
        )
    return taken


def _rename_splits(items: list[Item], options: Options, origin: Path) -> list[Item]:
    """Splits as a table calls them, to train and val; what is in no split, such as a test set, is left out.

    A table without splits stays as it is.
    """
    if not items[0].split:
        asked = {"val": options.val_split} if options.eval else {"train": options.train_split, "val": options.val_split}
        for split, name in asked.items():
            if name not in SPLITS[split]:
                raise RunError(f"--{split}-split is {name}, but {origin} has no column split")
        return items
    found = {item.split.lower() for item in items}
    # val comes first, because an evaluation may take the training images for it
    names = {"val": set(synonyms(options.val_split)), "train": set(synonyms(options.train_split))}
    if not names["val"] & found and options.val_split in SPLITS["val"]:
        names["val"] = {TEST}
    known = {TEST, *names["train"], *names["val"], *(name for split in SPLITS.values() for name in split)}
    strange = [item for item in items if item.split.lower() not in known]
    if strange:
        raise RunError(
            f"{origin}: {plural(len(strange), 'image')} with an unknown split, the first is {strange[0].split} "
            f"of {strange[0].path}; known are train, val, test, and what --train-split and --val-split name"
        )
    splits = [next((s for s, known in names.items() if item.split.lower() in known), "") for item in items]
    renamed = [item._replace(split=split) for item, split in zip(items, splits, strict=True) if split]
    if len(renamed) < len(items):
        others = found - names["train"] - names["val"]
        _logger.info(f"{origin}: {plural(len(items) - len(renamed), 'image')} of {some(sorted(others))} left out")
    for split in ["val"] if options.eval else ["train", "val"]:
        if not any(item.split == split for item in renamed):
            raise RunError(f"{origin} has no {split} images; its splits are {some(sorted(found))}")
    return renamed


def _take_splits(items: list[Item], kept: Path, options: Options) -> list[Item]:
    """What an earlier split says, in an evaluation of these images alone; nothing if it knows none of them."""
    known = read_table(kept, options.multi_label)
    paths, known_paths = ({real_path(item.path) for item in each} for each in (items, known))
    n_new = len(paths - known_paths)
    if n_new == len(paths):
        _logger.info(f"{kept} knows none of these images: they are divided anew")
        return items
    ignored = f"; {plural(n_new, 'image')} that it does not know left out" if n_new else ""
    _logger.info(f"training and validation images as in {kept}{ignored}")
    return [item for item in known if not options.eval or real_path(item.path) in paths]


def split_by_content(items: list[Item], options: Data, origin: Path) -> list[Item]:
    """Splits by the hash of each file's content, so that they stay when images are added, renamed or copied.

    Each class has an image in either split: if need be the one of its smallest hash validates, or that of its largest
    trains.

    Raises:
        RunError: there is one class only, or a class has fewer than two different images, or a file cannot be read.
    """
    hashes = list(in_threads(content_hash, [item.path for item in items], "dividing the images"))
    own = defaultdict(set)
    for item, each in zip(items, hashes, strict=True):
        for label in labels_of(item, options.multi_label):
            own[label].add(each)
    if len(own) < (1 if options.multi_label else 2):
        raise RunError(f"{origin} has one class only, {some([*own])}; there is nothing to tell apart")
    few = [label for label in natural_order(own) if len(own[label]) < 2]
    if few:
        raise RunError(
            f"{origin}: class {few[0]} has fewer than two different images ({plural(len(few), 'class')} like this); "
            "one must train and another validate"
        )
    validates = {each: int(each, 16) < options.val_share * 16 ** len(each) for each in {*hashes}}
    for label in natural_order(own):
        first, last = min(own[label]), max(own[label])
        if not any(validates[each] for each in own[label]):
            validates[first] = True
        if all(validates[each] for each in own[label]):
            validates[last] = False
    divided = [item._replace(split="val" if validates[h] else "train") for item, h in zip(items, hashes, strict=True)]
    n_val = sum(item.split == "val" for item in divided)
    _logger.info(f"{origin} divided by content: {len(items) - n_val} training and {plural(n_val, 'validation image')}")
    return divided


def content_hash(path: str) -> str:
    """A number of 128 bits, in 32 hexadecimal digits, of the content of a file."""
    try:
        return hash_bytes(Path(path).read_bytes())
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror or error}") from error


def hash_bytes(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def in_threads(
    work: Callable[[Input], Output], inputs: Sequence[Input], title: str, threads: int | None = None
) -> Iterator[Output]:
    """What `work` makes of each input, in their order, with a progress bar. It should wait for disks or for C code."""
    parts = [inputs[start : start + PART] for start in range(0, len(inputs), PART)]
    with (
        tqdm(total=len(inputs), desc=title, disable=None, leave=False, unit="image") as bar,
        ThreadPoolExecutor(threads or min(32, 2 * count_cores())) as pool,
    ):
        for outputs in pool.map(lambda part: [work(each) for each in part], parts):
            yield from outputs
            bar.update(len(outputs))


def _check_splits(items: list[Item], multi_label: bool, origin: Path) -> None:
    """Make sure that training has all classes, and more than one."""
    labels: dict[str, set[str]] = {"train": set(), "val": set()}
    for item in items:
        labels[item.split].update(labels_of(item, multi_label))
    alone = natural_order(labels["val"] - labels["train"])
    if alone:
        raise RunError(f"{origin}: {plural(len(alone), 'class')} in the validation images alone: {some(alone)}")
    if len(labels["train"]) < (1 if multi_label else 2):
        raise RunError(f"{origin} has one class only, {items[0].label}; there is nothing to tell apart")
    unseen = natural_order(labels["train"] - labels["val"])
    if unseen:
        _logger.warning(f"{origin}: {plural(len(unseen), 'class')} without a validation image: {some(unseen)}")


def write_split(path: Path, items: list[Item]) -> None:
    """split.csv: path, label and split of each image, which can be given as DATA again."""
    write_table(path, Item._fields, ((Path(path).absolute(), *rest) for path, *rest in items))
