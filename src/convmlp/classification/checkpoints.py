"""Checkpoint files of a run: written whole or not at all, checked when read, one kept in reserve.

A checkpoint is a flat dict of tensors and plain values, so that reading it never runs code.
"""

import errno
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch

from .. import __version__
from ..common.errors import RunError, one_line
from ..common.files import write_atomically
from ..weights import read_checkpoint
from .settings import Options

if TYPE_CHECKING:
    from .trainer import Trainer

_logger = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, on the disk, for the user, or in one file

LAST, PREVIOUS, BEST = "last.pth", "previous.pth", "best.pth"
NEEDED_TO_RESUME: dict[str, type] = dict(arch=str, args=dict, batch=int, class_names=list, epoch=int, evaluated=bool)
NEEDED_TO_RESUME |= dict(loss_counts=list, loss_sums=list, optimizer=dict, skipped=int, state_dict=dict, updates=int)
NEEDED_TO_RESUME |= dict(world_size=int, history=list)
MUST_AGREE_WITHIN_AN_EPOCH = ("batch_size", "grad_accum_steps", "seed", "dataset", "data_dir", "train_split")
MAY_CHANGE_SILENTLY = ("output", "experiment", "workers")


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save a checkpoint atomically.

    Raises:
        RunError: it cannot be written, such as for want of space; the message says how much it needs.
    """

    def save(temporary: Path) -> None:
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
        except (RuntimeError, OSError) as error:
            system = _system_error(error)
            if system is None:
                raise OSError(one_line(error)) from error
            megabytes = sum(tensor.nbytes for _, tensor in named_tensors(state)) / 1e6
            needed = f", {megabytes:.0f} MB needed" if system.errno in FULL else ""
            raise OSError(system.errno, f"{system.strerror}{needed}") from error

    write_atomically(path, save)


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's reason for an error, after which torch raises one of its own."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__context__
    return None


def named_tensors(state: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a nested state, with the keys that lead to them."""
    if isinstance(state, torch.Tensor):
        yield name, state
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    for key, value in items:
        yield from named_tensors(value, f"{name}.{key}")


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
    """Copy the best checkpoint of the run that `source` is of, or else `source` itself, into another folder."""
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
        except RunError as error:
            _logger.warning(f"{error}; trying the one before it")
    if candidates:
        raise RunError(f"no checkpoint in {folder} can be read; --overwrite starts anew")
    return None


def read_training_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint that a run can continue from.

    Raises:
        CheckpointError: it cannot be read.
        RunError: it holds no training state.
    """
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict) or not NEEDED_TO_RESUME.keys() <= checkpoint.keys():
        raise RunError(
            f"{path} holds weights but no training state to resume; --initial-checkpoint starts from weights"
        )
    for key, kind in NEEDED_TO_RESUME.items():
        if not isinstance(checkpoint[key], kind):
            raise RunError(f"{path} is not a classification.py checkpoint: its {key} is {checkpoint[key]!r:.80}")
    return checkpoint


def versions() -> dict[str, str]:
    """Of the packages that a run depends on most."""
    return {"convmlp": __version__, "timm": timm.__version__, "torch": str(torch.__version__)}


def capture(trainer: "Trainer", evaluated: bool) -> dict[str, Any]:
    """The checkpoint of a run as it stands between two updates, or after the evaluation of an epoch.

    All processes take part; the primary writes it.
    """
    history = trainer.history
    best = history.rows[history.best_epoch] if history.rows else None
    state: dict[str, Any] = {
        "arch": trainer.options.model,
        "epoch": trainer.epoch,
        "batch": trainer.batch,
        "evaluated": evaluated,
        "updates": trainer.updates,
        "skipped": trainer.skipped,
        "loss_sums": trainer.process.gather(trainer.sums[0].item()),
        "hit_sums": trainer.process.gather(trainer.sums[1].item()),
        "loss_counts": trainer.process.gather(trainer.count),
        **trainer.task.get_checkpoint_state(),
        **(trainer.task.get_checkpoint_state(ema=True) if trainer.task.has_ema() else {}),
        "optimizer": trainer.optimizer.state_dict(),
        "history": history.rows,
        "best": best and {"epoch": history.best_epoch, "value": history.figure(best)},
        "eval_metric": history.metric,
        "class_names": trainer.class_names,
        "data_config": dict(trainer.data_config),
        "args": trainer.options.stored(),
        "world_size": trainer.process.world_size,
        "versions": versions(),
    }
    if trainer.scaler.is_enabled():
        state["scaler"] = trainer.scaler.state_dict()
    return state


def as_begun(options: Options, state: dict[str, Any]) -> Options:
    """The options for a run to continue with; one that an older version began has the schedule of then."""
    return options if "warmup_prefix" in state["args"] else replace(options, warmup_prefix=False)


def restore(trainer: "Trainer", path: Path, state: dict[str, Any]) -> None:
    """Continue from a checkpoint of this run.

    Raises:
        RunError: it is of another run.
    """
    _check_same_run(path, state, trainer.options, trainer.class_names, trainer.process.world_size)
    try:
        trainer.task.load_checkpoint_state(state["state_dict"])
        if trainer.task.has_ema():
            trainer.task.load_checkpoint_state(state["state_dict_ema"], ema=True)
        settings = [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizer.param_groups]
        trainer.optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(trainer.optimizer.param_groups, settings, strict=True):
            group.update(own)  # the options given now hold, not those of the checkpoint
    except (RuntimeError, ValueError) as error:
        raise RunError(f"{path} does not fit this run: {one_line(error)}") from error
    if trainer.scaler.is_enabled() and "scaler" in state:
        trainer.scaler.load_state_dict(state["scaler"])
    trainer.updates, trainer.skipped = state["updates"], state["skipped"]
    history = trainer.history
    history.rows = state["history"]
    # best.pth holds this epoch, so later ones are compared with it, by the metric that is asked for now
    best = state["best"]["epoch"] if state.get("best") else 0
    history.best_epoch = best if best in range(len(history.rows)) else 0
    if state["evaluated"]:
        trainer.epoch, trainer.batch = state["epoch"] + 1, 0
        trainer.updates = trainer.epoch * trainer.updates_per_epoch  # which another batch size may have changed
    else:
        trainer.epoch, trainer.batch = state["epoch"], state["batch"]
        sums = [state[key][trainer.process.rank] for key in ("loss_sums", "hit_sums") if key in state]
        trainer.sums.fill_(math.nan)[: len(sums)] = torch.tensor(sums, dtype=torch.float64)  # older ones lack the hits
        trainer.count = state["loss_counts"][trainer.process.rank]
    if trainer.scheduler:
        trainer.scheduler.step_update(trainer.updates)
        for row in history.rows:  # plateau is a function of the metrics so far
            trainer.scheduler.step(int(row["epoch"]) + 1, history.figure(row))
    _logger.info(f"resuming from {path}: epoch {trainer.epoch}, batch {trainer.batch}")


def _check_same_run(
    path: Path, state: dict[str, Any], options: Options, class_names: Sequence[str], world_size: int
) -> None:
    """Make sure that a run with these options can continue from a checkpoint; warn of options that have changed.

    Raises:
        RunError: it is of another model or other classes, or stands within an epoch of other batches.
    """
    for key, ours in {"arch": options.model, "class_names": list(class_names)}.items():
        if state[key] != ours:
            raise RunError(f"{path} is of another run: its {key} is {state[key]}, here it is {ours}")
    now = options.stored()
    args = as_begun(Options(), state).stored() | state["args"]  # older versions did not have all options
    if now["eval_metric"] == "auto":  # which keeps what the run had
        args["eval_metric"] = "auto"
    changed = [key for key in now if args[key] != now[key] and key not in MAY_CHANGE_SILENTLY]
    if state["batch"] > 0 and not state["evaluated"]:
        moved = ", ".join(key for key in MUST_AGREE_WITHIN_AN_EPOCH if key in changed)
        if moved or state["world_size"] != world_size:
            what = moved or f"{state['world_size']} processes"
            raise RunError(f"{path} stands within an epoch and continues only with the same {what}")
    if changed:
        words = "; ".join(f"{key} {args[key]} -> {now[key]}" for key in changed)
        _logger.warning(f"resuming with changed options: {words}")
    if options.model_ema != ("state_dict_ema" in state):
        raise RunError(f"{path}: --model-ema cannot be switched on or off when resuming")
