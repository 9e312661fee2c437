"""Sources of the images of a classification run, and whether their classes agree."""

import inspect
import os
import tarfile
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from pickle import PickleError
from typing import Any

import numpy as np
import torchvision
from PIL import Image
from timm.data import IterableImageDataset, create_dataset
from timm.data.readers import create_reader
from timm.utils.misc import natural_key

from ..common.classes import read_class_names
from ..common.errors import RunError, plural, some, suggest
from ..common.images import open_image
from ..common.packages import pip_line
from .folders import Item, labels_of, list_folder, natural_order, real_path, require_split, synonyms
from .settings import Data, Options

N_HELD_OUT_DIGITS = 360

# What makes a stream or a Hugging Face dataset readable, by the kind that --dataset names
PACKAGES = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow-datasets", "wds": "webdataset"}


class Source:
    """Images with the numbers of their classes, each to be had by its index; here pairs as of torchvision's datasets.

    `class_names` are empty where the data does not tell; `relabel` gives others.
    """

    def __init__(self, data: Any, title: str, classes: Iterable[object] | None = None):
        self.data = data
        self.title = title
        names = getattr(data, "classes", None) if classes is None else classes
        if names is None:
            targets = self._data_targets()
            names = [] if targets is None else range(int(max(targets)) + 1)
        self.class_names = [" ".join(name) if isinstance(name, tuple) else str(name) for name in names]
        self.numbers: list[int] = []  # of the classes, if not those of the data
        self.places: Sequence[int] = range(len(data))  # in the data, of the images that are used

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.load(index)

    def load(self, index: int) -> tuple[Image.Image, int]:
        """An image and the number of its class."""
        image, target = self.read(self.places[index])
        return image, self.numbers[target] if self.numbers else target

    def name(self, index: int) -> str:
        """What a message calls the image."""
        return self.title_of(self.places[index])

    def select(self, indices: Iterable[int]) -> "Source":
        """Some of the images, with the same classes."""
        selected = copy(self)
        selected.places = [self.places[index] for index in indices]
        return selected

    @property
    def files(self) -> list[str]:
        """The files that hold the images, as far as they are known."""
        return []

    # By the place of an image in the data

    def read(self, index: int) -> tuple[Image.Image, int]:
        """An image and the number that the data gives to its class."""
        image, target = self.data[index]
        return image, int(target)

    def title_of(self, index: int) -> str:
        return f"{self.title} image {index}"

    def targets(self) -> np.ndarray | None:
        """The number of the class of every image, (n,), without reading one; None where the data does not tell."""
        targets = self._data_targets()
        if targets is None or targets.shape != (len(self.data),):
            return None
        targets = targets[list(self.places)]
        return np.asarray(self.numbers)[targets] if self.numbers else targets

    def _data_targets(self) -> np.ndarray | None:
        """The numbers that the data gives to the classes of its images."""
        if isinstance(self.data, list):
            return np.array([target for _, target in self.data])
        names = ("targets", "labels", "_labels")  # of torchvision's datasets
        found = next((getattr(self.data, name) for name in names if hasattr(self.data, name)), None)
        return None if found is None else np.asarray(found)


class FileSource(Source):
    """Image files with their labels; the classes are numbered in the given or the natural order of their names."""

    def __init__(self, items: Sequence[Item], class_names: Iterable[str] = ()):
        names = list(class_names) or natural_order(item.label for item in items)
        numbers = {name: number for number, name in enumerate(names)}
        super().__init__([(item.path, numbers[item.label]) for item in items], "", names)

    @property
    def files(self) -> list[str]:
        return [self.data[place][0] for place in self.places]

    def read(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.data[index]
        return open_image(path), target

    def title_of(self, index: int) -> str:
        return self.data[index][0]


class MultiLabelSource(FileSource):
    """Image files with any number of labels each: a target is a vector of 0 and 1, (num_classes,)."""

    def __init__(self, items: Sequence[Item], class_names: Iterable[str]):
        super().__init__([], class_names)
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self.data = [(item.path, [numbers[label] for label in labels_of(item, True)]) for item in items]
        self.places = range(len(self.data))

    def load(self, index: int) -> tuple[Image.Image, Any]:
        image = self.read(self.places[index])[0]
        labels = self.data[self.places[index]][1]
        target = np.zeros(len(self.class_names), np.float32)
        target[[self.numbers[label] if self.numbers else label for label in labels]] = 1
        return image, target

    def targets(self) -> None:
        return None


class ReaderSource(Source):
    """Images of a timm reader: a tar file or a Hugging Face dataset."""

    def __init__(self, reader: Any):
        classes: Any = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
        super().__init__(reader, "", sorted(classes, key=classes.get))

    @property
    def files(self) -> list[str]:
        tar = getattr(self.data, "root", None)
        return [tar] if tar and os.path.isfile(tar) else []

    def read(self, index: int) -> tuple[Image.Image, int]:
        file, target = self.data[index][:2]
        with file:
            return open_image(file), int(target)

    def title_of(self, index: int) -> str:
        return str(self.data.filename(index, absolute=True))

    def _data_targets(self) -> np.ndarray:
        if hasattr(self.data, "iter_targets"):  # of Hugging Face datasets
            return np.array([*self.data.iter_targets()])
        if hasattr(self.data, "targets"):  # of tar files
            return np.asarray(self.data.targets)
        return np.array([target for _, target in self.data.samples])


def _digits(train: bool) -> Source:
    """scikit-learn's 1797 handwritten digits, 8x8 grey; 360 of them, as many of each digit, are held out."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * 255 / 16).astype(np.uint8)
    pairs = list(zip(map(Image.fromarray, images), digits.target, strict=True))
    parts = train_test_split(pairs, test_size=N_HELD_OUT_DIGITS, stratify=digits.target, random_state=0)
    return Source(parts[0] if train else parts[1], "digits train" if train else "digits held-out", range(10))


def open_source(options: Options, train: bool, items: list[Item] | None = None) -> Source | IterableImageDataset:
    """The training or the evaluation images that the options name, or those among `items`, from `split.divide`.

    Raises:
        RunError: the folder, split, dataset or package is missing, or holds no images.
    """
    name = options.dataset
    split = options.train_split if train else options.val_split
    if name == "sklearn-digits":
        return _digits(train)
    if name.startswith("tv-"):
        return _torchvision_source(options, split, train)
    names = read_class_names(options.class_map) if options.class_map else []
    if items is not None:
        names = names or natural_order(label for item in items for label in labels_of(item, options.multi_label))
        kind = MultiLabelSource if options.multi_label else FileSource
        return kind([item for item in items if item.split == ("train" if train else "val")], names)
    if options.multi_label:
        raise RunError(f"--multi-label needs a CSV or Parquet file of path and label; {options.data_dir} is a folder")
    if not name:
        return _folder_source(options, split, names)
    class_map = {name: number for number, name in enumerate(names)}
    if name.partition("/")[0].lower() in PACKAGES:
        return _named_source(options, split, train, class_map)
    known = ["sklearn-digits", "tv-CIFAR10", *(f"{kind}/" for kind in PACKAGES)]
    raise RunError(f"unknown --dataset {name}{suggest(name, known)}")


def _named_source(
    options: Options, split: str, train: bool, class_map: dict[str, int]
) -> Source | IterableImageDataset:
    """A dataset of timm's: hfds/NAME by index, the others as a stream."""
    name = options.dataset
    kind = name.partition("/")[0].lower()
    if kind in ("wds", "tfds") and not (options.data_dir and Path(options.data_dir).is_dir()):
        raise RunError(f"no data folder for --dataset {name}: {options.data_dir or 'name it last on the command line'}")
    keys = {"input_key": options.input_key, "target_key": options.target_key}
    settings: dict[str, Any] = {key: value for key, value in keys.items() if value is not None}
    settings |= {"class_map": class_map, "download": options.download}
    try:
        if not options.streamed:
            return ReaderSource(create_reader(name, options.data_dir, split, **settings))
        return create_dataset(
            name,
            root=options.data_dir,
            split=split,
            is_training=train,
            batch_size=options.batch_size,
            num_samples=options.train_num_samples if train else options.val_num_samples,
            seed=options.seed,
            input_img_mode=options.mode,
            **settings,
        )
    except ImportError as error:
        raise RunError(f"--dataset {name} needs a missing package: {pip_line(PACKAGES[kind])}") from error
    except (RuntimeError, ValueError, OSError, AssertionError, LookupError, TypeError) as error:
        raise RunError(f"cannot open --dataset {name} {split}: {error}") from error


def _folder_source(options: Data, split: str, class_names: list[str]) -> Source:
    """The images of DATA/SPLIT/CLASS/*, or of DATA/SPLIT.tar."""
    path = require_split(options, split)
    if path.is_dir():
        return FileSource(list_folder(path, options, class_names), class_names)
    try:
        reader = create_reader("", str(path), class_map={name: number for number, name in enumerate(class_names)})
    except (RuntimeError, ValueError, OSError, AssertionError, tarfile.TarError) as error:
        raise RunError(f"cannot read {path}: {error or type(error).__name__}") from error
    source = ReaderSource(reader)
    if len({tuple(natural_key(name)) for name in source.class_names}) < len(source.class_names):
        raise RunError(f"{path} has classes that differ in case alone; unpack it, or give a --class-map")
    return source


def _torchvision_source(options: Data, split: str, train: bool) -> Source:
    name = options.dataset.removeprefix("tv-")
    known = [n for n in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, n))]
    if name not in known:
        raise RunError(f"torchvision has no dataset {name}{suggest(name, known)}")
    if not options.data_dir:
        raise RunError(f"no data folder for {options.dataset}: name it last on the command line")
    dataset_class = getattr(torchvision.datasets, name)
    parameters = inspect.signature(dataset_class).parameters
    settings = {"download": options.download} if "download" in parameters else {}
    if "train" in parameters:
        choices: list[dict[str, Any]] = [{"train": train}]
    elif "split" in parameters:
        choices = [{"split": name} for name in synonyms(split)]
    else:
        raise RunError(f"torchvision's {name} has neither train= nor split=; it cannot be trained on by name")
    for choice in choices:
        try:
            dataset = dataset_class(options.data_dir, **choice, **settings)
            return Source(dataset, f"{name} {'train' if train else 'val'}")
        except ValueError as error:  # an unknown split
            reason = str(error)
        except (RuntimeError, OSError, TypeError, ImportError) as error:
            hint = "; --download lets it download itself" if settings and not options.download else ""
            raise RunError(f"cannot open {name} in {options.data_dir}: {error}{hint}") from error
        except PickleError as error:  # of the code that torchvision has just not run
            raise RunError(f"cannot open {name} in {options.data_dir}: a file holds more than tensors") from error
    raise RunError(f"torchvision's {name} has no split {split!r}: {reason}")


def check_classes(train: Any, val: Any, options: Data) -> list[str]:
    """The class names, after checking that training data, validation data and --num-classes agree.

    Streamed datasets do not tell their classes; for them --num-classes is needed and the names are numbers.
    """
    names: list[str] = getattr(train, "class_names", [])
    val_names: list[str] = getattr(val, "class_names", names)
    if names != val_names:
        raise RunError(
            f"the training data has {plural(len(names), 'class')}, the validation data {len(val_names)}; only one of "
            f"them has {some(sorted(set(names) ^ set(val_names)))}"
        )
    if not names:
        if options.num_classes is None:
            raise RunError(f"--dataset {options.dataset} does not tell its classes: give --num-classes")
        return [str(i) for i in range(options.num_classes)]
    if options.num_classes not in (None, len(names)):
        raise RunError(
            f"--num-classes is {options.num_classes}, but the data has {plural(len(names), 'class')}; num_classes: "
            "auto takes the data's"
        )
    return names


def check_apart(train: Any, val: Any) -> None:
    """Make sure that no file is among both the training and the validation images, whatever its name there."""
    paths = {real_path(path): path for path in getattr(train, "files", [])}
    shared = [path for path in getattr(val, "files", []) if real_path(path) in paths]
    if shared:
        raise RunError(
            f"the training and the validation data share {plural(len(shared), 'file')}, the first is {shared[0]}; "
            "what is trained on cannot validate"
        )


def count_classes(source: Source | IterableImageDataset, options: Options, num_classes: int) -> np.ndarray | None:
    """How many training images each class has, (num_classes,); None where the data does not tell.

    Raises:
        RunError: the data does not tell, and an option needs it.
    """
    targets = source.targets() if isinstance(source, Source) else None
    needs = {"--class-weights auto": options.class_weights == "auto", "--balanced-sampling": options.balanced_sampling}
    for name, needed in needs.items():
        if needed and targets is None:
            raise RunError(f"{name}: --dataset {options.dataset} does not tell the classes of its images beforehand")
    return None if targets is None else np.bincount(targets, minlength=num_classes)


def relabel(source: Any, class_names: list[str], path: str) -> Any:
    """The source with the class numbers of a checkpoint; a class that the checkpoint does not know is an error."""
    names: list[str] = getattr(source, "class_names", [])
    unknown = [name for name in names if name not in class_names]
    if unknown:
        raise RunError(
            f"{path} does not know the class {unknown[0]} of the data ({len(unknown)} such); it knows "
            f"{some(class_names, 5)}"
        )
    if not names or names == class_names:
        return source
    relabelled = copy(source)
    relabelled.numbers = [class_names.index(names[number]) for number in source.numbers or range(len(names))]
    relabelled.class_names = class_names
    return relabelled
