"""Loss of a classifier, and the weights of its classes."""

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from timm.loss import BinaryCrossEntropy, create_classification_loss
from torch import nn

from ..common.errors import RunError, some, suggest
from .groups import require
from .settings import Options

_logger = logging.getLogger(__name__)

SHOWN = 10  # weights in the log


def class_weights(options: Options, class_names: Sequence[str], counts: np.ndarray | None) -> list[float] | None:
    """The weight of each class in the loss, as --class-weights asks, or None.

    Args:
        options: With `class_weights`: auto for the inverse of the frequency, 1 in the mean over the images; or a file.
        class_names: In the order of their numbers.
        counts: Training images of each class; auto needs them.

    Raises:
        RunError: a file that cannot be read, or does not give every class a positive weight.
    """
    if not options.class_weights:
        return None
    if options.class_weights == "auto":
        assert counts is not None  # `sources.count_classes` sees to it
        present = counts > 0
        weights = np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 1).tolist()
    else:
        weights = _read_weights(options.class_weights, class_names)
    shown = some((f"{name} {weight:.3g}" for name, weight in zip(class_names, weights, strict=True)), SHOWN)
    _logger.info(f"weights of the classes in the loss: {shown}")
    return weights


def _read_weights(path: str, class_names: Sequence[str]) -> list[float]:
    """The weights of a file with a line `class,weight` for every class."""
    try:
        rows = [*csv.reader(Path(path).read_text(encoding="utf-8-sig").splitlines())]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"cannot read --class-weights {path}: {getattr(error, 'strerror', error)}") from error
    weights: dict[str, float] = {}
    for number, row in enumerate(rows, 1):
        if not row or row == ["class", "weight"]:
            continue
        place = f"{path}, line {number}:"
        require(len(row) == 2, f"{place} expected class,weight, got {','.join(row)!r:.80}")
        name, text = (cell.strip() for cell in row)
        require(name in class_names, f"{place} the data has no class {name!r:.80}{suggest(name, class_names)}")
        require(name not in weights, f"{place} the class {name!r} has a weight already")
        try:
            weights[name] = float(text)
        except ValueError:
            weights[name] = math.nan
        require(0 < weights[name] < math.inf, f"{place} a weight must be a positive number, got {text!r:.80}")
    missing = [name for name in class_names if name not in weights]
    require(not missing, f"{path} lacks the weight of {some(missing)}")
    return [weights[name] for name in class_names]


def build_loss(options: Options, weights: Sequence[float] | None) -> nn.Module:
    """The loss of logits (b, num_classes) and targets: (b,), or (b, num_classes) with mixup or several labels."""
    if weights is not None:
        return _Float32Loss(_WeightedLoss(options, weights))
    loss = create_classification_loss(
        "bce" if options.bce_loss or options.multi_label else "ce",
        multi_label=options.multi_label,
        smoothing=options.smoothing,
        soft_targets=options.mixes,
        bce_target_thresh=options.bce_target_thresh,
        bce_sum=options.bce_sum,
    )
    return _Float32Loss(loss)


class _Float32Loss(nn.Module):
    """A loss of float32 logits: autocast on a CPU would compute it in bfloat16."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(logits.float(), targets)


class _WeightedLoss(nn.Module):
    """The mean over the images of their losses times the weights of their classes; mixed images weigh in proportion.

    PyTorch's own weights multiply each class's part of a smoothed target instead. A class a hundred times as heavy as
    another would then be the best answer to the images of both.
    """

    weights: torch.Tensor

    def __init__(self, options: Options, weights: Sequence[float]):
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights))
        self.mixed_smoothing = options.smoothing
        self.sums = options.bce_sum
        smoothing = 0 if options.mixes else options.smoothing  # mixup's targets have theirs already
        self.loss: nn.Module = nn.CrossEntropyLoss(reduction="none", label_smoothing=smoothing)
        if options.bce_loss:
            self.loss = BinaryCrossEntropy(smoothing, options.bce_target_thresh, reduction="none")

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if targets.ndim == 1:
            weights = self.weights[targets]
        else:
            smoothing = self.mixed_smoothing
            weights = (targets @ self.weights - smoothing * self.weights.mean()) / (1 - smoothing)
        losses = self.loss(logits, targets)
        if losses.ndim == 2:  # one a class
            losses = losses.sum(1) if self.sums else losses.mean(1)
        return (losses * weights).mean()


def share_of_hits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How much of a batch has the right class as the most probable one, 0 to 1; of mixed images, that of the larger
    part. Logits are (b, classes), targets (b,), or (b, classes) where images are mixed.
    """
    classes = targets if targets.ndim == 1 else targets.argmax(1)
    return (logits.detach().argmax(1) == classes).float().mean()
