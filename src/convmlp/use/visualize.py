"""What models see: feature maps, class activation maps and first filters, as figures. `convmlp visualize`.

from convmlp.use.classifier import open_classifier
from convmlp.use.visualize import feature_figure

figure = feature_figure(image, [open_classifier("convmlp_s"), open_classifier("resnet50")])
figure.savefig("features.png")
"""

import math
import textwrap
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torchvision.utils import make_grid

from ..common.activation import activation_maps, blend
from ..common.errors import RunError, suggest
from ..common.figures import new_figure, plain
from ..common.images import to_image
from ..timm_models import layer_names
from .classifier import Classifier
from .predict import classify

MAP_ROWS, MAP_COLUMNS = 3, 4
LEVELS = 4
MAX_FILTERS = 64


def feature_figure(image: Image.Image, classifiers: Sequence[Classifier]) -> Figure:
    """A row a model: its input, then a 3x4 grid of feature maps for each of four stages, as in the paper's repository.

    Shown are the twelve channels of a stage whose values vary most over the image, each from its own 2nd to its
    98th percentile, dark to bright. A model of more than four levels shows the last four strides, one of a single
    stride four levels evenly apart.
    """
    figure, rows = _rows(classifiers, 2.6 * (LEVELS + 0.8), 2.3, [0.72] + [1] * LEVELS)
    for axes, classifier in zip(rows, classifiers, strict=True):
        _show_input(axes[0], image, classifier)
        for axis, maps in zip(axes[1:], feature_maps(image, classifier), strict=False):
            channels, height, width = maps.shape
            axis.imshow(_mosaic(maps), interpolation="nearest")
            axis.set_title(f"{channels} channels of {height}x{width}", fontsize=8)
    return figure


@torch.inference_mode()
def feature_maps(image: Image.Image, classifier: Classifier) -> list[np.ndarray]:
    """The maps of up to four levels of a model, each (channels, h, w)."""
    model = classifier.model
    if not hasattr(model, "forward_intermediates"):
        raise RunError(f"{classifier.name} does not give its feature maps: timm has no forward_intermediates for it")
    maps = model.forward_intermediates(classifier.preprocess([image]), output_fmt="NCHW", intermediates_only=True)
    levels = list(model.feature_info)[-len(maps) :]
    if len({info["reduction"] for info in levels}) == 1:
        chosen = np.unique(np.linspace(0, len(maps), LEVELS + 1)[1:].round().astype(int) - 1)
    else:
        last_of_stride = {info["reduction"]: i for i, info in enumerate(levels)}
        chosen = np.array(sorted(last_of_stride.values())[-LEVELS:])
    return [maps[i][0].float().cpu().numpy() for i in chosen]


def _mosaic(maps: np.ndarray) -> np.ndarray:
    """(c, h, w) -> one image of 3x4 maps, RGBA in 0 to 1, those that vary most first."""
    strongest = maps.std((1, 2)).argsort(kind="stable")[::-1][: MAP_ROWS * MAP_COLUMNS]
    low, high = np.percentile(maps[strongest], (2, 98), axis=(1, 2), keepdims=True)
    scaled = np.clip((maps[strongest] - low) / np.maximum(high - low, 1e-12), 0, 1)
    return _tiles(matplotlib.colormaps["viridis"](scaled), MAP_COLUMNS)


def _tiles(tiles: np.ndarray, columns: int) -> np.ndarray:
    """Images (n, h, w, channels) side by side on white, with gaps of a thirtieth of their size."""
    repeat = max(1, 120 // max(tiles.shape[1:3]))  # for gaps narrower than the pixels of a small map
    tiles = tiles.repeat(repeat, 1).repeat(repeat, 2)
    gap = max(1, max(tiles.shape[1:3]) // 30)
    grid = make_grid(torch.from_numpy(tiles).permute(0, 3, 1, 2), columns, gap, pad_value=1)
    return grid.permute(1, 2, 0).numpy()


def cam_figure(image: Image.Image, classifiers: Sequence[Classifier], wanted: Sequence[str] = ()) -> Figure:
    """Grad-CAM (Selvaraju et al. 2017): where a model looks for a class, red where most; a row a model.

    `wanted` are names or numbers of the classes to look for; by default the one that each model finds.
    """
    columns, side = 1 + max(1, len(wanted)), 2.7
    figure, rows = _rows(classifiers, side * columns, 3.1, [1] * columns)
    for axes, classifier in zip(rows, classifiers, strict=True):
        probabilities = classify([image], classifier)[0]
        indices = [find_class(classifier, name) for name in wanted] or [int(probabilities.argmax())]
        pixels = _show_input(axes[0], image, classifier)
        for axis, index in zip(axes[1:], indices, strict=True):
            heat_map = activation_map(image, classifier, index)
            axis.imshow(blend(pixels, heat_map))
            found = "" if heat_map.any() else ": nowhere found"
            name = f"{classifier.class_names[index]} ({100 * probabilities[index]:.0f} %){found}"
            axis.set_title(_wrap(name, side, 8), fontsize=8)
    return figure


def find_class(classifier: Classifier, wanted: str) -> int:
    """The number of a class by its name, one of its synonyms ("tabby, tabby cat" is both), or its number."""
    numbered = reversed([*enumerate(classifier.class_names)])  # of two classes of one name the first is meant
    names = {spelling.lower(): i for i, name in numbered for spelling in (name, *name.split(", "))}
    if wanted.lower() in names:
        return names[wanted.lower()]
    if wanted.isdecimal() and int(wanted) < len(classifier.class_names):
        return int(wanted)
    raise RunError(f"{classifier.title} has no class {wanted}{suggest(wanted, names)}")


def activation_map(image: Image.Image, classifier: Classifier, class_index: int) -> np.ndarray:
    """Grad-CAM of a class on the last feature map, 0 to 1, as large as the model's input, (h, w)."""
    return activation_maps(classifier.model, classifier.preprocess([image]), [class_index], classifier.title)[0]


def filter_figure(classifiers: Sequence[Classifier]) -> Figure:
    """The filters of each model's first convolution, as colours, each stretched to its own range."""
    side = 3.2
    figure = new_figure(side * len(classifiers), 3.8)
    axes = np.atleast_1d(figure.subplots(1, len(classifiers)))
    for axis, classifier in zip(axes, classifiers, strict=True):
        filters = first_filters(classifier)
        low, high = filters.min((1, 2, 3), keepdims=True), filters.max((1, 2, 3), keepdims=True)
        tiles = (filters - low) / np.maximum(high - low, 1e-12)
        tiles = tiles.repeat(3 // tiles.shape[-1], -1)  # grey ones too as colours
        axis.axis("off")
        axis.imshow(_tiles(tiles, math.ceil(math.sqrt(len(tiles)))), interpolation="nearest")
        what = f"{len(filters)} filters of {filters.shape[1]}x{filters.shape[2]}"
        axis.set_title(f"{_wrap(classifier.title, side, 9)}\n{what}", fontsize=9)
    return figure


def first_filters(classifier: Classifier) -> np.ndarray:
    """Up to 64 kernels of the first convolution, (n, h, w, channels); channels are 1 or 3."""
    convs = {name: m for name, m in classifier.model.named_modules() if isinstance(m, nn.Conv2d)}
    layer = convs.get(layer_names(classifier.name)[1], next(iter(convs.values()), None))
    if layer is None or layer.weight.shape[1] not in (1, 3):
        raise RunError(f"{classifier.name} does not begin with a convolution of an image")
    return layer.weight.detach().float().cpu().numpy()[:MAX_FILTERS].transpose(0, 2, 3, 1)


def _rows(
    classifiers: Sequence[Classifier], width: float, height: float, columns: Sequence[float]
) -> tuple[Figure, list[np.ndarray]]:
    """A figure with a titled row of axes for each model: its width and the height of a row in inches."""
    figure = new_figure(width, height * len(classifiers))
    rows = []
    for row, classifier in zip(figure.subfigures(len(classifiers), 1, squeeze=False)[:, 0], classifiers, strict=True):
        row.suptitle(_wrap(classifier.title, width, 10), fontsize=10)
        rows.append(row.subplots(1, len(columns), width_ratios=columns))
        for axis in rows[-1]:
            axis.axis("off")
    return figure, rows


def _wrap(text: str, inches: float, size: int) -> str:
    """A title on as many lines as it needs; letters are about 0.65 of their size wide."""
    return plain("\n".join(textwrap.wrap(text, int(inches * 72 / (0.65 * size)))))


def _show_input(axis: matplotlib.axes.Axes, image: Image.Image, classifier: Classifier) -> np.ndarray:
    """Show what the model sees of an image, and return it: uint8 (h, w, channels)."""
    config = classifier.data_config
    pixels = to_image(classifier.preprocess([image])[0], config["mean"], config["std"])
    axis.imshow(pixels.repeat(3 // pixels.shape[-1], -1))
    axis.set_title(f"input, {pixels.shape[1]}x{pixels.shape[0]}", fontsize=8)
    return pixels
