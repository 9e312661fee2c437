"""Hooks for mmengine's Runner."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from ..common.images import enlargement


@HOOKS.register_module()
class DrawPredictions(Hook):
    """In a test, draws truth (left) and prediction (right) of pictures from all over the data set.

    Args:
        folder: Where to, as NAME.png. A name is made of the whole path of a picture, so it never leads elsewhere.
        limit: About how many pictures.
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
                picture = mmcv.imread(sample.img_path, channel_order="rgb")
                factor = enlargement(*picture.shape[:2])
                picture = mmcv.imrescale(picture, factor)
                name = "_".join(Path(os.path.relpath(sample.img_path, folders[0])).with_suffix(".png").parts)
                runner.visualizer.add_datasample(
                    name, picture, data_sample=enlarge(sample.cpu(), factor), out_file=str(self.folder / name)
                )

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        runner.logger.info(f"pictures with truth (left) and predictions (right): {self.folder}")


def enlarge(sample: BaseDataElement, factor: int) -> BaseDataElement:
    """A copy of a sample whose boxes and masks are `factor` times as large: names would cover small pictures."""

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
