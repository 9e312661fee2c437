"""mmengine's Runner, made to work without a GPU and to be careful with checkpoints."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.logging import HistoryBuffer
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner
from torch import nn

from ..zoo import CheckpointError, extract_state_dict, list_differences, read_checkpoint, shorten

BACKBONE = "backbone."


def _statistic(owner: type, name: str) -> Callable:
    """What a logged history refers to by getattr: one of its class's own statistics, and nothing else."""
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise CheckpointError(f"the checkpoint asks for {owner}.{name}")
    return getattr(HistoryBuffer, name)


@contextmanager
def allowed_classes() -> Iterator[None]:
    """Lets weights_only reading accept what mmengine's checkpoints hold besides tensors: its log, in arrays."""
    core = np._core if hasattr(np, "_core") else np.core
    allowed = [HistoryBuffer, np.ndarray, np.dtype, core.multiarray._reconstruct, core.multiarray.scalar]
    allowed += [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int32, np.int64, np.uint32, np.uint8)]
    with torch.serialization.safe_globals([*allowed, (_statistic, "builtins.getattr")]):
        yield


def read_run_checkpoint(path: str | os.PathLike, trust: bool = False) -> dict[str, Any]:
    """A checkpoint of mmengine, on the CPU. No code in it runs unless `trust` is set.

    Raises:
        CheckpointError: it is missing, damaged, or holds more than tensors, plain values and mmengine's log.
    """
    if trust:
        return torch.load(path, map_location="cpu", weights_only=False)
    with allowed_classes():
        checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} is not a checkpoint")
    return checkpoint


class CarefulRunner(Runner):
    """A Runner whose checkpoints are read without running code, loaded completely or not at all, and written whole.

    Config keys beyond those of Runner:
        channels_last: True for the channels_last memory layout, often faster with mixed precision.
        trust_checkpoint: True to read checkpoints that need pickle.
    """

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

        Raises:
            CheckpointError: the file cannot be read, or does not fit; with the names of what differs.
        """
        checkpoint = read_run_checkpoint(filename, bool(self.cfg.get("trust_checkpoint")))
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        weights = extract_state_dict(checkpoint, use_ema=False, name=filename)
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
        self._check_classes(checkpoint, filename)
        self._has_loaded = True
        self.logger.info(f"loaded {len(fitting)} tensors from {filename}")
        return checkpoint

    def _check_classes(self, checkpoint: dict[str, Any], filename: str) -> None:
        """A test with other classes than those trained would give figures without a meaning."""
        if not self._testing:
            return
        meta = checkpoint.get("meta") or {}
        trained = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES")  # the second: mmdet 2, mmseg 0
        tested = self.test_dataloader.dataset.metainfo.get("classes")
        if trained and list(trained) != list(tested):
            differing = [f"{a} / {b}" for a, b in zip(trained, tested, strict=False) if a != b][:3]
            raise CheckpointError(
                f"{filename} was trained for other classes ({len(trained)}) than the data has ({len(tested)}): "
                f"{', '.join(differing) or 'the shorter list begins the longer'}"
            )

    def save_checkpoint(self, out_dir: str, filename: str, file_client_args: dict | None = None, **kwargs: Any) -> None:
        """As in Runner, but the file takes its name when it is complete."""
        partial = f"{filename}.part"
        super().save_checkpoint(out_dir, partial, file_client_args, **kwargs)
        if is_main_process():
            os.replace(Path(out_dir) / partial, Path(out_dir) / filename)


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that a run in this folder can be resumed from, newest first."""
    found = [*folder.glob("epoch_*.pth"), *folder.glob("iter_*.pth")]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def newest_readable(folder: Path, trust: bool, logger: logging.Logger) -> Path | None:
    """The newest checkpoint that can be read; damaged ones are named in the log."""
    for path in find_checkpoints(folder):
        try:
            read_run_checkpoint(path, trust)
            return path
        except CheckpointError as error:
            logger.warning(f"{error}; trying the one before")
    return None
