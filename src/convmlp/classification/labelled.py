"""The images of a folder or table with the classes of a model, for what is not training: calibration and checks."""

from pathlib import Path
from typing import Any

import numpy as np

from ..common.errors import RunError
from .batches import count_earlier
from .settings import Options
from .sources import Source, open_source, relabel
from .split import SPLIT, divide


def labelled_images(
    folder: str, checkpoint: str, class_names: list[str], train: bool, multi_label: bool = False
) -> Source:
    """The training or the validation images of a folder, read and divided as in training.

    Where a run left its split.csv beside `checkpoint`, that divides them. Classes are numbered as the model has them.

    Raises:
        RunError: there are no such images, or the model does not know a class of theirs.
    """
    options = Options(data_dir=folder, multi_label=multi_label, eval=None if train else checkpoint)
    items = divide(options, Path(checkpoint).parent / SPLIT)
    source: Any = relabel(open_source(options, train, items), class_names, checkpoint)
    if not len(source):
        raise RunError(f"{folder} holds no {'training' if train else 'validation'} images")
    return source


def spread(source: Source, n: int) -> Source:
    """At most n images, of all classes as equally as they are there."""
    targets = source.targets()
    numbers = np.arange(len(source)) if targets is None else count_earlier(targets)
    return source.select(np.argsort(numbers, kind="stable")[:n].tolist())
