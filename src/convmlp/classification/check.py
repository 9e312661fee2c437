"""A look at the images before training: how many and how large they are, unreadable ones, and copies of each other.

A copy has the same content, or is near: the same image encoded anew, in another size, a little brighter or cropped.
"""

import csv
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..common.errors import RunError, one_line, plural, some
from ..common.images import open_image, to_mode
from ..common.packages import need
from .sources import FileSource, Source
from .split import hash_bytes, in_threads
from .tables import write_table

_logger = logging.getLogger(__name__)

DUPLICATES = "duplicates.csv"
MOST_IMAGES = 100_000  # that are looked at without being asked

THUMBNAIL = 32  # px
# Near copies have perceptual hashes that differ in few of 64 bits, details of thumbnails that correlate, and nearly the
# same mean colour. In small images different things look alike: of 8 px digits up to 0.986.
HASH_BITS, CORRELATION, CORRELATION_OF_SMALL, COLOUR = 10, 0.95, 0.99, 12
SMALL = 64  # px
ROWS = 256  # that are compared with all others at a time


class Duplicate(NamedTuple):
    """A copy, exact or near, of an earlier image; the validation images come before the training images."""

    path: str
    duplicate_of: str
    kind: str
    split: str
    duplicate_split: str

    @property
    def leaks(self) -> bool:
        """Whether it is a training image that also validates."""
        return self.split == "train" and self.duplicate_split == "val"


@dataclass(frozen=True)
class Findings:
    """What a look has found. Sides are in px: the smallest, the median of the shorter ones, the largest."""

    n_images: int  # that can be read
    counts: dict[str, dict[str, int]]  # of them, by split and class
    smallest_side: int
    median_side: int
    largest_side: int
    unreadable: list[str]
    duplicates: list[Duplicate]

    def lines(self) -> list[str]:
        """What the log says."""
        per_class = self.counts["train"].values()
        found = [
            f"looked at {plural(self.n_images, 'image')} of {self.smallest_side} to {self.largest_side} px (median "
            f"{self.median_side}), {min(per_class)} to {max(per_class)} a class in training"
        ]
        if self.unreadable:
            found.append(f"{plural(len(self.unreadable), 'image')} cannot be read: {some(self.unreadable)}")
        for split in ("train", "val"):
            within = [each for each in self.duplicates if each.split == each.duplicate_split == split]
            if within:
                what = "training" if split == "train" else "validation"
                found.append(f"{_copies(within)} within the {what} images, such as {_example(within[0])}")
        return found

    def table(self) -> str:
        """All findings, for people: counts by class first."""
        names = list(self.counts["train"] | self.counts["val"])
        width = max(len("class"), *map(len, names))
        rows = [f"{name:{width}}  {self.counts['train'][name]:8}  {self.counts['val'][name]:10}" for name in names]
        leaks = [each for each in self.duplicates if each.leaks]
        found = [f"{_copies(leaks)} of validation images in training, such as {_example(leaks[0])}"] if leaks else []
        return "\n".join([f"{'class':{width}}  training  validation", *rows, *self.lines(), *found])


class _View(NamedTuple):
    """What is kept of an image."""

    labels: list[int]
    size: tuple[int, int]
    content: str  # its hash
    bits: np.ndarray  # (64,) -1 or 1, of its perceptual hash
    detail: np.ndarray  # (256,) of length 1, or 0 where there is none
    colour: np.ndarray  # (3,) means


def look(train: Source, val: Source) -> Findings:
    """Read all images once, in threads, and find what training should know of them. Thousands take seconds."""
    need("the look at the data", "ImageHash")
    splits: list[str] = []
    names: list[str] = []
    views: list[_View] = []
    unreadable: list[str] = []
    for split, source in (("val", val), ("train", train)):
        for name, view in zip(image_names(source), _views(source), strict=True):
            if isinstance(view, str):
                unreadable.append(f"{name} ({view})")
                continue
            splits.append(split)
            names.append(name)
            views.append(view)
    if not views:
        raise RunError(f"not one image can be read: {some(unreadable, 1)}")
    n_classes = 1 + max((label for view in views for label in view.labels), default=-1)
    classes = train.class_names or [*map(str, range(n_classes))]
    counted = Counter((split, label) for split, view in zip(splits, views, strict=True) for label in view.labels)
    counts = {s: {name: counted[s, number] for number, name in enumerate(classes)} for s in ("train", "val")}
    shorter = np.array([min(view.size) for view in views])
    return Findings(
        len(views),
        counts,
        int(shorter.min()),
        int(np.median(shorter)),
        max(max(view.size) for view in views),
        unreadable,
        [Duplicate(names[i], names[j], kind, splits[i], splits[j]) for i, j, kind in _find_copies(views, splits)],
    )


def image_names(source: Source) -> list[str]:
    """What duplicates.csv calls the images: files by their absolute paths."""
    names = [source.name(index) for index in range(len(source))]
    return [str(Path(name).absolute()) for name in names] if isinstance(source, FileSource) else names


def _views(source: Source) -> Iterator[_View | str]:
    """A view of each image, or why there is none."""
    if not isinstance(source, FileSource):
        source = deepcopy(source)  # so that no open file is shared with the processes that load data later
    threads = None if isinstance(source, FileSource) else 1
    return in_threads(lambda index: _view(source, index), range(len(source)), "looking at the images", threads)


def _view(source: Source, index: int) -> _View | str:
    try:
        if isinstance(source, FileSource):
            path, labels = source.data[source.places[index]]
            content = Path(path).read_bytes()
            image = open_image(BytesIO(content), draft=2 * THUMBNAIL)
            with Image.open(BytesIO(content)) as whole:
                size = whole.size
        else:
            image, labels = source.load(index)
            content, size = repr((image.mode, image.size)).encode() + image.tobytes(), image.size
        labels = labels if isinstance(labels, list) else [labels]
        return _View(labels, size, hash_bytes(content), *_features(to_mode(image, "RGB")))
    except Exception as error:  # image decoders raise nearly anything on damaged input
        return one_line(error)


def _features(image: Image.Image) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Perceptual hash, detail and mean colour of an image."""
    import imagehash
    from scipy.ndimage import gaussian_filter

    image = image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    # What is finer differs in copies of another size or quality; what is coarser is alike in different images
    band = gaussian_filter(grey, 0.7) - gaussian_filter(grey, 2.5)
    detail = band.reshape(THUMBNAIL // 2, 2, THUMBNAIL // 2, 2).mean((1, 3)).ravel()
    detail -= detail.mean()
    strength = np.linalg.norm(detail)
    detail /= strength if strength > len(detail) ** 0.5 / 2 else np.inf
    bits = imagehash.phash(image).hash.ravel().astype(np.float32) * 2 - 1
    return bits, detail, np.asarray(image, dtype=np.float32).mean((0, 1))


def _find_copies(views: Sequence[_View], splits: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(image, an earlier image that it is a copy of, the kind): a validation image where there is one, else exact."""
    first: dict[str, int] = {}
    for number, view in enumerate(views):
        first.setdefault(view.content, number)
    originals = list(first.values())
    near = {originals[i]: originals[j] for i, j in _find_near([views[i] for i in originals]).items()}
    for number, view in enumerate(views):
        original = first[view.content]
        found = [(original, "exact")] if original != number else []
        found += [(near[original], "near")] if original in near else []
        if found:
            yield number, *min(found, key=lambda copy: splits[copy[0]] != "val")


def _find_near(views: Sequence[_View]) -> dict[int, int]:
    """The first earlier image that an image is near to, where there is one. Memory grows with the number of images."""
    bits, detail, colours = (np.stack([getattr(v, key) for v in views]) for key in ("bits", "detail", "colour"))
    needed = np.array([CORRELATION if min(view.size) >= SMALL else CORRELATION_OF_SMALL for view in views])
    near: dict[int, int] = {}
    for start in range(0, len(views), ROWS):
        end = min(start + ROWS, len(views))
        alike = bits[start:end] @ bits[:end].T >= 64 - 2 * HASH_BITS
        alike &= np.arange(end) < np.arange(start, end)[:, None]
        rows, columns = np.flatnonzero(alike.any(1)), np.flatnonzero(alike.any(0))
        if not len(rows):
            continue
        alike = alike[np.ix_(rows, columns)]
        rows += start
        alike &= detail[rows] @ detail[columns].T >= np.maximum(needed[rows, None], needed[columns])
        for channel in range(3):
            alike &= np.abs(colours[rows, None, channel] - colours[columns, channel]) <= COLOUR
        near |= {int(rows[i]): int(columns[alike[i].argmax()]) for i in np.flatnonzero(alike.any(1))}
    return near


def write_duplicates(path: Path, duplicates: Sequence[Duplicate]) -> None:
    """duplicates.csv: each copy with the image that it is one of."""
    write_table(path, Duplicate._fields, duplicates)


def read_duplicates(path: Path) -> list[Duplicate]:
    """The rows of duplicates.csv, or none where there was no look."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [Duplicate(**row) for row in csv.DictReader(file)]


def _copies(duplicates: Sequence[Duplicate]) -> str:
    exact = sum(each.kind == "exact" for each in duplicates)
    return f"{exact} exact and {len(duplicates) - exact} near copies"


def _example(duplicate: Duplicate) -> str:
    return f"{duplicate.path} of {duplicate.duplicate_of}"
