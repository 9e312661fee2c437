"""Reading the checkpoints of mmengine without running code in them."""

import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from ..common.errors import CheckpointError
from ..weights import read_checkpoint


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
        try:
            damaged = zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip()  # torch.load compares no checksums
            if not damaged:
                return torch.load(path, map_location="cpu", weights_only=False)
        except Exception as error:  # whatever a damaged pickle raises
            raise CheckpointError(f"cannot read {path}: {type(error).__name__}: {error}") from error
        raise CheckpointError(f"{path} is damaged: wrong checksum in {damaged}")
    try:
        with allowed_classes():
            checkpoint = read_checkpoint(path)
    except CheckpointError as error:
        hint = "; --trust-checkpoint reads by pickle, which may run code" if zipfile.is_zipfile(path) else ""
        raise CheckpointError(f"{error}{hint}") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path} is not a checkpoint")
    return checkpoint


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
