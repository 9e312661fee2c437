"""Calibration: how often a classifier that says 80 % is right, and the temperature that makes it 80 %."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

N_BINS = 15  # of equal width, as in the paper below


class Bin(NamedTuple):
    """The images whose most probable class has a probability in a range: how many, its mean, the share of hits."""

    images: int
    confidence: float
    accuracy: float


class Calibration(NamedTuple):
    """What a temperature does to the expected calibration error, which is in 0 to 1.

    `error_after` is of images that the temperature was not fitted to: each half has the temperature of the other.
    """

    temperature: float
    error: float
    error_after: float
    bins: list[Bin]  # at temperature 1, without those that hold no image


def calibrate(logits: torch.Tensor, targets: torch.Tensor) -> Calibration:
    """The calibration of logits (n, classes) with targets (n,), after Guo et al. 2017, arXiv:1706.04599."""
    halves = [slice(start, None, 2) for start in (0, 1)]
    cooled = logits.clone()
    for own, other in zip(halves, reversed(halves), strict=True):
        cooled[own] /= fit_temperature(logits[other], targets[other])
    bins = reliability(logits, targets)
    return Calibration(fit_temperature(logits, targets), _error(bins), _error(reliability(cooled, targets)), bins)


def fit_temperature(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """What to divide logits (n, classes) by, so that the cross-entropy with targets (n,) is least.

    The square of its logarithm counts as one more image, so that a few images that are all right do not lead to 0.
    """

    def loss(logarithm: float) -> float:
        return F.cross_entropy(logits / math.exp(logarithm), targets, reduction="sum").item() + logarithm**2

    return math.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x)


def reliability(logits: torch.Tensor, targets: torch.Tensor) -> list[Bin]:
    """The images in bins of how probable the most probable class is."""
    confidence, predicted = logits.softmax(1).max(1)
    numbers = (confidence * N_BINS).long().clamp(max=N_BINS - 1)
    found = []
    for number in numbers.unique():
        own = numbers == number
        hits = (predicted[own] == targets[own]).float().mean().item()
        found.append(Bin(int(own.sum()), confidence[own].mean().item(), hits))
    return found


def _error(bins: list[Bin]) -> float:
    """The expected calibration error: the mean distance of confidence and accuracy over the images."""
    n_images = sum(each.images for each in bins)
    return sum(each.images * abs(each.confidence - each.accuracy) for each in bins) / n_images
