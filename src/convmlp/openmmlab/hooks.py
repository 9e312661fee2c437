"""Hooks of a training run, in the order in which they act after a step.

`AverageHook` only before a validation; `WatchHook` looks whether to go on; `LateRemovalHook` writes the checkpoints
that the config asks for; `StopHook` writes the last one, of a run that was asked to stop.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce_params, broadcast_object_list, get_rank, get_world_size, is_distributed
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.runner import Runner
from torch import nn

from ..common.errors import Diverged

NONFINITE = "nonfinite.txt"


class AverageHook(Hook):
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


class WatchHook(Hook):
    """After every step of training: are the numbers finite, and was any process asked to stop?"""

    priority = "LOW"  # behind the log, before a checkpoint is written

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        bad = _nonfinite_values(runner, outputs or {})
        rank, number = runner.stop_request.maxima(get_rank() + 1 if bad else 0, runner.stop_request.number)
        if rank:
            message = [_describe(runner, bad, data_batch) if get_rank() == rank - 1 else None]
            broadcast_object_list(message, src=rank - 1)
            raise Diverged(message[0])
        runner.stop_signal = number


def _nonfinite_values(runner: Runner, outputs: dict[str, Any]) -> list[str]:
    values = {key: torch.as_tensor(value).item() for key, value in outputs.items() if "loss" in key}
    scalars = runner.message_hub.log_scalars
    if "train/grad_norm" in scalars and not hasattr(runner.optim_wrapper, "loss_scaler"):  # which skips such steps
        values["grad_norm"] = scalars["train/grad_norm"].current()
    return [f"{key} is {value}" for key, value in values.items() if not math.isfinite(value)]


def _describe(runner: Runner, bad: list[str], data_batch: Any) -> str:
    """What a run that diverged ends with; the images of the batch go into a file."""
    samples = data_batch.get("data_samples", []) if isinstance(data_batch, dict) else []
    images = [str(getattr(sample, "img_path", "without a path")) for sample in samples]
    title = f"iteration {runner.iter + 1}, process {get_rank()}: {', '.join(bad)}"
    file = Path(runner.work_dir) / NONFINITE
    try:
        file.write_text("\n".join([title, *images]) + "\n")
        where = f"; the images of the batch are listed in {file}"
    except OSError:
        where = f"; the images of the batch: {', '.join(images)}"
    return f"{title}{where}; {last_good(runner)}"


def last_good(runner: Runner) -> str:
    """Where to go on from after the weights are lost."""
    saved = runner.last_saved or runner.resumed_from
    start = f"the last good checkpoint is {saved}" if saved else "no checkpoint has been written yet"
    return f"{start}; a lower optim_wrapper.optimizer.lr or optim_wrapper.clip_grad.max_norm=1.0 may help"


def check_finite(runner: Runner, checkpoint: dict[str, Any]) -> None:
    """A checkpoint is written with finite weights or not at all.

    Raises:
        Diverged: some are not; the message names them.
    """
    for part in ("state_dict", "ema_state_dict"):
        for key, value in checkpoint.get(part, {}).items():
            if torch.is_tensor(value) and value.is_floating_point() and not torch.isfinite(value).all():
                where = f"at iteration {checkpoint['meta']['iter']}"
                raise Diverged(f"{key} is not finite {where}, so no checkpoint is written; {last_good(runner)}")


class LateRemovalHook(CheckpointHook):
    """A CheckpointHook that removes an old checkpoint when the new one is safe, and not before.

    mmengine's removes first: a run that is killed while it writes, or that fills the disk, then has no best checkpoint,
    or with `max_keep_ckpts=1` none at all.
    """

    file_backend: Any
    best_ckpt_path: Any

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self.file_backend = _LateRemoval()
        if getattr(self, "best_ckpt_path", None):  # the folder may have moved, and the other is not ours
            self.best_ckpt_path = self._in_this_folder(self.best_ckpt_path)
        for key, path in getattr(self, "best_ckpt_path_dict", {}).items():
            self.best_ckpt_path_dict[key] = path and self._in_this_folder(path)

    def _in_this_folder(self, path: str | None) -> str:
        return str(Path(self.out_dir, Path(path or "").name))

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        self._remove_outdated()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._remove_outdated()

    def _remove_outdated(self) -> None:
        best = [getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()]
        for path in {*self.file_backend.outdated} - {self.last_ckpt, *best}:
            Path(path).unlink(missing_ok=True)
        self.file_backend.outdated.clear()


class _LateRemoval(LocalBackend):
    """Only notes what to remove."""

    def __init__(self) -> None:
        self.outdated: list[str] = []

    def remove(self, filepath: str | Path) -> None:
        self.outdated.append(str(filepath))


class StopHook(Hook):
    """Writes a checkpoint and ends the run when `WatchHook` or the validation finds that it was asked to.

    Also checks the weights of every checkpoint: behind all other hooks it sees what is written.
    """

    priority = "LOWEST"

    def before_train(self, runner: Runner) -> None:
        if runner.validation_due:
            runner.finish_validation()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        check_finite(runner, checkpoint)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        if runner.stop_signal:
            runner.stop_here(iteration=runner.iter + 1)

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        if runner.stop_request is None:  # a validation by itself
            return
        loader = runner.val_dataloader
        fewest_images = len(loader.dataset) // get_world_size()
        if batch_idx * loader.batch_sampler.batch_size >= fewest_images:  # other processes may be through
            return
        [runner.stop_signal] = runner.stop_request.maxima(runner.stop_request.number)
        if runner.stop_signal:
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)  # puts the trained weights back in place of the averaged ones
            runner.stop_here(iteration=runner.iter, validating=True)
