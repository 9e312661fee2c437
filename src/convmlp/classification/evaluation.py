"""Evaluation of a classifier: figures over all processes."""

import logging
import math

import torch
import torch.distributed as dist
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator
from torch import nn
from tqdm import tqdm

from ..common.devices import autocast, resolve_amp_dtype
from ..common.errors import RunError, plural
from ..common.signals import StopRequest
from .loaders import Loader
from .multilabel import LabelPredictions
from .predictions import Predictions
from .process import Process
from .settings import Data, Options

_logger = logging.getLogger(__name__)


class Evaluator(ClassificationEvaluator):
    """timm's figures, and the mean recall and the mean F1 of the classes, all in per cent.

    The means are scikit-learn's: of the recall over the classes that have images, of F1 over those that have images or
    are predicted.
    """

    def __init__(self, num_classes: int, device: torch.device):
        super().__init__(device=device)
        # of each class the images, the predictions and the right ones, (3, num_classes)
        self.by_class = torch.zeros(3, num_classes, dtype=torch.int64, device=device)

    def update(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Count a batch: logits (b, num_classes), targets (b,)."""
        super().update(logits, targets)
        predicted = logits.argmax(1)
        ones = torch.ones_like(targets)
        for counts, classes, each in zip(
            self.by_class, (targets, predicted, targets), (ones, ones, predicted == targets), strict=True
        ):
            counts.scatter_add_(0, classes, each.long())  # bincount would wait for a GPU

    def compute(self, distributed: bool = False) -> dict[str, float]:
        """All figures; `predicted_classes` is how many classes are predicted at all."""
        counts = self.by_class.clone()
        if distributed:
            dist.all_reduce(counts)
        images, predicted, right = counts.cpu().numpy()
        recall = right[images > 0] / images[images > 0]
        seen = images + predicted > 0
        f1 = 2 * right[seen] / (images + predicted)[seen]
        return {
            **super().compute(distributed),
            "balanced_accuracy": 100 * float(recall.mean()) if len(recall) else math.nan,
            "macro_f1": 100 * float(f1.mean()) if len(f1) else math.nan,
            "predicted_classes": int((predicted > 0).sum()),
        }


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader,
    options: Options,
    process: Process,
    predictions: Predictions | LabelPredictions | None = None,
    desc: str = "evaluating",
    stop: StopRequest | None = None,
) -> dict[str, float]:
    """The figures of `make_evaluator` over the images of all processes, each counted once.

    With `stop`, nothing as soon as a process was asked to stop.
    """
    model.eval()
    evaluator = make_evaluator(options, loader.num_classes, process.device)
    amp_dtype = resolve_amp_dtype(options.amp_dtype, process.device) if options.amp else None
    hidden = None if process.primary else True
    for images, targets in tqdm(loader, desc=desc, disable=hidden, leave=False, unit="batch"):
        if options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(process.device, amp_dtype):
            logits = model(images)
        evaluator.update(logits, targets)
        if predictions:
            predictions.update(images, logits, targets)
        if stop and stop.number:
            break
    if stop and stop.agreed():
        return {}
    if not sum(process.gather(int(evaluator.counts[0]))):
        first = f": {loader.unreadable[0]}" if loader.unreadable else ""
        raise RunError(f"not one validation image could be read{first}")
    if predictions:
        predictions.gather(process, loader.seen)
    return dict(evaluator.compute(distributed=process.distributed))


def make_evaluator(options: Data, num_classes: int, device: torch.device) -> ClassificationEvaluator:
    """What computes the figures of an evaluation."""
    return MultiLabelClassificationEvaluator(device) if options.multi_label else Evaluator(num_classes, device)


def make_predictions(options: Data, loader: Loader) -> Predictions | LabelPredictions:
    """What keeps the predictions of an evaluation."""
    return LabelPredictions() if options.multi_label else Predictions(loader.num_classes)


def log_unreadable(loader: Loader, process: Process) -> None:
    """Count the images that could not be read, over all processes, and name some."""
    names = sorted({name for names in process.gather(loader.unreadable) for name in names})
    if names:
        shown = "\n  ".join(names[:10])
        _logger.warning(f"{plural(len(names), 'image')} could not be read:\n  {shown}")
