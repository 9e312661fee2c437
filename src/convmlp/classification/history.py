"""History of a run: the figures of its epochs, and which epoch is the best."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .settings import Options

_logger = logging.getLogger(__name__)

UNEVEN = 1.5  # classes are, where the largest has more than so many times the images of the smallest


def choose_metric(options: Options, counts: np.ndarray | None, resumed: Mapping[str, Any] | None) -> str:
    """What makes an epoch the best: --eval-metric, or what its auto stands for.

    That is mAP for several labels an image, and what a resumed run had. Else it is balanced accuracy where the training
    classes are uneven, and top1 where they are even or the data does not tell.
    """
    if options.eval_metric != "auto":
        return options.eval_metric
    if options.multi_label:
        return "map"
    if resumed:
        kept = resumed.get("eval_metric", resumed["args"].get("eval_metric", "auto"))  # the latter in old checkpoints
        if kept != "auto":
            return str(kept)
    if counts is None or counts.max() <= UNEVEN * counts.min():
        return "top1"
    _logger.info(
        f"the best epoch is the one of the best balanced accuracy, because the classes are uneven ({counts.min()} to "
        f"{counts.max()} training images); --eval-metric top1 counts all images alike"
    )
    return "balanced_accuracy"


class History:
    """The rows of summary.csv so far, one an epoch, and the number of the best one."""

    def __init__(self, metric: str, averaged: bool):
        self.metric = metric
        self.prefix = "eval_ema_" if averaged else "eval_"  # of the figures that matter
        self.rows: list[dict[str, float]] = []
        self.best_epoch = 0  # the one that best.pth holds

    def add(self, row: dict[str, float]) -> None:
        """Append the row of the next epoch."""
        self.rows.append(row)
        if self._quality(row) > self._quality(self.rows[self.best_epoch]):
            self.best_epoch = len(self.rows) - 1

    def epochs_since_better(self) -> int:
        """How many epochs have gone by since the metric was last better than ever before."""
        values = [self._quality(row)[:2] for row in self.rows]
        return len(values) - 1 - values.index(max(values)) if values else 0

    def figure(self, row: dict[str, float]) -> float:
        """The metric of an epoch, NaN where an older version did not record it."""
        return row.get(self.prefix + self.metric, math.nan)

    def _quality(self, row: dict[str, float]) -> tuple[bool, float, float]:
        """What makes an epoch better: a figure at all, a better one, and of equal ones the lower validation loss."""
        metric, loss = self.figure(row), row[f"{self.prefix}loss"]
        if math.isnan(metric):
            return False, 0, 0
        return True, -metric if self.metric == "loss" else metric, -math.inf if math.isnan(loss) else -loss

    def collapse(self, options: Options) -> str:
        """What to say after an epoch that predicts one class for all images, if the one before did not; or ''."""
        *_, before, now = [{}, *self.rows]
        if not _predicts_one_class(now) or _predicts_one_class(before):
            return ""
        advice = f"a lower --lr (now {options.lr:g}), a longer --warmup-epochs (now {options.shortened_warmup})"
        if not options.pretrained and not options.initial_checkpoint:
            advice += ", --pretrained weights"
        return f"all validation images are taken for one class: nothing is being learned. If it stays so, try {advice}"


def _predicts_one_class(row: dict[str, float]) -> bool:
    """Whether the weights of an epoch take the images of two or more classes for one; averages lag behind."""
    return row.get("eval_predicted_classes") == 1 and row["eval_top1"] < 100
