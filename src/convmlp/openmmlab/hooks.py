"""Hooks for mmengine's Runner."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement


@HOOKS.register_module()
class DrawPredictions(Hook):
    """In a test, draws truth (left) and prediction (right) of pictures from all over the data set.

    Args:
        folder: Where to, as NAME.png.
        limit: About how many pictures.
    """

    def __init__(self, folder: str, limit: int):
        self.folder = Path(folder)
        self.limit = limit

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Sequence[BaseDataElement]
    ) -> None:
        loader = runner.test_dataloader
        step = -(-len(loader.dataset) // self.limit)
        for i, sample in enumerate(outputs):
            if (batch_idx * loader.batch_size + i) % step == 0:
                picture = mmcv.imread(sample.img_path, channel_order="rgb")
                file = self.folder / f"{Path(sample.img_path).stem}.png"
                runner.visualizer.add_datasample(file.stem, picture, data_sample=sample, out_file=str(file))

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        runner.logger.info(f"pictures with truth (left) and predictions (right): {self.folder}")
