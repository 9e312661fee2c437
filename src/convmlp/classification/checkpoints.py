"""Checkpoint files of a run: written whole or not at all, checked when read, one kept in reserve.

A checkpoint is a flat dict of tensors and plain values, so that reading it never runs code.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from ..common.errors import CheckpointError, RunError
from ..common.files import write_atomically
from ..weights import read_checkpoint

_logger = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.pth", "previous.pth", "best.pth"
NEEDED_TO_RESUME = {
    "arch": str,
    "args": dict,
    "batch": int,
    "class_names": list,
    "epoch": int,
    "evaluated": bool,
    "history": list,
    "loss_counts": list,
    "loss_sums": list,
    "optimizer": dict,
    "skipped": int,
    "state_dict": dict,
    "updates": int,
    "world_size": int,
}


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save a checkpoint atomically."""

    def save(temporary: Path) -> None:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # how torch.save reports a full disk
            raise OSError(str(error).splitlines()[0]) from error

    write_atomically(path, save)


def write_last(folder: Path, state: dict[str, Any]) -> None:
    """Save the newest checkpoint of a run, keeping the one before it."""
    last = folder / LAST
    if last.exists():
        write_atomically(folder / PREVIOUS, lambda temporary: _duplicate(last, temporary))
    write_checkpoint(last, state)


def _duplicate(path: Path, copy: Path) -> None:
    """A second name for a file, or a copy of it."""
    try:
        os.link(path, copy)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, copy)


def adopt_best(source: Path, folder: Path) -> None:
    """Take over the best checkpoint of a run that `source` is of, or else `source` itself, into another folder."""
    best = source.with_name(BEST) if source.with_name(BEST).exists() else source
    write_atomically(folder / BEST, lambda temporary: _duplicate(best, temporary))


def find_newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run that can be read, or None before the first was written.

    Raises:
        RunError: there are checkpoints, and none can be read.
    """
    candidates = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    for path in candidates:
        try:
            return path, read_training_checkpoint(path)
        except (CheckpointError, RunError) as error:
            _logger.warning(f"{error}; trying the one before it")
    if candidates:
        raise RunError(f"no checkpoint in {folder} can be read; --overwrite starts anew")
    return None


def read_training_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint that a run can continue from."""
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict) or not NEEDED_TO_RESUME.keys() <= checkpoint.keys():
        raise RunError(
            f"{path} holds weights but no training state to resume; --initial-checkpoint starts from weights"
        )
    for key, kind in NEEDED_TO_RESUME.items():
        if not isinstance(checkpoint[key], kind):
            raise RunError(f"{path} is no checkpoint of classification.py: its {key} is {checkpoint[key]!r:.80}")
    return checkpoint
