"""What models see: feature maps, class activation maps and first filters, as figures. `convmlp visualize`.

from convmlp.use.classifier import open_classifier
from convmlp.use.visualize import feature_figure

figure = feature_figure(image, [open_classifier("convmlp_s"), open_classifier("resnet50")])
figure.savefig("features.png")
"""

import math
import warnings
from collections.abc import Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from torch import nn

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

    Shown are the twelve channels of a stage whose values vary most over the picture, each from its own 2nd to its
    98th percentile, dark to bright. A model of more than four levels shows the last four strides, one of a single
    stride four levels evenly apart.
    """
    figure = new_figure(2.6 * (LEVELS + 0.8), 2.3 * len(classifiers))
    rows = figure.subfigures(len(classifiers), 1, squeeze=False)[:, 0]
    for row, classifier in zip(rows, classifiers, strict=True):
        axes = _row(row, classifier.title, [0.72] + [1] * LEVELS)
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
    """(c, h, w) -> one picture of 3x4 maps, RGBA in 0 to 1, those that vary most first."""
    strongest = maps.std((1, 2)).argsort(kind="stable")[::-1][: MAP_ROWS * MAP_COLUMNS]
    colors = matplotlib.colormaps["viridis"]
    low, high = np.percentile(maps[strongest], (2, 98), axis=(1, 2), keepdims=True)
    scaled = np.clip((maps[strongest] - low) / np.maximum(high - low, 1e-12), 0, 1)
    return _tiles([colors(one) for one in scaled], MAP_ROWS, MAP_COLUMNS)


def _tiles(pictures: Sequence[np.ndarray], rows: int, columns: int) -> np.ndarray:
    """Equal pictures (h, w, channels) side by side on white, with gaps of a thirtieth of their size."""
    height, width, channels = pictures[0].shape
    repeat = max(1, 120 // max(height, width))  # for gaps narrower than the pixels of a small map
    pictures = [picture.repeat(repeat, 0).repeat(repeat, 1) for picture in pictures]
    height, width = height * repeat, width * repeat
    gap = max(1, max(height, width) // 30)
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, channels))
    for i, picture in enumerate(pictures):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def cam_figure(image: Image.Image, classifiers: Sequence[Classifier], wanted: Sequence[str] = ()) -> Figure:
    """Grad-CAM (Selvaraju et al. 2017): where a model looks for a class, red where most; a row a model.

    Args:
        image: A Pillow image.
        classifiers: See `open_classifier`.
        wanted: Names or numbers of the classes to look for; by default the one that each model finds.
    """
    columns = 1 + max(1, len(wanted))
    figure = new_figure(2.7 * columns, 3.1 * len(classifiers))
    rows = figure.subfigures(len(classifiers), 1, squeeze=False)[:, 0]
    for row, classifier in zip(rows, classifiers, strict=True):
        probabilities = classify([image], classifier)[0]
        indices = [find_class(classifier, name) for name in wanted] or [int(probabilities.argmax())]
        axes = _row(row, classifier.title, [1] * columns)
        pixels = _show_input(axes[0], image, classifier)
        for axis, index in zip(axes[1:], indices, strict=True):
            heat_map = activation_map(image, classifier, index)
            heat = matplotlib.colormaps["jet"](heat_map)[..., :3]
            axis.imshow(0.5 * heat + 0.5 * pixels.mean(-1, keepdims=True) / 255)
            found = "" if heat_map.any() else ": nothing speaks for it"
            name = f"{classifier.class_names[index][:40]} ({100 * probabilities[index]:.0f} %){found}"
            axis.set_title(plain(name), fontsize=8)
    return figure


def find_class(classifier: Classifier, wanted: str) -> int:
    """The number of a class by its name, one of its synonyms ("tabby, tabby cat" is both), or its number.

    Raises:
        RunError: there is none; the nearest name is offered.
    """
    names: dict[str, int] = {}
    for i, name in enumerate(classifier.class_names):
        for spelling in (name, *name.split(", ")):
            names.setdefault(spelling.lower(), i)
    if wanted.lower() in names:
        return names[wanted.lower()]
    if wanted.isdecimal() and int(wanted) < len(classifier.class_names):
        return int(wanted)
    raise RunError(f"{classifier.title} knows no class {wanted}{suggest(wanted, names)}")


def activation_map(image: Image.Image, classifier: Classifier, class_index: int) -> np.ndarray:
    """Grad-CAM of a class on the last feature map, 0 to 1, as large as the model's input, (h, w)."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    info = getattr(classifier.model, "feature_info", None)
    if not info:
        raise RunError(f"{classifier.name} does not tell its feature maps to timm")
    has_class_token = getattr(classifier.model, "num_prefix_tokens", 0) > 0
    level = info[-2 if has_class_token else -1]  # behind the last block the other tokens no longer matter

    def to_nchw(x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 3:  # tokens, (b, n, c), perhaps with others before those of the picture
            side = math.isqrt(x.shape[1])
            return x[:, x.shape[1] - side * side :].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return x if x.shape[1] == level["num_chs"] else x.permute(0, 3, 1, 2)

    with warnings.catch_warnings(), torch.enable_grad():
        warnings.filterwarnings("ignore", message=".*full backward hook.*")
        batch = classifier.preprocess([image])
        try:
            layer = classifier.model.get_submodule(level["module"])
            with GradCAM(classifier.model, [layer], reshape_transform=to_nchw) as cam:
                return cam(batch, [ClassifierOutputTarget(class_index)])[0]
        except (AttributeError, TypeError) as error:  # several maps, or none that the head looks at
            raise RunError(f"{classifier.title} has no single last map that Grad-CAM could look at: {error}") from error


def filter_figure(classifiers: Sequence[Classifier]) -> Figure:
    """The filters of each model's first convolution, as colours, each stretched to its own range."""
    figure = new_figure(3.2 * len(classifiers), 3.8)
    axes = np.atleast_1d(figure.subplots(1, len(classifiers)))
    for axis, classifier in zip(axes, classifiers, strict=True):
        filters = first_filters(classifier)
        low, high = filters.min((1, 2, 3), keepdims=True), filters.max((1, 2, 3), keepdims=True)
        tiles = (filters - low) / np.maximum(high - low, 1e-12)
        if tiles.shape[-1] == 1:
            tiles = tiles.repeat(3, -1)
        columns = math.ceil(math.sqrt(len(tiles)))
        axis.axis("off")
        axis.imshow(_tiles(tiles, -(-len(tiles) // columns), columns), interpolation="nearest")
        shape = f"{filters.shape[1]}x{filters.shape[2]}"
        axis.set_title(plain(f"{classifier.title}\n{len(filters)} filters of {shape}"), fontsize=9)
    return figure


def first_filters(classifier: Classifier) -> np.ndarray:
    """Up to 64 kernels of the first convolution, (n, h, w, channels); channels are 1 or 3."""
    name = layer_names(classifier.name)[1]
    try:
        layer = classifier.model.get_submodule(name)
    except AttributeError:
        layer = None
    if not name or not isinstance(layer, nn.Conv2d):
        layer = next((m for m in classifier.model.modules() if isinstance(m, nn.Conv2d)), None)
    if layer is None or layer.weight.shape[1] not in (1, 3):
        raise RunError(f"{classifier.name} does not begin with a convolution of a picture")
    return layer.weight.detach().float().cpu().numpy()[:MAX_FILTERS].transpose(0, 2, 3, 1)


def _row(figure: SubFigure, title: str, widths: Sequence[float]) -> np.ndarray:
    figure.suptitle(plain(title), fontsize=10)
    axes = figure.subplots(1, len(widths), width_ratios=widths)
    for axis in axes:
        axis.axis("off")
    return axes


def _show_input(axis: matplotlib.axes.Axes, image: Image.Image, classifier: Classifier) -> np.ndarray:
    """Show what the model sees of a picture, and return it: uint8 (h, w, channels)."""
    config = classifier.data_config
    pixels = to_image(classifier.preprocess([image])[0], config["mean"], config["std"])
    axis.imshow(pixels.repeat(3, -1) if pixels.shape[-1] == 1 else pixels)
    axis.set_title(f"input, {pixels.shape[1]}x{pixels.shape[0]}", fontsize=8)
    return pixels
