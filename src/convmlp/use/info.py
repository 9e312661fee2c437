"""What models cost and score: parameters, multiply-adds, activations, layers, published scores. `convmlp info`."""

from functools import partial
from math import log2, prod
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..variations import PURE_MLPS
from ..zoo import VARIANTS, variant_of
from .classifier import is_model

OURS = (*VARIANTS, *PURE_MLPS)

# As published by the paper: top-1 in per cent; box AP, mask AP and mIoU
PUBLISHED = {
    "convmlp_s": {"ImageNet": 76.8, "CIFAR-10": 98.0, "CIFAR-100": 87.4, "Flowers-102": 99.5},
    "convmlp_m": {"ImageNet": 79.0, "CIFAR-10": 98.6, "CIFAR-100": 89.1, "Flowers-102": 99.5},
    "convmlp_l": {"ImageNet": 80.2, "CIFAR-10": 98.6, "CIFAR-100": 88.6, "Flowers-102": 99.5},
}
DOWNSTREAM = {
    "convmlp_s": {"RetinaNet box AP": 37.2, "Mask R-CNN box AP": 38.4, "mask AP": 35.7, "Semantic FPN mIoU": 35.8},
    "convmlp_m": {"RetinaNet box AP": 39.4, "Mask R-CNN box AP": 40.6, "mask AP": 37.2, "Semantic FPN mIoU": 38.6},
    "convmlp_l": {"RetinaNet box AP": 40.2, "Mask R-CNN box AP": 41.7, "mask AP": 38.2, "Semantic FPN mIoU": 40.0},
}


class Layer(NamedTuple):
    """A part of a model: its name and class, the shape of what it gives, its stride, parameters and multiply-adds.

    `depth` is 1 for the outermost parts; `stride` is None where the output is no map.
    """

    name: str
    kind: str
    depth: int
    shape: tuple[int, ...]
    stride: int | None
    parameters: int
    macs: int


class Cost(NamedTuple):
    """What one image costs a model: counts of parameters, multiply-adds, and activations.

    Activations are the values that convolutions and matrix products give, as Radosavovic et al. 2020 count them.
    """

    parameters: int
    macs: int
    activations: int
    layers: list[Layer]


@torch.inference_mode()
def measure(model: nn.Module, input_size: tuple[int, int, int]) -> Cost:
    """Run a model once, in evaluation mode, on an image of zeros, (c, h, w), and count."""
    was_training = model.training
    model.eval()
    shapes: dict[str, tuple[int, ...]] = {}

    def note_shape(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        shapes[name] = tuple(output.shape) if isinstance(output, torch.Tensor) else ()

    parts = {name: module for name, module in model.named_modules() if name}
    hooks = [part.register_forward_hook(partial(note_shape, name)) for name, part in parts.items()]
    values = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(flop_registry, _count_outputs))
    operations = FlopCounterMode(display=False)
    try:
        with values, operations, sdpa_kernel(SDPBackend.MATH):  # attention as its products, which have formulas
            model(torch.zeros(1, *input_size, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    counts = operations.get_flop_counts()
    layers = [
        Layer(
            name,
            type(part).__name__,
            1 + sum(name.startswith(f"{other}.") for other in shapes),
            shapes[name][1:],
            _stride(shapes[name], input_size),
            count_parameters(part),
            sum(counts.get(f"{type(model).__name__}.{name}", {}).values()) // 2,
        )
        for name, part in parts.items()
        if name in shapes and count_parameters(part)
    ]
    return Cost(count_parameters(model), operations.get_total_flops() // 2, values.get_total_flops(), layers)


def _count_outputs(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The values that an operator gives, in the form of PyTorch's formulas for its operations."""
    return prod(out_shape)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _stride(shape: tuple[int, ...], input_size: tuple[int, int, int]) -> int | None:
    """Of a map, (1, c, h, w) or (1, h, w, c), from a square image."""
    if len(shape) != 4:
        return None
    side = shape[2] if shape[2] == shape[3] else shape[1]
    stride = input_size[1] / side
    return round(stride) if input_size[1] % 32 == 0 else 2 ** round(log2(stride))


def cost_table(models: list[tuple[str, Cost, int]], markdown: bool = False) -> Table:
    """A row a model: (name or checkpoint, cost, input size in pixels)."""
    published = {name: PUBLISHED.get(variant_of(name) or "", {}) for name, *_ in models if is_model(name)}
    columns = next((list(scores) for scores in published.values() if scores), [])
    rows = [
        [name, grouped(cost.parameters), f"{cost.macs / 1e9:.3f} G", f"{cost.activations / 1e6:.2f} M", f"{size} px"]
        + _scores(published.get(name, {}), columns)
        for name, cost, size in models
    ]
    return _table(["model", "parameters", "MACs", "activations", "input", *columns], rows, markdown)


def downstream_table(markdown: bool = False) -> Table:
    """The paper's scores in detection and segmentation."""
    columns = list(next(iter(DOWNSTREAM.values())))
    rows = [[name, *_scores(scores, columns)] for name, scores in DOWNSTREAM.items()]
    return _table(["backbone", *columns], rows, markdown)


def layer_table(cost: Cost, depth: int, markdown: bool = False) -> Table:
    """The layers of a model down to a depth, 1 for its outermost parts."""
    rows = [
        [name, kind, " x ".join(map(str, shape)), str(stride or ""), grouped(parameters), f"{macs / 1e6:.1f} M"]
        for name, kind, level, shape, stride, parameters, macs in cost.layers
        if level <= depth
    ]
    return _table(["layer", "kind", "output", "stride", "parameters", "MACs"], rows, markdown)


def _scores(scores: dict[str, float], columns: list[str]) -> list[str]:
    return [f"{scores[column]:.1f}" if column in scores else "" for column in columns]


def _table(columns: list[str], rows: list[list[str]], markdown: bool) -> Table:
    table = Table(box=box.MARKDOWN if markdown else box.SIMPLE)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def grouped(number: int) -> str:
    """9022920 as 9 022 920."""
    return f"{number:,}".replace(",", " ")
