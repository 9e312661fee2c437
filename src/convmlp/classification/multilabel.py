"""Several labels an image: what an evaluation finds, and from which probability on each class counts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .process import Process
from .tables import write_table


class Labels(NamedTuple):
    """How one class is found: (num_images,) probabilities turned into yes or no at the best threshold."""

    images: int  # that have the label
    threshold: float
    precision: float
    recall: float
    f1: float


def best_labels(probabilities: np.ndarray, targets: np.ndarray) -> Labels:
    """The threshold of a class whose F1 is best, from probabilities (n,) and truth (n,) of 0 and 1.

    It lies half way to the next lower probability. A class that no image has keeps 0.5.
    """
    n_positive = int(targets.sum())
    if not n_positive:
        return Labels(0, 0.5, 0.0, 0.0, 0.0)
    order = np.argsort(-probabilities, kind="stable")
    values, hits = probabilities[order], np.cumsum(targets[order])
    counts = np.arange(1, len(values) + 1)
    lower = np.append(values[1:], 0.0)
    f1 = np.where(values > lower, 2 * hits / (counts + n_positive), 0)  # equal values stand on one side
    best = int(f1.argmax())
    threshold = float(values[best] + lower[best]) / 2
    return Labels(n_positive, threshold, hits[best] / counts[best], hits[best] / n_positive, f1[best])


class LabelPredictions:
    """All predictions of an evaluation, for thresholds and a table of the classes."""

    def __init__(self) -> None:
        self.probabilities: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []
        self.labels: list[Labels] = []

    def update(self, images: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Keep a batch."""
        self.probabilities.append(logits.float().sigmoid().cpu())
        self.targets.append(targets.cpu())

    def gather(self, process: Process, indices: Sequence[int]) -> None:
        """Bring the predictions of all processes together, and find the thresholds."""
        shares = process.gather((self.probabilities, self.targets))
        probabilities, targets = (torch.cat([part for share in shares for part in share[i]]).numpy() for i in (0, 1))
        self.labels = [best_labels(*columns) for columns in zip(probabilities.T, targets.T, strict=True)]

    def fitted(self) -> dict[str, Any]:
        """What the checkpoint learns of the evaluation."""
        return {"thresholds": [each.threshold for each in self.labels]}

    def class_figures(self) -> list[dict[str, float]]:
        """The figures of each class, shares in per cent."""
        return [
            {"images": each.images, "threshold": each.threshold}
            | {key: 100 * float(getattr(each, key)) for key in ("precision", "recall", "f1")}
            for each in self.labels
        ]

    def figures(self) -> dict[str, Any]:
        """Nothing beside those of the classes."""
        return {}

    def figures_line(self, metrics: dict[str, float]) -> str:
        """What the log says of an evaluation."""
        f1 = 100 * sum(each.f1 for each in self.labels) / len(self.labels)
        return f"mAP {metrics['map']:.2f} %, macro F1 {f1:.2f} % at the thresholds, loss {metrics['loss']:.4f}"

    def table(self, class_names: Sequence[str]) -> str:
        """The classes with their F1, the worst first; of many classes, the worst ones."""
        rows = sorted(zip(self.labels, class_names, strict=True), key=lambda row: row[0].f1)
        lines = [f"F1 {100 * each.f1:6.2f} %  of {each.images}  {name}" for each, name in rows[:20]]
        return "\n".join(lines + (["... all are in per_class.csv"] if len(rows) > 20 else []))

    def write(self, folder: Path, class_names: Sequence[str], data_config: Any) -> None:
        """per_class.csv."""
        rows = [[name, *each] for name, each in zip(class_names, self.labels, strict=True)]
        write_table(folder / "per_class.csv", ["class", *Labels._fields], rows)
