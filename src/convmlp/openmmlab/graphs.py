"""Detectors and segmentors as one graph of tensors, from an image to what is on it, for `torch.export`.

mmdet and mmseg compute the same with lists, dictionaries and branches that depend on values. Their parts with weights
are called here as they are; what stands around them is computed anew.

Shapes: an image is (h, w, 3), RGB, uint8, of any size. The network sees it resized and padded to (height, width).
n counts detections, and sizes and limits are (2,), vertical first.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import nn
from torchvision import ops

LARGEST_SHAPE_CHANGE = abs(math.log(16 / 1000))  # of mmdet's DeltaXYWHBBoxCoder, in the logarithm


def neighbours(positions: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The entries before and after positions (n,) on an axis of a size, and how far it is from the first, 0 to 1."""
    before = positions.floor()
    share = positions - before
    low = before.long()
    zero, last = torch.zeros_like(size), size - 1
    return low.clamp(zero, last), (low + 1).clamp(zero, last), share


def resize(image: torch.Tensor, resized: torch.Tensor, sides: Sequence[int]) -> torch.Tensor:
    """The image as OpenCV resizes it by INTER_LINEAR, bit for bit, in the corner of a larger one, (*sides, 3).

    OpenCV computes with integers, to whose precision the weights are rounded: 1 / 2048.
    """

    def weighted(x: torch.Tensor, dim: int, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = torch.tensor(image.shape[dim])
        positions = ((torch.arange(sides[dim]).double() + 0.5) / (resized[dim].double() / size) - 0.5).float()
        low, high, share = neighbours(positions, size)
        shape = [-1 if i == dim else 1 for i in range(3)]
        first, second = (torch.round(weight * 2048).int().view(shape) for weight in (1 - share, share))
        return x.index_select(dim, low) // shift * first, x.index_select(dim, high) // shift * second

    left, right = weighted(image.int(), 1, 1)
    top, bottom = weighted(left + right, 0, 16)
    return (top // 65536 + bottom // 65536 + 2) // 4


class Reader(nn.Module):
    """Resizing, normalisation and padding: an image -> (1, 3, height, width), and the size that it has in there.

    Args:
        preprocessor: The network's, with mean and std.
        scale: The longest and the shortest side that an image may get, as of mmcv's Resize; None leaves it as it is.
        keep_ratio: Otherwise `scale` is the width and the height that every image gets.
        divisor: Height and width are padded to a multiple.
        fixed: Height and width of the network's input, in the place of `scale` and `divisor`.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        preprocessor: Any,
        scale: tuple[int, int] | None,
        keep_ratio: bool,
        divisor: int,
        fixed: tuple[int, int] | None,
    ):
        super().__init__()
        self.register_buffer("mean", preprocessor.mean.clone())
        self.register_buffer("std", preprocessor.std.clone())
        self.bgr = not preprocessor._channel_conversion
        self.scale, self.keep_ratio, self.divisor, self.fixed = scale, keep_ratio, divisor, fixed

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        resized = self.resized(torch.tensor(image.shape[:2]))
        padded = (resized + self.divisor - 1) // self.divisor * self.divisor
        height, width = self.fixed or padded.tolist()
        torch._check(height >= 1)
        torch._check(width >= 1)
        x = resize(image, resized, (height, width)).permute(2, 0, 1)
        x = ((x.flip(0) if self.bgr else x) - self.mean) / self.std
        inside = (torch.arange(height) < resized[0])[:, None] & (torch.arange(width) < resized[1])
        return (x * inside)[None], resized

    def resized(self, size: torch.Tensor) -> torch.Tensor:
        """What mmcv makes of the size of an image, in its own precision."""
        if self.fixed:
            room = torch.tensor(self.fixed)
            factor = (room.double() / size).min()
        elif self.scale is not None:
            room = torch.tensor(self.scale[::-1])
            factor = torch.minimum(max(self.scale) / size.max().double(), min(self.scale) / size.min().double())
        else:
            return size
        return (size * factor + 0.5).long() if self.keep_ratio else room


class Graph(nn.Module):
    """A network of mmdet or mmseg behind a reader. `outputs` names what it gives."""

    outputs: tuple[str, ...]

    def __init__(self, network: BaseModel, reader: Reader):
        super().__init__()
        self.network: Any = network
        self.reader = reader


class SemanticFPN(Graph):
    """mmseg's EncoderDecoder on whole images: an image -> label map (h, w), int64."""

    outputs = ("label_map",)

    def __init__(self, network: BaseModel, reader: Reader):
        super().__init__(network, reader)
        for branch in network.decode_head.scale_heads:
            for i, layer in enumerate(branch):
                if type(layer).__name__ == "Upsample":  # mmseg's takes no symbols for sizes
                    branch[i] = nn.Upsample(None, layer.scale_factor, layer.mode, layer.align_corners)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, resized = self.reader(image)
        logits = self.network.decode_head(self.network.extract_feat(x))
        logits = nn.functional.interpolate(logits, x.shape[2:], mode="bilinear")
        for dim, side in enumerate(image.shape[:2]):
            low, high, share = neighbours((torch.arange(side) + 0.5) * (resized[dim] / side) - 0.5, resized[dim])
            share = share[:, None] if dim == 0 else share
            logits = torch.lerp(logits.index_select(dim + 2, low), logits.index_select(dim + 2, high), share)
        return (logits[0].argmax(0),)


class Detector(Graph):
    """What RetinaNet and Mask R-CNN share. The score threshold is a buffer, so that it can be set in a file.

    Args:
        network: mmdet's.
        test_cfg: The part of the network's settings with the limits of the detections that come out.
    """

    score_threshold: torch.Tensor

    def __init__(self, network: BaseModel, reader: Reader, test_cfg: Any):
        super().__init__(network, reader)
        self.test_cfg = test_cfg
        self.register_buffer("score_threshold", torch.tensor(0.0))

    def candidates(self, head: Any, maps: Sequence[torch.Tensor], limit: torch.Tensor) -> list[Any]:
        """By level the boxes (n, 4) of all anchors, and their scores (n, classes)."""
        logits, deltas = head(maps)
        anchors = head.prior_generator.grid_priors([each.shape[2:] for each in logits], device="cpu")
        found = []
        for level_anchors, level_logits, level_deltas in zip(anchors, logits, deltas, strict=True):
            boxes = decode(head.bbox_coder, level_anchors, level_deltas[0].permute(1, 2, 0).reshape(-1, 4), limit)
            scores = level_logits[0].permute(1, 2, 0).reshape(-1, head.cls_out_channels).sigmoid()
            found.append((boxes, scores))
        return found


class RetinaNet(Detector):
    """mmdet's RetinaNet: an image -> boxes (n, 4), scores (n,), labels (n,), best first, in pixels of the image."""

    outputs = ("boxes", "scores", "labels")

    def __init__(self, network: BaseModel, reader: Reader):
        super().__init__(network, reader, network.bbox_head.test_cfg)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, resized = self.reader(image)
        head = self.network.bbox_head
        levels = []
        for boxes, scores in self.candidates(head, self.network.extract_feat(x), resized):
            index, labels = (scores > self.score_threshold).nonzero().unbind(1)
            scores = scores[index, labels]
            best = scores.argsort(descending=True)[: self.test_cfg.nms_pre]
            levels.append((boxes[index[best]], scores[best], labels[best]))
        boxes, scores, labels = (torch.cat(parts) for parts in zip(*levels, strict=True))
        boxes = scale(boxes, resized, image)
        kept = suppress(boxes, scores, labels, self.test_cfg)
        return boxes[kept], scores[kept], labels[kept]


class MaskRCNN(Detector):
    """mmdet's Mask R-CNN: an image -> as of RetinaNet, and masks (n, h, w), bool."""

    outputs = ("boxes", "scores", "labels", "masks")

    def __init__(self, network: BaseModel, reader: Reader):
        super().__init__(network, reader, network.roi_head.test_cfg)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, resized = self.reader(image)
        maps = self.network.extract_feat(x)
        heads = self.network.roi_head
        pooled, order, proposals = pool(heads.bbox_roi_extractor, maps, self.propose(maps, resized))
        logits, deltas = heads.bbox_head(pooled)
        classes = heads.bbox_head.num_classes
        scores = logits.softmax(1)[:, :classes]
        index, labels = (scores > self.score_threshold).nonzero().unbind(1)
        scores = scores[index, labels]
        if not heads.bbox_head.reg_class_agnostic:
            deltas = deltas.view(-1, classes, 4)[index, labels]
        else:
            deltas = deltas[index]
        boxes = decode(heads.bbox_head.bbox_coder, proposals[index], deltas, resized)
        kept = suppress(boxes, scores, labels, self.test_cfg)
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]

        pooled, order, boxes = pool(heads.mask_roi_extractor, maps, boxes)
        scores, labels = scores[order], labels[order]
        logits = heads.mask_head(pooled)
        shares = logits[torch.arange(labels.shape[0]), labels].sigmoid()
        boxes = scale(boxes, resized, image)
        masks = paste(shares, boxes, image.shape[:2]) >= self.test_cfg.mask_thr_binary
        best = scores.argsort(descending=True)
        return boxes[best], scores[best], labels[best], masks[best]

    def propose(self, maps: Sequence[torch.Tensor], limit: torch.Tensor) -> torch.Tensor:
        """Boxes (n, 4) of the region proposal network, in pixels of its input."""
        head = self.network.rpn_head
        levels = []
        for number, (boxes, scores) in enumerate(self.candidates(head, maps, limit)):
            best = scores[:, 0].argsort(descending=True)[: head.test_cfg.nms_pre]
            levels.append((boxes[best], scores[best, 0], torch.full_like(best, number)))
        boxes, scores, numbers = (torch.cat(parts) for parts in zip(*levels, strict=True))
        return boxes[suppress(boxes, scores, numbers, head.test_cfg)]


def decode(coder: Any, boxes: torch.Tensor, deltas: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """Boxes (n, 4) moved and stretched by what a head says, (n, 4), inside of `limit`."""
    deltas = deltas * torch.tensor(coder.stds) + torch.tensor(coder.means)
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + size * deltas[:, :2]
    half = size * deltas[:, 2:].clamp(-LARGEST_SHAPE_CHANGE, LARGEST_SHAPE_CHANGE).exp() / 2
    corners = torch.cat([centre - half, centre + half], 1)
    return torch.minimum(corners.clamp(min=0), limit.flip(0).repeat(2))


def scale(boxes: torch.Tensor, resized: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Boxes (n, 4) of the network's input in pixels of the image."""
    factor = torch.tensor(image.shape[:2]) / resized
    return boxes * factor.flip(0).repeat(2)


def suppress(boxes: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, cfg: Any) -> torch.Tensor:
    """Indices of the best boxes that no better one of their group overlaps, best first."""
    sides = boxes[:, 2:] - boxes[:, :2]
    large = (sides > cfg.get("min_bbox_size", -1)).all(1).nonzero()[:, 0]
    boxes, scores, groups = boxes[large], scores[large], groups[large]
    end = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()  # there may be no boxes
    apart = boxes + (groups * (end + 1))[:, None]
    return large[ops.nms(apart, scores, cfg.nms.iou_threshold)[: cfg.max_per_img]]


def pool(extractor: Any, maps: Sequence[torch.Tensor], boxes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """RoIAlign from the level that fits the size of each box.

    Returns:
        Features (n, c, s, s) level by level, which of the boxes they belong to (n,), and these boxes (n, 4).
    """
    maps = maps[: extractor.num_inputs]
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    levels = (sides / extractor.finest_scale + 1e-6).log2().floor().clamp(0, len(maps) - 1)
    features, orders = [], []
    for level, (layer, x) in enumerate(zip(extractor.roi_layers, maps, strict=True)):
        index = (levels == level).nonzero()[:, 0]
        rois = nn.functional.pad(boxes[index], (1, 0))  # of the first image
        settings = layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned
        features.append(ops.roi_align(x, rois, *settings))
        orders.append(index)
    order = torch.cat(orders)
    return torch.cat(features), order, boxes[order]


def paste(masks: torch.Tensor, boxes: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Masks (n, s, s), which fill boxes (n, 4), on the whole image (n, h, w), by bilinear interpolation."""

    def weights(side: int, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """What each of the s entries counts at each pixel, (n, side, s)."""
        cells = masks.shape[1]
        positions = (torch.arange(side) + 0.5 - low[:, None]) / (high - low)[:, None] * cells - 0.5
        return (1 - (positions[:, :, None] - torch.arange(cells)).abs()).clamp(min=0)

    x1, y1, x2, y2 = boxes.unbind(1)
    return weights(size[0], y1, y2) @ masks @ weights(size[1], x1, x2).mT
