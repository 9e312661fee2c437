"""torchvision's operators in the place of mmcv's, against formulas written out here."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from convmlp.openmmlab import ops

# isort: split
# Only now can mmcv.ops be imported
from mmcv.ops import RoIAlign, batched_nms, roi_align, sigmoid_focal_loss, soft_nms
from mmcv.ops import nms as mmcv_nms

pytestmark = pytest.mark.skipif(
    not isinstance(sys.modules[ops.NAME], ops._StandIn), reason="mmcv has compiled operators here"
)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def make_boxes(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes (n, 4) that overlap a lot, and scores that are all different."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * 12
    size = 5 + torch.rand(n, 2, generator=generator) * 20
    return torch.cat([corner, corner + size], 1), torch.randperm(n, generator=generator).add(1) / (n + 1)


def iou(a: list[float], b: list[float], offset: int) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def plain_nms(boxes: torch.Tensor, scores: torch.Tensor, threshold: float, offset: int) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i].item()):
        if all(iou(boxes[i].tolist(), boxes[j].tolist(), offset) <= threshold for j in kept):
            kept.append(i)
    return kept


def plain_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset) -> list[tuple[int, float]]:
    left = {i: scores[i].item() for i in range(len(boxes))}
    kept = []
    while left:
        best = max(left, key=left.__getitem__)
        kept.append((best, left.pop(best)))
        for i in list(left):
            overlap = iou(boxes[best].tolist(), boxes[i].tolist(), offset)
            if method == "gaussian":
                left[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                left[i] *= 1 - overlap if method == "linear" else 0.0
            if left[i] < min_score:
                del left[i]
    return kept


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_nms_keeps_what_the_definition_keeps(threshold, offset, device):
    boxes, scores = make_boxes(60)
    dets, kept = mmcv_nms(boxes.to(device), scores.to(device), threshold, offset)
    expected = plain_nms(boxes, scores, threshold, offset)
    assert 1 < len(expected) < 60
    assert kept.tolist() == expected
    torch.testing.assert_close(dets.cpu(), torch.cat([boxes, scores[:, None]], 1)[expected])


def test_an_offset_can_change_what_nms_keeps():
    boxes = torch.tensor([[0.0, 0, 4, 4], [2, 0, 6, 4]])  # IoU 1/3 without, 3/7 with the offset
    scores = torch.tensor([0.9, 0.8])
    assert mmcv_nms(boxes, scores, 0.4, offset=0)[1].tolist() == [0, 1]
    assert mmcv_nms(boxes, scores, 0.4, offset=1)[1].tolist() == [0]


def test_nms_of_a_score_threshold_and_a_limit():
    boxes, scores = make_boxes(60)
    _, kept = mmcv_nms(boxes, scores, 0.5, score_threshold=0.5, max_num=4)
    expected = [i for i in plain_nms(boxes, scores, 0.5, 0) if scores[i] > 0.5][:4]
    assert kept.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_nms_takes_half_precision(dtype, device):
    boxes, scores = (x.to(device, dtype) for x in make_boxes(20))
    _, kept = mmcv_nms(boxes, scores, 0.5)
    assert kept.tolist() == plain_nms(boxes.float().cpu(), scores.float().cpu(), 0.5, 0)


def test_nms_of_nothing():
    dets, kept = mmcv_nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5) and kept.shape == (0,)


def test_batched_nms_leaves_other_classes_alone():
    boxes, scores = make_boxes(60)
    classes = torch.arange(60) % 3
    _, kept = batched_nms(boxes, scores, classes, dict(type="nms", iou_threshold=0.3))
    expected = []
    for c in range(3):
        own = torch.nonzero(classes == c)[:, 0]
        expected += own[plain_nms(boxes[own], scores[own], 0.3, 0)].tolist()
    assert sorted(kept.tolist()) == sorted(expected)
    assert (scores[kept].diff() <= 0).all()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_lowers_scores_as_defined(method, offset):
    boxes, scores = make_boxes(40)
    dets, kept = soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    expected = plain_soft_nms(boxes, scores, 0.3, 0.5, 0.05, method, offset)
    assert 3 < len(expected) < 40
    assert kept.tolist() == [i for i, _ in expected]
    torch.testing.assert_close(dets[:, :4], boxes[kept])
    torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in expected]), rtol=1e-4, atol=1e-6)


def test_soft_nms_takes_arrays_and_nothing():
    boxes, scores = make_boxes(10)
    dets, kept = soft_nms(boxes.numpy(), scores.numpy())
    assert isinstance(dets, np.ndarray) and len(dets) == len(kept) > 0
    dets, kept = soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert dets.shape == (0, 5) and kept.shape == (0,)


# RoIAlign


def bilinear(image: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """(c, h, w) at a point; points more than a pixel outside count as zero, others are moved to the border."""
    height, width = image.shape[1:]
    if not (-1.0 <= y <= height and -1.0 <= x <= width):
        return image.new_zeros(len(image))
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    upper = image[:, top, left] * (1 - dx) + image[:, top, right] * dx
    lower = image[:, bottom, left] * (1 - dx) + image[:, bottom, right] * dx
    return upper * (1 - dy) + lower * dy


def plain_roi_align(maps, rois, size, scale, sampling_ratio, aligned) -> torch.Tensor:
    """The mean of regularly placed samples in each bin (He et al. 2017, section 3)."""
    out = maps.new_zeros(len(rois), maps.shape[1], size, size)
    for n, (index, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (value * scale - (0.5 if aligned else 0) for value in box)
        width, height = x2 - x1, y2 - y1
        if not aligned:
            width, height = max(width, 1.0), max(height, 1.0)
        across = sampling_ratio or math.ceil(width / size)
        down = sampling_ratio or math.ceil(height / size)
        for i in range(size):
            for j in range(size):
                samples = [
                    bilinear(
                        maps[int(index)],
                        y1 + (i + (sy + 0.5) / down) * height / size,
                        x1 + (j + (sx + 0.5) / across) * width / size,
                    )
                    for sy in range(down)
                    for sx in range(across)
                ]
                out[n, :, i, j] = torch.stack(samples).mean(0)
    return out


ROIS = torch.tensor([[0.0, 4, 6, 40, 30], [1, 0, 0, 63, 47], [1, 10, 10, 12, 11], [0, 50, 30, 70, 60]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_averages_samples_as_defined(sampling_ratio, aligned, device):
    maps = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    rois = ROIS.to(device)
    pooled = roi_align(maps.to(device), rois, (4, 4), 0.25, sampling_ratio, "avg", aligned)
    torch.testing.assert_close(pooled.cpu(), plain_roi_align(maps, ROIS, 4, 0.25, sampling_ratio, aligned))


def test_roi_align_layers_of_detectors_use_it():
    maps = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    layer = RoIAlign(output_size=4, spatial_scale=0.25, sampling_ratio=0)
    torch.testing.assert_close(layer(maps, ROIS), plain_roi_align(maps, ROIS, 4, 0.25, 0, True))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_gradients_of_roi_align(sampling_ratio, aligned):
    maps = torch.randn(2, 2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rois = ROIS.double()

    def pool(x: torch.Tensor) -> torch.Tensor:
        return roi_align(x, rois, (2, 2), 0.125, sampling_ratio, "avg", aligned)

    assert torch.autograd.gradcheck(pool, (maps,), nondet_tol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_roi_align_of_half_precision_forward_and_backward(dtype, device):
    maps = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    pooled = roi_align(maps, ROIS.to(device, dtype), (4, 4), 0.25, 0, "avg", True)
    assert pooled.dtype == dtype
    exact = plain_roi_align(maps.detach().float().cpu(), ROIS, 4, 0.25, 0, True)
    torch.testing.assert_close(pooled.float().cpu(), exact, rtol=2e-2, atol=2e-2)
    pooled.sum().backward()
    assert maps.grad.dtype == dtype and maps.grad.isfinite().all() and maps.grad.any()


def test_roi_align_of_no_boxes():
    maps = torch.randn(1, 3, 12, 16, requires_grad=True)
    pooled = roi_align(maps, torch.zeros(0, 5), (4, 4), 0.25, 0, "avg", True)
    assert pooled.shape == (0, 3, 4, 4)
    pooled.sum().backward()
    assert not maps.grad.any()


def test_roi_align_by_maximum_says_that_it_is_not_there():
    with pytest.raises(NotImplementedError, match="pool_mode='max'"):
        roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), (2, 2), 1.0, 2, "max", True)


# Focal loss


def plain_focal_loss(logits, target, weight, gamma, alpha) -> torch.Tensor:
    loss = torch.zeros_like(logits)
    for n in range(len(logits)):
        for c in range(logits.shape[1]):
            p = 1 / (1 + math.exp(-logits[n, c].item()))
            if target[n] == c:
                loss[n, c] = -alpha * (1 - p) ** gamma * math.log(p)
            else:
                loss[n, c] = -(1 - alpha) * p**gamma * math.log(1 - p)
            if weight is not None and target[n] < logits.shape[1]:
                loss[n, c] *= weight[target[n]].item()
    return loss


LOGITS = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
TARGET = torch.tensor([0, 1, 2, 3, 3, 0, 1])  # 3 is the background


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (1.5, 0.6)])
def test_sigmoid_focal_loss_is_the_papers(gamma, alpha, weighted, device):
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) if weighted else None
    expected = plain_focal_loss(LOGITS, TARGET, weight, gamma, alpha)
    on = [None if x is None else x.to(device) for x in (LOGITS, TARGET, weight)]
    for reduction, value in (("none", expected), ("sum", expected.sum()), ("mean", expected.sum() / 7)):
        loss = sigmoid_focal_loss(on[0], on[1], gamma, alpha, on[2], reduction)
        torch.testing.assert_close(loss.cpu(), value)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_sigmoid_focal_loss(weighted):
    weight = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64) if weighted else None
    logits = LOGITS.clone().requires_grad_()
    for reduction in ("sum", "mean"):
        assert torch.autograd.gradcheck(
            lambda x, reduction=reduction: sigmoid_focal_loss(x, TARGET, 2.0, 0.25, weight, reduction), (logits,)
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_sigmoid_focal_loss_of_half_precision(dtype, device):
    logits = LOGITS.to(device, dtype).requires_grad_()
    loss = sigmoid_focal_loss(logits, TARGET.to(device), 2.0, 0.25, None, "none")
    expected = plain_focal_loss(logits.detach().double().cpu(), TARGET, None, 2.0, 0.25)
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=2e-2, atol=2e-2)
    loss.float().sum().backward()
    assert logits.grad.dtype == dtype and logits.grad.isfinite().all()


def test_sigmoid_focal_loss_of_nothing():
    logits = torch.zeros(0, 3, requires_grad=True)
    sigmoid_focal_loss(logits, torch.zeros(0, dtype=torch.long), 2.0, 0.25, None, "sum").backward()
    assert logits.grad.shape == (0, 3)


# The stand-in


def test_another_operator_says_its_name_and_the_way_out():
    from mmcv.ops import deform_conv2d

    with pytest.raises(NotImplementedError, match="deform_conv_forward needs an mmcv with compiled operators"):
        deform_conv2d(torch.zeros(1, 1, 8, 8), torch.zeros(1, 18, 6, 6), torch.zeros(1, 1, 3, 3))


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_its_use_is_said_in_one_line_of_the_first_process():
    said = run("import convmlp.openmmlab, mmcv.ops, convmlp.openmmlab.ops as ops; ops.install()")
    assert said.count("\n") == 1 and "torchvision's take their place" in said
    assert run("import os; os.environ['RANK'] = '1'; import convmlp.openmmlab") == ""


COMPILED = """
import importlib.abc, importlib.machinery, sys, types

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "mmcv._ext" else None
    def exec_module(self, module):
        {body}

sys.meta_path.insert(0, Finder())
import convmlp.openmmlab
from convmlp.openmmlab import ops
print(isinstance(sys.modules["mmcv._ext"], ops._StandIn))
"""


def test_compiled_operators_are_preferred():
    assert run(COMPILED.format(body="module.nms = None")) == "False\n"


def test_compiled_operators_that_do_not_load_are_named():
    said = run(COMPILED.format(body="raise ImportError('undefined symbol: foo')"))
    assert "WARNING - mmcv's compiled operators do not load (undefined symbol: foo)" in said
    assert said.startswith("True") or said.endswith("True\n")
