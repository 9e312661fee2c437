"""Batches of images for training and evaluation.

Training is reproducible from a position alone. Every random draw is keyed: the order of an epoch by (seed, epoch), the
augmentation of an image by (seed, epoch, its index), mixup and erasing by (seed, epoch, batch, rank). So a run that
resumes at any batch sees exactly what an undisturbed one sees, with no random state to save.
"""

import hashlib
import logging
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup, IterableImageDataset, create_loader, create_transform
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset, Sampler

from ..common.devices import count_cores
from ..common.errors import RunError
from ..common.images import UnreadableImage, to_mode
from ..common.signals import leave_signals_to_the_parent
from .process import Process
from .sources import Source, image_mode

_logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 10


def seed_all(*key: Any) -> None:
    """Seed python, numpy and torch from a hash of the key."""
    value = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)  # torch.manual_seed is a hundred times slower, for the GPUs it visits
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(value)


class Batch(NamedTuple):
    """What to load: the key of its random draws, and the images."""

    epoch: int
    number: int
    indices: Sequence[int]


class TrainBatches(Sampler[Batch]):
    """This rank's share of each batch of a shuffled epoch; an incomplete last batch is left out."""

    def __init__(self, n_images: int, batch_size: int, seed: int, rank: int, world_size: int):
        self.n_images = n_images
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.first = 0
        self._order_epoch = -1

    def __len__(self) -> int:
        return self.n_images // (self.batch_size * self.world_size)

    @property
    def n_own(self) -> int:
        return len(self) * self.batch_size

    def start(self, epoch: int, first: int = 0) -> None:
        """Begin the next iteration at this batch of this epoch."""
        self.epoch = epoch
        self.first = first

    def batch(self, epoch: int, number: int) -> Batch:
        if epoch != self._order_epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.n_images)
            self._order_epoch = epoch
        start = (number * self.world_size + self.rank) * self.batch_size
        return Batch(epoch, number, self._order[start : start + self.batch_size].tolist())

    def __iter__(self) -> Iterator[Batch]:
        for number in range(self.first, len(self)):
            yield self.batch(self.epoch, number)


class EvalBatches(Sampler[Batch]):
    """This rank's share of all images in order, each exactly once over the ranks: nothing is padded or repeated."""

    def __init__(self, n_images: int, batch_size: int, rank: int, world_size: int):
        self.indices = list(range(rank, n_images, world_size))
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    @property
    def n_own(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            start = number * self.batch_size
            yield Batch(0, number, self.indices[start : start + self.batch_size])


class BatchDataset(Dataset):
    """Loads whole batches: (images uint8 (b, c, h, w), targets, what could not be read).

    In training an unreadable image is replaced by the next readable one, so that batches keep their size; in
    evaluation it is left out.
    """

    def __init__(
        self,
        source: Source,
        transform: Any,
        image_mode: str,
        seed: int = 0,
        rank: int = 0,
        mixup: FastCollateMixup | None = None,
        mixup_off_epoch: int = 0,
        training: bool = False,
    ):
        self.source = source
        self.transform = transform
        self.image_mode = image_mode
        self.seed = seed
        self.rank = rank
        self.mixup = mixup
        self.mixup_off_epoch = mixup_off_epoch
        self.training = training

    def __len__(self) -> int:
        return len(self.source)

    def _read(self, index: int) -> tuple[Image.Image, int]:
        image, target = self.source.load(index)
        return to_mode(image, self.image_mode), target

    def __getitems__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        samples, unreadable = [], []
        for index in batch.indices:
            for attempt in range(MAX_REPLACEMENTS if self.training else 1):
                i = (index + attempt) % len(self.source)
                try:
                    image, target = self._read(i)
                except UnreadableImage as error:
                    unreadable.append(f"{self.source.name(i)} ({error})")
                    continue
                except Exception as error:  # image decoders raise nearly anything on damaged input
                    unreadable.append(f"{self.source.name(i)} ({type(error).__name__}: {error})")
                    continue
                if self.training:
                    seed_all(self.seed, "image", batch.epoch, index)
                samples.append((self.transform(image), target))
                break
        if not samples or (self.training and len(samples) < len(batch.indices)):
            return torch.empty(0), torch.empty(0, dtype=torch.long), unreadable
        if self.mixup is None:
            return *fast_collate(samples), unreadable
        seed_all(self.seed, "mixup", batch.epoch, batch.number, self.rank)
        self.mixup.mixup_enabled = not self.mixup_off_epoch or batch.epoch < self.mixup_off_epoch
        return *self.mixup(samples), unreadable


class KeyedErasing(RandomErasing):
    """Random erasing of whole batches on the device, seeded by the key and each batch's place in the run."""

    def __init__(self, key: tuple[Any, ...], probability: float, **settings: Any):
        super().__init__(probability, **settings)
        self.key = key

    def start(self, epoch: int, first: int) -> None:
        self.epoch, self.number = epoch, first

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        seed_all(*self.key, "erase", self.epoch, self.number)
        self.number += 1
        return super().__call__(images)


class _Unpacked:
    """Takes the notes on unreadable images off the batches, for the loader that moves them to the device."""

    def __init__(self, loader: DataLoader, training: bool, stop: bool):
        self.loader = loader
        self.training = training
        self.stop = stop
        self.unreadable: dict[str, None] = {}

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, targets, unreadable in self.loader:
            if unreadable and self.stop:
                raise RunError(f"unreadable image {unreadable[0]}; --on-bad-image skip goes on without it")
            for note in unreadable:
                if note not in self.unreadable:
                    _logger.warning(f"skipping an unreadable image: {note}")
                    self.unreadable[note] = None
            if len(images):
                yield images, targets
            elif self.training:  # no replacement was found
                raise RunError(f"{len(unreadable)} images in a row cannot be read, the first is {unreadable[0]}")


class Loader:
    """Batches on the device, normalised: (images float (b, c, h, w), targets).

    `start(epoch, first)` says where the next iteration begins. `unreadable` names the images that could not be read.
    """

    def __init__(self, source: Source, options: Any, data_config: dict[str, Any], process: Process, train: bool):
        batch_size = options.batch_size if train else options.validation_batch_size or options.batch_size
        transform = _create_transform(options, data_config, train)
        device, rank, world_size = process.device, process.rank, process.world_size
        self.batches: TrainBatches | EvalBatches
        if train:
            self.batches = TrainBatches(len(source), batch_size, options.seed, rank, world_size)
        else:
            self.batches = EvalBatches(len(source), batch_size, rank, world_size)
        self.dataset = BatchDataset(
            source,
            transform,
            image_mode(options),
            seed=options.seed,
            rank=rank,
            mixup=create_mixup(options) if train else None,
            mixup_off_epoch=options.mixup_off_epoch,
            training=train,
        )
        workers = default_workers(options)
        self._unpacked = _Unpacked(
            DataLoader(
                self.dataset,
                batch_sampler=self.batches,  # type: ignore[arg-type]  # a Batch, which is no list
                collate_fn=_identity,
                num_workers=workers,
                pin_memory=options.pin_mem and device.type == "cuda",
                persistent_workers=workers > 0,
                worker_init_fn=leave_signals_to_the_parent,
                generator=torch.Generator(),  # the loader draws a seed for its workers from it, not from ours
            ),
            training=train,
            stop=options.on_bad_image == "stop",
        )
        self._on_device = PrefetchLoader(
            self._unpacked,  # type: ignore[arg-type]  # any loader does
            mean=data_config["mean"],
            std=data_config["std"],
            channels=data_config["input_size"][0],
            device=device,
        )
        if train and options.reprob > 0 and options.aug:
            self._on_device.random_erasing = KeyedErasing(
                (options.seed, rank), options.reprob, mode=options.remode, max_count=options.recount, device=device
            )

    def __len__(self) -> int:
        return len(self._unpacked)

    @property
    def n_images(self) -> int:
        """Images that this process sees in a pass."""
        return self.batches.n_own

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self._on_device)

    def start(self, epoch: int, first: int = 0) -> None:
        assert isinstance(self.batches, TrainBatches)  # there are no epochs in evaluation
        self.batches.start(epoch, first)
        erasing = self._on_device.random_erasing
        if isinstance(erasing, KeyedErasing):
            erasing.start(epoch, first)

    def names(self, epoch: int, number: int) -> list[str]:
        """The images of a training batch."""
        assert isinstance(self.batches, TrainBatches)
        return [self.dataset.source.name(i) for i in self.batches.batch(epoch, number).indices]

    @property
    def unreadable(self) -> list[str]:
        return list(self._unpacked.unreadable)


class StreamLoader:
    """Batches of a dataset that can only be streamed (wds, tfds, hfids), by timm's loader.

    It can be resumed at the start of an epoch only, and its random draws are not keyed.
    """

    unreadable: list[str] = []

    def __init__(
        self,
        dataset: IterableImageDataset,
        options: Any,
        data_config: dict[str, Any],
        process: Process,
        train: bool,
    ):
        self.dataset = dataset
        self._title = options.dataset
        _create_transform(options, data_config, train)  # says what is wrong with the options, if anything is
        self._loader = create_loader(
            dataset,
            data_config["input_size"],
            options.batch_size if train else options.validation_batch_size or options.batch_size,
            is_training=train,
            re_prob=options.reprob,
            re_mode=options.remode,
            re_count=options.recount,
            num_workers=default_workers(options),
            distributed=process.distributed,
            collate_fn=create_mixup(options) if train else None,
            pin_memory=options.pin_mem and process.device.type == "cuda",
            device=process.device,
            **{k: v for k, v in _transform_settings(options, data_config, train).items() if k != "input_size"},
        )

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def n_images(self) -> int:
        return len(self) * self._loader.loader.batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        n_batches = 0
        for n_batches, batch in enumerate(self._loader, 1):  # noqa: B007
            yield batch
        if not n_batches:
            raise RunError(f"--dataset {self._title} gave no batch; do the shards exist?")

    def start(self, epoch: int, first: int = 0) -> None:
        if first:
            raise RunError(f"--dataset {self._title} cannot resume within an epoch")
        self.dataset.set_epoch(epoch)

    def names(self, epoch: int, number: int) -> list[str]:
        return []


def make_loader(
    source: Source | IterableImageDataset, options: Any, data_config: dict[str, Any], process: Process, train: bool
) -> Loader | StreamLoader:
    """The loader for a source, after checking that the data fills a batch."""
    loader: Loader | StreamLoader
    if isinstance(source, IterableImageDataset):
        loader = StreamLoader(source, options, data_config, process, train)
    else:
        loader = Loader(source, options, data_config, process, train)
    if train and not len(loader):
        ranks = f" x {process.world_size} processes" if process.distributed else ""
        raise RunError(f"--batch-size {options.batch_size}{ranks} is larger than the data: {len(source)} images")
    return loader


def create_mixup(options: Any) -> FastCollateMixup | None:
    """Mixup and cutmix as the options ask, or None."""
    if not options.aug or not (options.mixup > 0 or options.cutmix > 0 or options.cutmix_minmax):
        return None
    return FastCollateMixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        cutmix_minmax=options.cutmix_minmax,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=options.smoothing,
        num_classes=options.num_classes,
    )


def default_workers(options: Any) -> int:
    """--workers, or the cores that each process on this machine has, up to 8."""
    if options.workers is not None:
        return options.workers
    return max(1, min(8, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _create_transform(options: Any, data_config: dict[str, Any], train: bool) -> Any:
    settings = _transform_settings(options, data_config, train)
    try:
        return create_transform(**settings, is_training=train, use_prefetcher=True)
    except (AssertionError, KeyError, ValueError) as error:
        names = "--aa or --train-interpolation" if train else "--interpolation"
        raise RunError(f"timm does not know this {names}: {error}") from error


def _transform_settings(options: Any, data_config: dict[str, Any], train: bool) -> dict[str, Any]:
    settings = {"input_size": data_config["input_size"], "mean": data_config["mean"], "std": data_config["std"]}
    if not train:
        return settings | {key: data_config[key] for key in ("interpolation", "crop_pct", "crop_mode")}
    return settings | {
        "no_aug": not options.aug,
        "scale": tuple(options.scale),
        "ratio": tuple(options.ratio),
        "hflip": options.hflip,
        "vflip": options.vflip,
        "color_jitter": options.color_jitter,
        "auto_augment": options.aa,
        "interpolation": options.train_interpolation,
    }


def _identity(batch: Any) -> Any:
    return batch
