"""mmengine's Runner, made to work without a GPU and to be careful with checkpoints."""

import os
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce_params, is_distributed, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner
from torch import nn

from ..zoo import CheckpointError, extract_state_dict, list_differences, shorten
from .checkpoints import read_run_checkpoint

BACKBONE = "backbone."


class _AverageStatistics(Hook):
    """Validates all processes with the same model."""

    def before_val_epoch(self, runner: Runner) -> None:
        average_statistics(runner.model)


def average_statistics(model: nn.Module) -> None:
    """Give all processes the mean of their BatchNorm statistics, as timm's `--dist-bn reduce` does.

    Each has those of the images it saw. Without this, every process would validate another model than the one saved.
    """
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    if is_distributed() and statistics:
        all_reduce_params(statistics, op="mean")


class CarefulRunner(Runner):
    """A Runner whose checkpoints are read without running code, loaded completely or not at all, and written whole.

    Config keys beyond those of Runner:
        channels_last: True for the channels_last memory layout, often faster with mixed precision.
        trust_checkpoint: True to read checkpoints that need pickle.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.register_hook(_AverageStatistics())

    def set_randomness(self, seed: int | None, diff_rank_seed: bool = False, deterministic: bool = False) -> None:
        """As in Runner, but an operator that exists in no deterministic form is a warning, not the end."""
        super().set_randomness(seed, diff_rank_seed, deterministic)
        if deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if self.cfg.get("channels_last"):
            model = model.to(memory_format=torch.channels_last)
        return super().wrap_model(model_wrapper_cfg, model)

    @property
    def _testing(self) -> bool:
        return isinstance(self._test_loop, BaseLoop)  # until it runs, it is a config

    def load_checkpoint(
        self, filename: str, map_location: Any = "cpu", strict: bool = False, revise_keys: Any = None
    ) -> dict[str, Any]:
        """Load weights: all of them to test or resume; to start from them, at least all of the backbone.

        The other arguments are Runner's, and change nothing: the file is read to the CPU and held to the rule above.

        Raises:
            CheckpointError: the file cannot be read, or does not fit; with the names of what differs.
        """
        checkpoint = read_run_checkpoint(filename, bool(self.cfg.get("trust_checkpoint")))
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        weights = extract_state_dict(checkpoint, use_ema=False, name=filename)
        self._check_classes(checkpoint, filename)
        model = self.model.module if is_model_wrapper(self.model) else self.model
        own = model.state_dict()
        differences = list_differences(weights, own)
        starting = not self._testing and not self._resume
        fatal = [text for text in differences if text.startswith(BACKBONE)] if starting else differences
        if fatal:
            raise CheckpointError(f"{filename} does not fit the model: {shorten(fatal)}")
        if differences:
            self.logger.warning(
                f"{filename}: parts of the model start from their initialisation: {shorten(differences)}"
            )
        fitting = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
        model.load_state_dict(fitting, strict=False)
        self._has_loaded = True
        self.logger.info(f"loaded {len(fitting)} tensors from {filename}")
        return checkpoint

    def _check_classes(self, checkpoint: dict[str, Any], filename: str) -> None:
        """A test, or more training, with other classes than those trained would give figures without a meaning."""
        if not self._testing and not self._resume:
            return
        meta = checkpoint.get("meta") or {}
        trained = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES")  # the second: mmdet 2, mmseg 0
        loader = self.test_dataloader if self._testing else self.train_dataloader
        present = loader.dataset.metainfo.get("classes")
        if trained and list(trained) != list(present):
            differing = [f"{a} / {b}" for a, b in zip_longest(trained, present, fillvalue="nothing") if a != b]
            raise CheckpointError(
                f"{filename} was trained for other classes ({len(trained)}) than this run has ({len(present)}): "
                f"{', '.join(differing[:3])}; --classes FILE chooses classes"
            )

    def save_checkpoint(self, out_dir: str, filename: str, file_client_args: dict | None = None, **kwargs: Any) -> None:
        """As in Runner, but of all processes' statistics, and the file takes its name when it is complete."""
        average_statistics(self.model)
        partial = f"{filename}.part"
        super().save_checkpoint(out_dir, partial, file_client_args, **kwargs)
        if is_main_process():
            os.replace(Path(out_dir) / partial, Path(out_dir) / filename)
