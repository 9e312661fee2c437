"""Published accuracies of the models that ours are compared with, each under timm's name of its weights.

One model has several scores, one for each way it was trained: so a table or a figure names the weights in full, such as
resnet50.a1_in1k.
"""

from collections.abc import Sequence
from typing import NamedTuple

import timm
from matplotlib.axes import Axes

from convmlp.common.figures import plain
from convmlp.use.info import PUBLISHED
from convmlp.zoo import variant_of

OURS, OTHERS = "#1b4f72", "#777777"  # colours
LINE = 12  # points, from one label to the next
IMG_SIZE = 224  # pixels, what all scores here were measured at

# Top-1 in per cent on ImageNet-1k: results/results-imagenet.csv of huggingface/pytorch-image-models at aa4b5850c154,
# the rows of 224 px. SIMILAR are those that --peers of benchmark.py adds; of the two ResNet-50 the one that
# was trained as long as the others
SIMILAR = {
    "mixer_b16_224.goog_in21k_ft_in1k": 76.62,
    "resnet50.a1_in1k": 80.38,
    "poolformer_s12.sail_in1k": 77.24,
    "poolformer_s24.sail_in1k": 80.29,
    "resmlp_12_224.fb_in1k": 76.66,
    "resmlp_24_224.fb_in1k": 79.38,
    "convnext_atto.d2_in1k": 75.67,
    "convnext_femto.d1_in1k": 77.50,
    "efficientnet_b0.ra_in1k": 77.70,
}
PEERS = {
    **SIMILAR,
    "deit_small_patch16_224.fb_in1k": 79.86,
    "deit_tiny_patch16_224.fb_in1k": 72.19,
    "gmlp_s16_224.ra3_in1k": 79.65,
    "resnet101.tv_in1k": 77.40,
    "resnet18.tv_in1k": 69.75,
    "resnet50.tv_in1k": 76.16,
}


def published(name: str) -> tuple[str, float] | None:
    """The full name of a model's weights and their top-1 in per cent; None where no score is known here.

    A name without a tag stands for the weights that timm takes for it.
    """
    variant = variant_of(name)
    if variant:
        return (variant, PUBLISHED[variant]["ImageNet"]) if variant in PUBLISHED else None
    if not timm.is_model(name.partition(".")[0]):
        return None
    config = timm.get_pretrained_cfg(name)
    weights = f"{config.architecture}.{config.tag}" if config else name
    return (weights, PEERS[weights]) if weights in PEERS else None


class Point(NamedTuple):
    """Where a model is in a figure."""

    x: float
    y: float
    label: str
    is_ours: bool


def label_points(panel: Axes, points: Sequence[Point]) -> None:
    """Write the labels one above the other to the right of a panel, ordered as their points are, with lines to them."""
    low, high = panel.get_ylim()
    step = LINE / (0.75 * 72 * panel.figure.get_figheight())  # a panel is about three quarters of a figure
    place = -1.0
    for point in sorted(points, key=lambda point: point.y):
        place = max((point.y - low) / (high - low), place + step)
        colour = OURS if point.is_ours else OTHERS
        panel.annotate(
            plain(point.label),
            (point.x, point.y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=colour,
            weight="bold" if point.is_ours else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5, "shrinkB": 4},
        )
