"""Predictions drawn into images, by mmdet's and mmseg's own visualizers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from PIL import Image, ImageDraw

from ..common.figures import image_font, plain
from ..common.images import enlargement

Palette = Sequence[tuple[int, ...]]


@HOOKS.register_module()
class DrawPredictions(Hook):
    """In a test, draws truth (left) and prediction (right) of images from all over the data set.

    Args:
        folder: Where to, as NAME.png. A name is made of the whole path of an image, so it never leads elsewhere.
        limit: About how many images.
    """

    def __init__(self, folder: str, limit: int):
        self.folder = Path(folder)
        self.limit = limit

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Sequence[BaseDataElement]
    ) -> None:
        loader = runner.test_dataloader
        folders = list((getattr(loader.dataset, "data_prefix", None) or {"": "."}).values())
        step = -(-len(loader.dataset) // (self.limit * runner.world_size))  # the first process draws
        for i, sample in enumerate(outputs):
            if (batch_idx * loader.batch_size + i) % step == 0:
                image = Image.fromarray(mmcv.imread(sample.img_path, channel_order="rgb"))
                name = "_".join(Path(os.path.relpath(sample.img_path, folders[0])).with_suffix(".png").parts)
                _draw(runner.visualizer, image, sample, out_file=str(self.folder / name))

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        runner.logger.info(f"images with truth (left) and predictions (right): {self.folder}")


def draw_instances(
    image: Image.Image, instances: InstanceData, class_names: Sequence[str], palette: Palette
) -> Image.Image:
    """An image with the boxes, names, scores and masks that a detector found; the last ones are on top."""
    from mmdet.visualization import DetLocalVisualizer

    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dict(classes=[plain(name) for name in class_names], palette=palette)
    return _draw(visualizer, image, BaseDataElement(pred_instances=instances), draw_gt=False, pred_score_thr=-1)


def draw_label_map(
    image: Image.Image, label_map: np.ndarray, class_names: Sequence[str], palette: Palette
) -> Image.Image:
    """An image in the colours of its classes, with a legend of these and their shares, the largest first."""
    from mmseg.visualization import SegLocalVisualizer

    visualizer = SegLocalVisualizer(alpha=0.5)
    visualizer.dataset_meta = dict(classes=class_names, palette=palette)
    sample = BaseDataElement(pred_sem_seg=PixelData(data=torch.from_numpy(label_map.astype(np.int64))[None]))
    drawn = _draw(visualizer, image, sample, with_labels=False)

    counts = np.bincount(label_map.reshape(-1))
    labels = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    shares = [f"{share:.1f} %" if share >= 0.1 else "< 0.1 %" for share in 100 * counts[labels] / label_map.size]
    texts = [f"{class_names[label]}  {share}" for label, share in zip(labels, shares, strict=True)]
    font = image_font(max(13, round(max(drawn.size) / 70)))
    line = round(font.size * 1.6)
    legend = round(max(map(font.getlength, texts))) + 3 * line
    sheet = Image.new("RGB", (drawn.width + legend, max(drawn.height, line * (len(texts) + 1))), "white")
    sheet.paste(drawn)
    pen = ImageDraw.Draw(sheet)
    for row, (label, text) in enumerate(zip(labels, texts, strict=True)):
        left, top = drawn.width + line // 2, line // 2 + row * line
        pen.rectangle((left, top + 2, left + line, top + line - 2), fill=tuple(palette[label]))
        pen.text((left + line * 1.5, top + line / 2), text, "black", font, anchor="lm")
    return sheet


def _draw(visualizer: Any, image: Image.Image, sample: BaseDataElement, **settings: Any) -> Image.Image:
    """An image and what is in a sample, enlarged by a whole number if names would cover it."""
    factor = enlargement(*image.size)
    large = image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    random = np.random.get_state()
    np.random.seed(0)  # mmdet varies the colours of masks
    visualizer.add_datasample("", np.asarray(large), enlarge(sample.cpu(), factor), **settings)
    np.random.set_state(random)
    return Image.fromarray(visualizer.get_image())


def enlarge(sample: BaseDataElement, factor: int) -> BaseDataElement:
    """A copy of a sample whose boxes and masks are `factor` times as large: names would cover small images."""

    def pixels(maps: torch.Tensor) -> torch.Tensor:
        return maps.repeat_interleave(factor, -2).repeat_interleave(factor, -1)

    sample = sample.clone()
    for key in ("gt_instances", "pred_instances"):
        instances = sample.get(key)
        if instances is not None:
            instances.bboxes = instances.bboxes * factor
            masks = instances.get("masks")
            if torch.is_tensor(masks):
                instances.masks = pixels(masks)
            elif masks is not None:  # mmdet's BitmapMasks or PolygonMasks
                instances.masks = masks.resize((masks.height * factor, masks.width * factor))
    for key in ("gt_sem_seg", "pred_sem_seg"):
        if sample.get(key) is not None:
            sample.set_field(type(sample.get(key))(data=pixels(sample.get(key).data)), key)
    return sample
