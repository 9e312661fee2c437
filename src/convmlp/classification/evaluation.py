"""Evaluation of a classifier: figures over all processes, confusion counts, pictures with predictions."""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.task import ClassificationEvaluator
from torch import nn
from tqdm import tqdm

from ..common.devices import autocast, resolve_amp_dtype
from ..common.errors import RunError
from ..common.images import to_image
from ..common.signals import StopRequest
from . import report
from .loaders import Loader, StreamLoader
from .process import Process

_logger = logging.getLogger(__name__)

N_PICTURES = 40


class Details:
    """Beyond the figures: the confusion counts, and some pictures with their predictions, mistakes among them."""

    def __init__(self, num_classes: int, n_images: int, data_config: dict[str, Any]):
        self.confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
        self.pictures: list[report.Picture] = []
        self._data_config = data_config
        self._n_images = n_images
        self._seen = 0
        self._mistakes = 0

    def update(self, images: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        probabilities, predictions = (x.cpu() for x in logits.float().softmax(1).max(1))
        targets = targets.cpu()
        np.add.at(self.confusion, (targets.numpy(), predictions.numpy()), 1)
        for image, target, prediction, probability in zip(images, targets, predictions, probabilities, strict=True):
            mistake = bool(target != prediction) and self._mistakes < N_PICTURES // 2
            self._mistakes += mistake
            spread = self._seen * (N_PICTURES // 2) // self._n_images  # this many even parts of the images are seen
            if mistake or spread < (self._seen + 1) * (N_PICTURES // 2) // self._n_images:
                pixels = to_image(image, self._data_config["mean"], self._data_config["std"])
                self.pictures.append(report.Picture(pixels, int(target), int(prediction), float(probability)))
            self._seen += 1


class FullBatches(nn.Module):
    """A compiled model that is not compiled anew for a last, smaller batch: blank images fill that up."""

    def __init__(self, model: nn.Module, batch_size: int):
        super().__init__()
        self.model = model
        self.batch_size = batch_size

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        n_images = len(images)
        return self.model(F.pad(images, (0, 0, 0, 0, 0, 0, 0, self.batch_size - n_images)))[:n_images]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader | StreamLoader,
    options: Namespace,
    process: Process,
    details: Details | None = None,
    desc: str = "",
    stop: StopRequest | None = None,
) -> dict[str, float]:
    """loss, top1 and top5 (in per cent) over the images of all processes, each counted once.

    With `stop`, nothing as soon as a process was asked to stop.
    """
    model.eval()
    evaluator = ClassificationEvaluator(device=process.device)
    amp_dtype = resolve_amp_dtype(options.amp_dtype, process.device) if options.amp else None
    hidden = None if process.primary else True
    for images, targets in tqdm(loader, desc=desc, disable=hidden, leave=False, unit="batch"):
        if options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(process.device, amp_dtype):
            logits = model(images)
        evaluator.update(logits, targets)
        if details:
            details.update(images, logits, targets)
        if stop and stop.number:
            break
    if stop and stop.agreed():
        return {}
    if details:
        details.confusion = sum(process.gather(details.confusion))
    if not sum(process.gather(int(evaluator.counts[0]))):
        first = f": {loader.unreadable[0]}" if loader.unreadable else ""
        raise RunError(f"not one validation image could be read{first}")
    return dict(evaluator.compute(distributed=process.distributed))


def write_details(folder: Path, details: Details, class_names: list[str]) -> None:
    """Confusion matrix, per-class accuracies and pictures of an evaluation."""
    report.write_confusion(folder / "confusion_matrix.png", details.confusion, class_names)
    report.write_per_class(folder / "per_class.csv", details.confusion, class_names)
    report.write_sheet(folder / "predictions.png", details.pictures, class_names)


def log_unreadable(loader: Loader | StreamLoader, process: Process) -> None:
    """Count the images that could not be read, over all processes, and name some."""
    names = sorted({name for names in process.gather(loader.unreadable) for name in names})
    if names:
        shown = "\n  ".join(names[:10])
        _logger.warning(f"{len(names)} images could not be read and were skipped:\n  {shown}")
