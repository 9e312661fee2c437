"""Predictions of an evaluation: logits for figures and temperature, and images worth showing."""

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.errors import plural
from ..common.images import to_image
from . import charts
from .calibration import Calibration, calibrate
from .charts import Prediction
from .loaders import DataConfig
from .process import Process

N_SHOWN = 20  # mistakes, and as many right answers


class Predictions:
    """All predictions; of the mistakes the surest images are kept, of as many classes as possible, of the hits the
    least sure.

    After `gather` they are those of all processes: `logits` (n, classes), `targets` (n,), and `indices`, which image
    each is of, or nothing for a stream.
    """

    def __init__(self, num_classes: int):
        self.num_classes = num_classes
        self.mistakes: list[Prediction] = []
        self.hits: list[Prediction] = []
        self.logits = torch.empty(0, num_classes)
        self.targets = torch.empty(0, dtype=torch.long)
        self.indices: list[int] = []
        self._batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._n_seen = 0

    def update(self, images: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Keep a batch."""
        logits, targets = logits.float().cpu(), targets.cpu()
        self._batches.append((logits, targets))
        probabilities, predicted = logits.softmax(1).max(1)
        columns = (targets.tolist(), predicted.tolist(), probabilities.tolist())
        for image, *answer in zip(images, *columns, strict=True):
            self._show(Prediction(image, self._n_seen, *answer))
            self._n_seen += 1

    def _show(self, each: Prediction) -> None:
        """Keep it if it is worth showing, without the batch that it is a part of."""
        if each.target != each.predicted:
            self._keep_mistake(each._replace(image=each.image.clone()))
        elif len(self.hits) < N_SHOWN or each.probability < self.hits[-1].probability:
            self.hits = self.hits[: N_SHOWN - 1] + [each._replace(image=each.image.clone())]
            self.hits.sort(key=lambda hit: hit.probability)

    def _keep_mistake(self, mistake: Prediction) -> None:
        """Keep it, and if those are too many drop the least sure one of the class that has most."""
        self.mistakes.append(mistake)
        self.mistakes.sort(key=lambda each: -each.probability)
        if len(self.mistakes) > N_SHOWN:
            counts = Counter(each.target for each in self.mistakes)
            crowded = max(range(len(self.mistakes)), key=lambda i: (counts[self.mistakes[i].target], i))
            del self.mistakes[crowded]

    def gather(self, process: Process, indices: Sequence[int]) -> None:
        """Bring those of all processes together; `indices` are this one's images."""
        own = (*map(torch.cat, zip(*self._batches, strict=True)),) if self._batches else (self.logits, self.targets)
        shown = [
            each._replace(image=each.image.cpu(), index=indices[each.index] if indices else -1)
            for each in (*self.mistakes, *self.hits)
        ]
        shares = process.gather((*own, list(indices), shown))
        self.logits, self.targets = (torch.cat([share[i] for share in shares]) for i in (0, 1))
        self.indices = [index for share in shares for index in share[2]]
        self.mistakes, self.hits = [], []
        for share in shares:
            for each in share[3]:
                self._show(each)

    @cached_property
    def confusion(self) -> np.ndarray:
        """Counts (true class, predicted class)."""
        pairs = self.targets * self.num_classes + self.logits.argmax(1)
        return torch.bincount(pairs, minlength=self.num_classes**2).view(self.num_classes, -1).numpy()

    @cached_property
    def calibration(self) -> Calibration:
        return calibrate(self.logits, self.targets)

    def fitted(self) -> dict[str, Any]:
        """What the checkpoint learns of the evaluation."""
        return {"temperature": self.calibration.temperature}

    def class_figures(self) -> list[dict[str, float]]:
        """The figures of each class, see `charts.class_figures`."""
        return charts.class_figures(self.confusion)

    def figures(self) -> dict[str, Any]:
        """Confusion counts (true class, predicted class) and calibration, in plain values."""
        calibration = self.calibration._asdict() | {"bins": [each._asdict() for each in self.calibration.bins]}
        return {"confusion": self.confusion.tolist(), "calibration": calibration}

    def figures_line(self, metrics: dict[str, float]) -> str:
        """What the log says of an evaluation."""
        images, right = self.confusion.sum(), np.trace(self.confusion)
        return (
            f"top-1 {metrics['top1']:.2f} % ({right} of {plural(images, 'image')}), top-5 {metrics['top5']:.2f} %, "
            f"balanced accuracy {metrics['balanced_accuracy']:.2f} %, macro F1 {metrics['macro_f1']:.2f} %, "
            f"loss {metrics['loss']:.4f}"
        )

    def table(self, class_names: list[str]) -> str:
        """The classes with their accuracies."""
        return charts.per_class_table(self.confusion, class_names)

    def write(self, folder: Path, class_names: list[str], data_config: DataConfig) -> None:
        """Confusion matrix, per-class accuracies and images with their predictions."""
        charts.write_confusion(folder / "confusion_matrix.png", self.confusion, class_names)
        charts.write_per_class(folder / "per_class.csv", self.confusion, class_names)
        mean, std = data_config["mean"], data_config["std"]
        kept = [each._replace(image=to_image(each.image, mean, std)) for each in (*self.mistakes, *self.hits)]
        charts.write_predictions(folder / "predictions.png", kept, self.confusion, class_names)
