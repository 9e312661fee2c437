"""Batches of images whose every random draw is keyed.

The order of an epoch is keyed by (seed, epoch), the augmentation of an image by (seed, epoch, its index) and, where the
epoch has it more than once, by how often it came before; mixup and erasing are keyed by (seed, epoch, batch, rank). So
a run that resumes at any batch sees exactly what an undisturbed one sees, with no random state to save.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from torch.utils.data import BatchSampler, Dataset, Sampler, get_worker_info

from ..common.errors import one_line
from ..common.images import UnreadableImage, to_mode
from .sources import Source

MAX_REPLACEMENTS = 10


def seed_all(*key: Any) -> None:
    """Seed python, numpy and torch from a hash of the key."""
    value = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)  # torch.manual_seed is a hundred times slower, for the GPUs it visits
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)
    if torch.backends.mps.is_available() and get_worker_info() is None:  # processes that load data leave it alone
        torch.mps.manual_seed(value)


class Batch(NamedTuple):
    """What to load: the key of its random draws, and the images."""

    epoch: int
    number: int
    indices: Sequence[int]
    repetitions: Sequence[int]  # how often each of the images came before in the epoch


class TrainBatches(Sampler[Batch]):
    """This rank's share of each batch of a shuffled epoch; an incomplete last batch is left out.

    With `targets`, the classes of all images, an epoch draws the classes equally often. With `repeats`, each of the
    first images of the order comes so many times in succession, and the epoch keeps its length.
    """

    def __init__(
        self,
        n_images: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        *,
        targets: np.ndarray | None = None,
        repeats: int = 1,
    ):
        self.n_images = n_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.repeats = repeats
        self.classes = None if targets is None else _by_class(targets)
        self.start(0)
        self._order_epoch = -1

    def __len__(self) -> int:
        return self.n_images // (self.batch_size * self.world_size)

    def start(self, epoch: int, first: int = 0) -> None:
        """Begin the next iteration at this batch of this epoch."""
        self.epoch, self.first = epoch, first

    def batch(self, epoch: int, number: int) -> Batch:
        if epoch != self._order_epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(self.n_images if self.classes is None else self._balanced(rng))
            self._order = np.repeat(order, self.repeats)[: self.n_images]
            self._repetitions = count_earlier(self._order)
            self._order_epoch = epoch
        start = (number * self.world_size + self.rank) * self.batch_size
        share = slice(start, start + self.batch_size)
        return Batch(epoch, number, self._order[share].tolist(), self._repetitions[share].tolist())

    def _balanced(self, rng: np.random.Generator) -> np.ndarray:
        """As many images as there are and, give or take one, as many of each class, all before one comes again."""
        assert self.classes is not None
        share, surplus = divmod(self.n_images, len(self.classes))
        chosen = []
        for place, images in zip(rng.permutation(len(self.classes)), self.classes, strict=True):
            count = share + int(place < surplus)
            rounds = [rng.permutation(images) for _ in range(-(-count // len(images)))]
            chosen.append(np.concatenate([images[:0], *rounds])[:count])
        return np.concatenate(chosen)

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.first, len(self)):
            yield self.batch(self.epoch, number)


def _by_class(targets: np.ndarray) -> list[np.ndarray]:
    """The indices of each class's images."""
    order = np.argsort(targets, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(targets[order])) + 1)


def count_earlier(values: np.ndarray) -> np.ndarray:
    """For each value how often it came before."""
    order = np.argsort(values, kind="stable")
    first = np.searchsorted(values, values, sorter=order)  # the place of each value's first in that order
    earlier = np.empty_like(first)
    earlier[order] = np.arange(len(values)) - first[order]
    return earlier


def eval_batches(n_images: int, batch_size: int, rank: int, world_size: int) -> BatchSampler:
    """This rank's share of all images in order, each exactly once over the ranks: nothing is padded or repeated."""
    return BatchSampler(range(rank, n_images, world_size), batch_size, drop_last=False)


class EvalDataset(Dataset):
    """Loads whole batches: (images uint8 (b, c, h, w), targets, what could not be read and why).

    An image that cannot be read is left out.
    """

    def __init__(self, source: Source, transform: Callable[[Image.Image], Any], mode: str):
        self.source = source
        self.transform = transform
        self.mode = mode

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int, unreadable: dict[int, str]) -> tuple[Image.Image, int] | None:
        """An image and its class, or None after a note on why it cannot be read."""
        try:
            image, target = self.source.load(index)
            return to_mode(image, self.mode), target
        except UnreadableImage as error:
            reason = str(error)
        except Exception as error:  # image decoders raise nearly anything on damaged input
            reason = f"{type(error).__name__}: {one_line(error)}"
        unreadable[index] = f"{self.source.name(index)} ({reason})"
        return None

    def __getitems__(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
        unreadable: dict[int, str] = {}
        read = [sample for index in indices if (sample := self.read(index, unreadable))]
        return *_collate([(self.transform(image), target) for image, target in read]), unreadable


class TrainDataset(EvalDataset):
    """The same with keyed augmentation.

    An image that cannot be read is replaced by the next one that can, so that batches keep their size; the batch is
    empty where there is none.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], Any],
        mode: str,
        *,
        seed: int,
        rank: int = 0,
        mixup: FastCollateMixup | None = None,
        mixup_off_epoch: int = 0,
    ):
        super().__init__(source, transform, mode)
        self.seed = seed
        self.rank = rank
        self.mixup = mixup
        self.mixup_off_epoch = mixup_off_epoch

    def __getitems__(  # type: ignore[override]  # it goes with TrainBatches
        self, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
        samples: list[tuple[Any, int]] = []
        unreadable: dict[int, str] = {}
        for index, repetition in zip(batch.indices, batch.repetitions, strict=True):
            nearby = ((index + step) % len(self.source) for step in range(MAX_REPLACEMENTS))
            sample = next((sample for i in nearby if (sample := self.read(i, unreadable))), None)
            if sample is None:
                return *_collate([]), unreadable
            seed_all(self.seed, "image", batch.epoch, index, *([repetition] if repetition else []))
            samples.append((self.transform(sample[0]), sample[1]))
        if self.mixup is None:
            return *_collate(samples), unreadable
        seed_all(self.seed, "mixup", batch.epoch, batch.number, self.rank)
        self.mixup.mixup_enabled = not self.mixup_off_epoch or batch.epoch < self.mixup_off_epoch
        return *self.mixup(samples), unreadable


def _collate(samples: list[tuple[Any, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return fast_collate(samples) if samples else (torch.empty(0), torch.empty(0, dtype=torch.long))


class KeyedErasing(RandomErasing):
    """Random erasing of whole batches on the device, seeded by the key and each batch's place in the run."""

    def __init__(self, key: tuple[Any, ...], probability: float, **settings: Any):
        super().__init__(probability, **settings)
        self.key = key

    def start(self, epoch: int, first: int) -> None:
        """Say where the next batch stands."""
        self.epoch, self.number = epoch, first

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        seed_all(*self.key, "erase", self.epoch, self.number)
        self.number += 1
        return super().__call__(images)
