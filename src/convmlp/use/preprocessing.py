"""A classifier from pixels to probabilities, in plain arithmetic that every runtime computes alike."""

import math
from collections.abc import Callable

import torch
from torch import nn

from ..common.errors import RunError
from .classifier import Classifier

Filter = Callable[[torch.Tensor], torch.Tensor]


def _triangle(x: torch.Tensor) -> torch.Tensor:
    return (1 - x.abs()).clamp(min=0)


def _cubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' cubic with a = -1/2."""
    x = x.abs()
    inner, outer = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    return torch.where(x < 1, inner, torch.where(x < 2, outer, torch.zeros_like(x)))


FILTERS: dict[str, Filter] = {"bilinear": _triangle, "bicubic": _cubic}

GREY = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # Pillow's weights of red, green and blue


class Preprocessed(nn.Module):
    """Images of one size as any program decodes them, (n, h, w, 3) uint8, to their probabilities, (n, classes) float32.

    They are resized, cropped and normalised as `Classifier.preprocess` does with Pillow. The resize with the crop is
    a product with one matrix for each side, rounded to whole values after each, as Pillow rounds. A runtime's own
    resize differs more: they do not round in between, and not all of them smooth what they make smaller.
    """

    mean: torch.Tensor
    std: torch.Tensor
    fill: torch.Tensor
    weights: torch.Tensor

    def __init__(self, classifier: Classifier, network: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        config = classifier.data_config
        interpolation = config["interpolation"]
        if interpolation not in FILTERS:
            raise RunError(f"preprocessing in a file resizes {' or '.join(FILTERS)}, not {interpolation}")
        self.network = network
        self.dtype = dtype
        self.interpolation = interpolation
        self.mode = config["crop_mode"] or "center"
        self.crop = [int(side) for side in config["input_size"][1:]]
        self.scaled = [math.floor(side / config["crop_pct"]) for side in self.crop]
        self.padded = self.mode == "border" or config["crop_pct"] > 1
        self.grey = classifier.image_mode == "L"
        self.several = bool(classifier.thresholds)
        self.temperature = classifier.temperature
        fill = [float(round(255 * value)) if self.mode == "border" else 0.0 for value in config["mean"]]
        for name, values in {"mean": config["mean"], "std": config["std"], "fill": fill}.items():
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))
        self.register_buffer("weights", torch.tensor(GREY))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        h, w = (torch.full((), side, dtype=torch.int64) for side in images.shape[1:3])
        x = images.permute(0, 3, 1, 2).float()
        if self.grey:
            x = _round((x * self.weights.view(3, 1, 1)).sum(1, keepdim=True))
        height, width = self._resized(h, w)
        rows, inside_rows = self._matrix(images.shape[1], height, self.crop[0])
        columns, inside_columns = self._matrix(images.shape[2], width, self.crop[1])
        x = _round(x @ columns.T)
        x = _round(rows @ x)
        if self.padded:
            x = torch.where(torch.logical_and(inside_rows[:, None], inside_columns), x, self.fill)
        logits = self.network(((x / 255 - self.mean) / self.std).to(self.dtype)).float() / self.temperature
        return logits.sigmoid() if self.several else logits.softmax(1)

    def _resized(self, h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The height and width in pixels of the whole image after resizing, as timm and torchvision round them."""
        rows, columns = self.scaled
        if self.mode == "squash":
            return torch.full_like(h, rows), torch.full_like(w, columns)
        if self.mode == "center" and rows == columns:
            short = torch.minimum(h, w)
            return tuple(torch.div(rows * side, short, rounding_mode="floor") for side in (h, w))  # type: ignore[return-value]
        ratios = h.double() / rows, w.double() / columns
        ratio = torch.maximum(*ratios) if self.mode == "border" else torch.minimum(*ratios)
        return tuple((side.double() / ratio).round().long() for side in (h, w))  # type: ignore[return-value]

    def _matrix(self, side: int, resized: torch.Tensor, crop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What takes `side` pixels to the middle `crop` of `resized` ones, (crop, side), and which of those there are.

        In float64: in float32 the places of pixels are rounded too coarsely in large images.
        """
        margin = resized - crop
        first = torch.where(margin < 0, (margin / 2).ceil(), (margin.double() / 2).round())
        places = torch.arange(crop, dtype=torch.float64) + first
        scale = torch.full((), side, dtype=torch.float64) / resized
        distances = torch.arange(side, dtype=torch.float64) + 0.5 - ((places + 0.5) * scale)[:, None]
        weights = FILTERS[self.interpolation](distances / scale.clamp(min=1))
        inside = torch.logical_and(places >= 0, places < resized)
        return (weights / weights.sum(1, keepdim=True)).float(), inside


def _round(x: torch.Tensor) -> torch.Tensor:
    """To the whole values of pixels, halves upwards."""
    return (x + 0.5).floor().clamp(0, 255)
