"""Labels that are probably wrong: images that a model is sure belong to another class."""

from typing import NamedTuple

import torch

SUSPICIOUS = "suspicious.csv"


class Suspicion(NamedTuple):
    """An image (a number), its label and the class that it more probably has, with the probabilities of both."""

    index: int  # type: ignore[assignment]  # in the place of the method that tuples have
    label: int
    suggested: int
    of_label: float
    of_suggested: float


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
