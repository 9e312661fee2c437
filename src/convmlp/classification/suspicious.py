"""Labels that are probably wrong: images that a model is sure belong to another class."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from .check import MOST_IMAGES, image_names
from .data import ImageData
from .evaluation import evaluate
from .loaders import IndexedLoader
from .predictions import Predictions
from .sources import Source

if TYPE_CHECKING:
    from .trainer import Trainer

SUSPICIOUS = "suspicious.csv"


class Suspicion(NamedTuple):
    """An image by its number, its label and the class that it more probably has, with the probabilities of both."""

    index: int  # type: ignore[assignment]  # in the place of the method that tuples have
    label: int
    suggested: int
    label_probability: float
    suggested_probability: float


class Doubt(NamedTuple):
    """A row of suspicious.csv."""

    path: str
    label: str
    suggested: str
    split: str
    label_probability: float
    suggested_probability: float


def find_suspicious(probabilities: torch.Tensor, labels: torch.Tensor) -> list[Suspicion]:
    """What confident learning (Northcutt et al. 2021, arXiv:1911.00068) takes for mislabelled, the worst first.

    An image of probabilities (n, classes) counts as another class than its label (n,) says, if it has at least the
    probability of that class that images labelled so have on average, and more than of its own label.
    """
    masks = [labels == number for number in range(probabilities.shape[1])]
    usual = torch.tensor([probabilities[own, number].mean() if own.any() else 2.0 for number, own in enumerate(masks)])
    of_suggested, suggested = probabilities.where(probabilities >= usual, 0).max(1)
    of_label = probabilities.gather(1, labels[:, None])[:, 0]
    margin = of_suggested - of_label
    worst = margin.argsort(descending=True, stable=True)[: int((margin > 0).sum())]
    columns = (worst, labels[worst], suggested[worst], of_label[worst], of_suggested[worst])
    return [Suspicion(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def check_labels(trainer: "Trainer", data: ImageData, model: nn.Module, predictions: Predictions) -> list[Doubt]:
    """Labels that are probably wrong, the worst first; all processes take part.

    Those of the validation images by their `predictions`; those of the training images, if they are not very many, by
    what the model says of them now, although it has learned these labels.
    """
    looked_at = [("val", data.val, predictions)]
    if isinstance(data.train, Source) and len(data.train) <= MOST_IMAGES:
        n_classes = len(trainer.class_names)
        parts = (trainer.options, trainer.data_config, trainer.process, n_classes)
        loader = IndexedLoader(data.train, *parts, train=False)
        loader.share_notes(trainer.train_loader)
        found = Predictions(n_classes)
        evaluate(model, loader, trainer.options, trainer.process, found, desc="checking the labels")
        looked_at.append(("train", data.train, found))
    doubts = []
    for split, source, found in looked_at:
        paths = image_names(source)
        for each in find_suspicious(found.logits.softmax(1), found.targets):
            label, suggested = (trainer.class_names[number] for number in (each.label, each.suggested))
            probabilities = (each.label_probability, each.suggested_probability)
            doubts.append(Doubt(paths[found.indices[each.index]], label, suggested, split, *probabilities))
    return sorted(doubts, key=lambda each: each.label_probability - each.suggested_probability)
