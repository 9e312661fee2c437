"""Data of a run: the training and the validation images, divided, looked at, and kept apart."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import RunError, plural, some
from .check import DUPLICATES, MOST_IMAGES, Findings, image_names, look, read_duplicates, write_duplicates
from .folders import Item
from .process import Process
from .settings import Options
from .sources import FileSource, Source, check_apart, check_classes, open_source
from .split import SPLIT, divide, write_split

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageData:
    """The sources of a run; `items` if they were divided here, `findings` if they were looked at."""

    train: Any
    val: Any
    class_names: list[str]
    items: list[Item] | None = None
    findings: Findings | None = None

    def write(self, folder: Path) -> None:
        """split.csv and duplicates.csv, as far as there is something to write."""
        if self.items is not None:
            write_split(folder / SPLIT, self.items)
        if self.findings:
            write_duplicates(folder / DUPLICATES, self.findings.duplicates)


def open_data(options: Options, process: Process, kept: Path | None) -> ImageData:
    """The images that the options name; training ones that are copies of validation images are left out.

    `kept` is the folder of the run that goes on: its split stays, and the images are not looked at again unless their
    paths have changed.
    """
    items = process.on_primary(lambda: divide(options, kept and kept / SPLIT))
    with process.first_on_machine():
        train, val = (open_source(options, train, items) for train in (True, False))
    check_apart(train, val)
    class_names = check_classes(train, val, options)
    copies = read_copies(kept / DUPLICATES) if kept else set()
    moved = copies and isinstance(train, Source) and copies.isdisjoint(image_names(train))
    findings = process.on_primary(lambda: _look(options, train, val)) if moved or not kept else None
    if findings:
        copies = {each.path for each in findings.duplicates if each.leaks}
    if copies and isinstance(train, Source) and not options.check_data:
        train = leave_out(train, copies)
    return ImageData(train, val, class_names, items, findings)


def _look(options: Options, train: Any, val: Any) -> Findings | None:
    """What a look at the images finds, where one is asked for or goes without saying."""
    if not (isinstance(train, Source) and isinstance(val, Source)):
        if options.check_data:
            raise RunError(f"--check-data: the images of --dataset {options.dataset} come as a stream")
        return None
    if not options.check_data:
        if not isinstance(train, FileSource):
            return None
        if len(train) + len(val) > MOST_IMAGES:
            _logger.info(f"{len(train) + len(val)} images are not looked at before training; --check-data does that")
            return None
    findings = look(train, val)
    if not options.check_data:
        for line in findings.lines():
            _logger.info(line)
    return findings


def read_copies(path: Path) -> set[str]:
    """The training images that an earlier look found to be copies of validation images."""
    return {each.path for each in read_duplicates(path) if each.leaks}


def leave_out(train: Source, copies: set[str]) -> Source:
    """The training images without these; `RunError` if no image of a class would be left."""
    stays = [index for index, name in enumerate(image_names(train)) if name not in copies]
    n_left_out = len(train) - len(stays)
    if not stays:
        raise RunError("every training image is a copy of a validation image")
    targets = train.targets()
    emptied = [] if targets is None else sorted({*targets.tolist()} - {*targets[stays].tolist()})
    if emptied:
        names = some(train.class_names[number] for number in emptied)
        raise RunError(f"every training image of {names} is a copy of a validation image")
    if n_left_out:
        example = next(name for name in image_names(train) if name in copies)
        _logger.info(f"{plural(n_left_out, 'training image')} left out, copies of validation images, such as {example}")
    return train.select(stays)
