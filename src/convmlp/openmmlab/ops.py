"""torchvision.ops in the place of mmcv's compiled operators.

`import mmcv.ops`, and with it all of mmdet and mmseg, needs the extension `mmcv._ext`, which the wheels on PyPI do not
contain. `install` puts a stand-in there, in which the operators that RetinaNet, Mask R-CNN and Semantic FPN reach
work on any device, and every other one says what it would need. A compiled mmcv is used where there is one.

The functions have the signatures by which mmcv/ops/*.py calls the extension: results are written into tensors given.
"""

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import torch
from mmengine.logging import print_log
from torchvision import ops

from ..common.errors import RunError

NAME = "mmcv._ext"
COMPILED = (
    "an mmcv with compiled operators: a wheel of OpenMMLab for your PyTorch (mim install mmcv), or a build from source"
)
SOFT_NMS_METHODS = ("naive", "linear", "gaussian")
TORCHVISION_TYPES = (torch.float32, torch.float64)


class MissingOperator(RunError, NotImplementedError):
    """A model calls one of mmcv's operators that torchvision does not have."""


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int) -> torch.Tensor:
    """Indices of the boxes (n, 4) that stay, best score first. A box is `offset` pixels wider than x2 - x1."""
    boxes = _wide(boxes)
    corner = boxes.new_tensor([0, 0, offset, offset])
    return ops.nms(boxes + corner, scores.to(boxes.dtype), iou_threshold)


def softnms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    dets: torch.Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> torch.Tensor:
    """Soft-NMS (Bodla et al. 2017): fills the first k rows of `dets` (n, 5), returns the k indices.

    Boxes that overlap a better one lose score instead of being dropped, and go when it falls below `min_score`.
    """
    scores = scores.clone()
    left = torch.arange(len(boxes), device=boxes.device)
    areas = (boxes[:, 2:] - boxes[:, :2] + offset).prod(1)
    kept: list[torch.Tensor] = []
    while len(left):
        best = left[scores[left].argmax()]
        dets[len(kept), :4] = boxes[best]
        dets[len(kept), 4] = scores[best]
        kept.append(best)
        left = left[left != best]

        corner = torch.maximum(boxes[best, :2], boxes[left, :2])
        size = (torch.minimum(boxes[best, 2:], boxes[left, 2:]) - corner + offset).clamp(min=0)
        overlap = size.prod(1)
        iou = overlap / (areas[best] + areas[left] - overlap)
        if SOFT_NMS_METHODS[method] == "gaussian":
            factor = torch.exp(-(iou**2) / sigma)
        else:
            reduced = 1 - iou if SOFT_NMS_METHODS[method] == "linear" else torch.zeros_like(iou)
            factor = torch.where(iou >= iou_threshold, reduced, 1.0)
        scores[left] *= factor
        left = left[scores[left] >= min_score]
    return torch.stack(kept) if kept else left


def roi_align_forward(
    input: torch.Tensor,
    rois: torch.Tensor,
    output: torch.Tensor,
    argmax_y: torch.Tensor,
    argmax_x: torch.Tensor,
    **settings: Any,
) -> None:
    """RoIAlign of (b, c, h, w) at `rois` (n, 5: image, x1, y1, x2, y2) into `output` (n, c, height, width)."""
    output.copy_(_roi_align(_wide(input), rois, **settings))


def roi_align_backward(
    grad_output: torch.Tensor,
    rois: torch.Tensor,
    argmax_y: torch.Tensor,
    argmax_x: torch.Tensor,
    grad_input: torch.Tensor,
    **settings: Any,
) -> None:
    """The gradient of `roi_align_forward` for its input, into `grad_input` (b, c, h, w)."""
    grad = _wide(grad_output)
    with torch.enable_grad():
        maps = torch.zeros_like(grad_input, dtype=grad.dtype, requires_grad=True)
        pooled = _roi_align(maps, rois, **settings)
    grad_input.copy_(torch.autograd.grad(pooled, maps, grad)[0])


def _roi_align(
    maps: torch.Tensor,
    rois: torch.Tensor,
    *,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> torch.Tensor:
    if pool_mode != 1:  # the average
        _unavailable("roi_align with pool_mode='max'")
    size = (aligned_height, aligned_width)
    return ops.roi_align(maps, rois.to(maps.dtype), size, spatial_scale, sampling_ratio, aligned)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """torchvision has no NMS and no RoIAlign for bfloat16, nor for float16 on CPUs."""
    return x if x.dtype in TORCHVISION_TYPES else x.float()


def sigmoid_focal_loss_forward(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, output: torch.Tensor, **settings: float
) -> None:
    """The loss of each logit into `output` (n, classes). An empty `weight` means none."""
    output.copy_(_focal_loss(_wide(input), target, weight, **settings))


def sigmoid_focal_loss_backward(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, grad_input: torch.Tensor, **settings: float
) -> None:
    """The derivative of each loss by its logit into `grad_input` (n, classes)."""
    with torch.enable_grad():
        logits = _wide(input).detach().requires_grad_()
        loss = _focal_loss(logits, target, weight, **settings).sum()
    grad_input.copy_(torch.autograd.grad(loss, logits)[0])


def _focal_loss(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, *, gamma: float, alpha: float
) -> torch.Tensor:
    """Focal loss (Lin et al. 2017) of logits (n, classes); target (n,), `classes` meaning background: (n, classes)."""
    classes = input.shape[1]
    one_hot = (target[:, None] == torch.arange(classes, device=target.device)).to(input.dtype)
    loss = ops.sigmoid_focal_loss(input, one_hot, alpha, gamma)
    if weight.numel():
        loss = loss * torch.cat([weight, weight.new_ones(1)])[target.clamp(max=classes)][:, None]
    return loss


OPERATORS = (
    nms,
    softnms,
    roi_align_forward,
    roi_align_backward,
    sigmoid_focal_loss_forward,
    sigmoid_focal_loss_backward,
)
PROVIDED: dict[str, Callable[..., Any]] = {operator.__name__: operator for operator in OPERATORS}


def _unavailable(name: str) -> NoReturn:
    raise MissingOperator(f"the operator {name} needs {COMPILED}. Without one there are {', '.join(PROVIDED)}")


class _StandIn(ModuleType):
    """Has every operator that mmcv asks for; one that is not provided raises when it is called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("get_compiler_version", "get_compiling_cuda_version"):  # for mmcv's report of the environment
            return lambda: "none: torchvision's operators"
        return PROVIDED.get(name) or (lambda *args, **kwargs: _unavailable(name))


def install() -> None:
    """Let mmcv find a compiled extension if it has one, else the stand-in; says which in one line of the log."""
    if NAME in sys.modules:
        return
    reason, level = "mmcv has no compiled operators", logging.INFO
    if importlib.util.find_spec(NAME):
        try:
            importlib.import_module(NAME)
            return
        except ImportError as error:
            reason, level = f"mmcv's compiled operators do not load ({error})", logging.WARNING
    stand_in = _StandIn(NAME)
    stand_in.__spec__ = ModuleSpec(NAME, None)
    sys.modules[NAME] = stand_in
    if os.environ.get("RANK", "0") == "0":
        print_log(f"{reason}: torchvision's take their place", logger="current", level=level)
