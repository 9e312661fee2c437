"""Loaders that bring batches to the device, normalised: of images by index, or of a stream."""

import logging
import os
from collections.abc import Iterator
from typing import Any, TypedDict

import torch
from timm.data import FastCollateMixup, IterableImageDataset, create_loader, create_transform
from timm.data.loader import PrefetchLoader
from torch.utils.data import BatchSampler, DataLoader
from torchvision.transforms.functional import pil_to_tensor

from ..common.devices import count_cores, return_freed_memory
from ..common.errors import RunError, plural
from ..common.signals import leave_signals_to_the_parent
from .batches import EvalDataset, KeyedErasing, TrainBatches, TrainDataset, eval_batches
from .process import Process
from .settings import Augmentation, Data, Options
from .sources import Source

_logger = logging.getLogger(__name__)


UNCHANGED = "unchanged"  # the crop mode of a model that takes images as they are


class DataConfig(TypedDict):
    """Image size and normalisation of a run, as timm names them and checkpoints keep them."""

    input_size: list[int]  # channels, height, width
    mean: list[float]
    std: list[float]
    interpolation: str
    crop_pct: float
    crop_mode: str


Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class _Loader(DataLoader):
    """Takes the notes on unreadable images off the batches, for timm's loader that moves them to the device."""

    def __init__(self, dataset: EvalDataset, on_bad_image: str, **settings: Any):
        super().__init__(dataset, **settings)
        self.stops = on_bad_image == "stop"
        self.unreadable: dict[int, str] = {}  # notes on images

    def __iter__(self) -> Any:
        for images, targets, unreadable in super().__iter__():
            first = next(iter(unreadable.values()), "")
            if first and self.stops:
                raise RunError(f"unreadable image {first}; --on-bad-image skip goes on without it")
            for index, note in unreadable.items():
                if index not in self.unreadable:
                    _logger.warning(f"skipping an unreadable image: {note}")
                    self.unreadable[index] = note
            if len(images):
                yield images, targets
            elif isinstance(self.dataset, TrainDataset):  # no replacement was found
                raise RunError(f"{len(unreadable)} images in a row cannot be read, the first is {first}")


class IndexedLoader:
    """Batches of images by index, on the device, normalised: (images float (b, c, h, w), targets).

    `n_images` are in the whole data.
    """

    resumable = True  # an epoch can be continued at any batch

    def __init__(
        self, source: Source, options: Options, data_config: DataConfig, process: Process, num_classes: int, train: bool
    ):
        self.source = source
        self.num_classes = num_classes
        self.n_images = len(source)
        self._share = share = (process.rank, process.world_size)
        transform = _create_transform(options, data_config, train)
        self.batches: TrainBatches | BatchSampler
        if train:
            self.batches = _train_batches(source, options, *share)
            dataset: EvalDataset = TrainDataset(
                source,
                transform,
                options.mode,
                seed=options.seed,
                rank=process.rank,
                mixup=_create_mixup(options, num_classes),
                mixup_off_epoch=options.mixup_off_epoch,
            )
        else:
            self.batches = eval_batches(len(source), options.eval_batch_size, *share)
            dataset = EvalDataset(source, transform, options.mode)
        workers = count_workers(options)
        self._has_workers = workers == 0  # none are to come; otherwise they come with the first pass, and stay
        self._loader = _Loader(
            dataset,
            options.on_bad_image,
            batch_sampler=self.batches,
            collate_fn=tuple,
            num_workers=workers,
            pin_memory=options.pin_mem and process.device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator(),  # the loader draws a seed for its workers from it, not from ours
        )
        self._on_device = PrefetchLoader(
            self._loader,
            mean=tuple(data_config["mean"]),
            std=tuple(data_config["std"]),
            channels=data_config["input_size"][0],
            device=process.device,
        )
        self._erasing: KeyedErasing | None = None
        if train and options.reprob > 0 and options.aug:
            settings = {"mode": options.remode, "max_count": options.recount, "device": process.device}
            self._erasing = KeyedErasing((options.seed, process.rank), options.reprob, **settings)
            self._on_device.random_erasing = self._erasing

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Batches:
        if not self._has_workers:
            return_freed_memory()  # a worker would keep all that this process had when it was forked
            self._has_workers = True
        return iter(self._on_device)

    def start(self, epoch: int, first: int = 0) -> None:
        """Begin the next iteration at this batch of this epoch."""
        assert isinstance(self.batches, TrainBatches)  # there are no epochs in evaluation
        self.batches.start(epoch, first)
        if self._erasing:
            self._erasing.start(epoch, first)

    def names(self, epoch: int, number: int) -> list[str]:
        """The images of a training batch."""
        assert isinstance(self.batches, TrainBatches)
        return [self.source.name(i) for i in self.batches.batch(epoch, number).indices]

    @property
    def unreadable(self) -> list[str]:
        """The images that could not be read so far."""
        return list(self._loader.unreadable.values())

    def share_notes(self, other: "Loader") -> None:
        """Say nothing again of what another loader of the same images has found to be unreadable."""
        if isinstance(other, IndexedLoader):
            self._loader.unreadable = other._loader.unreadable

    @property
    def seen(self) -> list[int]:
        """The images of the last pass of an evaluation, in its order."""
        rank, world_size = self._share
        return [i for i in range(rank, self.n_images, world_size) if i not in self._loader.unreadable]


class StreamLoader:
    """Batches of a dataset that can only be streamed (wds, tfds, hfids), by timm's loader.

    It can be resumed at the start of an epoch only, and its random draws are not keyed.
    """

    resumable = False
    unreadable: list[str] = []
    seen: list[int] = []  # they have no numbers

    def __init__(
        self,
        dataset: IterableImageDataset,
        options: Options,
        data_config: DataConfig,
        process: Process,
        num_classes: int,
        train: bool,
    ):
        self.dataset = dataset
        self.num_classes = num_classes
        self.n_images = len(dataset)
        self._title = options.dataset
        _create_transform(options, data_config, train)  # says what is wrong with the options, if anything is
        settings = _transform_settings(options, data_config, train)
        batch_size = options.batch_size if train else options.eval_batch_size
        self._loader = create_loader(
            dataset,
            settings.pop("input_size"),
            batch_size,
            is_training=train,
            re_prob=options.reprob,
            re_mode=options.remode,
            re_count=options.recount,
            num_workers=count_workers(options),
            distributed=process.distributed,
            collate_fn=_create_mixup(options, num_classes) if train else None,
            pin_memory=options.pin_mem and process.device.type == "cuda",
            device=process.device,
            **settings,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Batches:
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


Loader = IndexedLoader | StreamLoader


def make_loader(
    source: Source | IterableImageDataset,
    options: Options,
    data_config: DataConfig,
    process: Process,
    num_classes: int,
    train: bool,
) -> Loader:
    """The loader for a source of `open_source`, after checking that the data fills a batch.

    In training images are augmented and shuffled.
    """
    kind: Any = StreamLoader if isinstance(source, IterableImageDataset) else IndexedLoader
    loader: Loader = kind(source, options, data_config, process, num_classes, train)
    if train and not len(loader):
        ranks = f" x {process.world_size} processes" if process.distributed else ""
        images = plural(loader.n_images, "image")
        raise RunError(f"--batch-size {options.batch_size}{ranks} is larger than the data: {images}")
    return loader


def _train_batches(source: Source, options: Options, rank: int, world_size: int) -> TrainBatches:
    targets = source.targets() if options.balanced_sampling else None
    repeats = max(1, options.aug_repeats)
    sizes = (len(source), options.batch_size, options.seed, rank, world_size)
    return TrainBatches(*sizes, targets=targets, repeats=repeats)


def count_workers(options: Data) -> int:
    """--workers, or the cores that each process on this machine has, up to 8."""
    if options.workers is not None:
        return options.workers
    return max(1, min(8, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _create_mixup(options: Options, num_classes: int) -> FastCollateMixup | None:
    """Mixup and cutmix as the options ask, or None."""
    if not options.mixes:
        return None
    return FastCollateMixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        cutmix_minmax=options.cutmix_minmax,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=options.smoothing,
        num_classes=num_classes,
    )


def _create_transform(options: Augmentation, data_config: DataConfig, train: bool) -> Any:
    if data_config["crop_mode"] == UNCHANGED and not train:
        return pil_to_tensor
    settings = _transform_settings(options, data_config, train)
    try:
        return create_transform(**settings, is_training=train, use_prefetcher=True)
    except (AssertionError, KeyError, ValueError) as error:
        names = "--aa or --train-interpolation" if train else "--interpolation"
        raise RunError(f"timm does not know this {names}: {error}") from error


def _transform_settings(options: Augmentation, data_config: DataConfig, train: bool) -> dict[str, Any]:
    """Arguments of timm's create_transform and create_loader alike."""
    if not train:
        return dict(data_config)
    return {
        "input_size": data_config["input_size"],
        "mean": data_config["mean"],
        "std": data_config["std"],
        "no_aug": not options.aug,
        "scale": tuple(options.scale),
        "ratio": tuple(options.ratio),
        "hflip": options.hflip,
        "vflip": options.vflip,
        "color_jitter": options.color_jitter,
        "auto_augment": options.aa,
        "grayscale_prob": options.grayscale_prob,
        "gaussian_blur_prob": options.gaussian_blur_prob,
        "interpolation": options.train_interpolation,
    }
