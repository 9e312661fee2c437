"""What brings a run through signals, full disks and diverging losses."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from mmengine.dist import broadcast_object_list, get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ..common.errors import Diverged, RunError
from ..common.signals import leave_signals_to_the_parent

NONFINITE = "nonfinite_batch.txt"
T = TypeVar("T")


def on_main_process(work: Callable[[], T]) -> T:
    """Let the first process do it, and give its result, or its complaint, to all."""
    result: list[Any] = [None, None]
    if is_main_process():
        try:
            result[0] = work()
        except RunError as error:
            result[1] = type(error), str(error)
    broadcast_object_list(result)
    value, complaint = result
    if complaint:
        kind, message = complaint
        raise kind(message)
    return value


def shield_workers(loader: DataLoader) -> DataLoader:
    """Let the processes that load data go on when a scheduler signals all processes of a job."""
    loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
    return loader


def _start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    leave_signals_to_the_parent()
    if start:
        start(worker)


class ResumableEpochLoop(EpochBasedTrainLoop):
    """An EpochBasedTrainLoop that can go on within an epoch.

    The first `batches_done` are not loaded again: the order of the images depends on seed and epoch alone.
    """

    batches_done = 0

    @property
    def images_per_step(self) -> int:
        return getattr(self.dataloader.batch_sampler, "batch_size", 1) * get_world_size()

    def run_epoch(self) -> None:
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        for idx, data_batch in enumerate(_without(self.dataloader, self.batches_done), self.batches_done):
            self.batches_done = idx + 1
            self.run_iter(idx, data_batch)
        self.batches_done = 0
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


def _without(loader: DataLoader, n: int) -> DataLoader:
    """A loader of all batches but the first n."""
    if n == 0:
        return loader
    rest = copy.copy(loader)
    assert loader.batch_sampler is not None  # mmengine's runner makes batches of everything
    vars(rest)["batch_sampler"] = itertools.islice(loader.batch_sampler, n, None)  # by `=` DataLoader refuses it
    return rest


class LateRemovalHook(CheckpointHook):
    """A CheckpointHook that removes an old checkpoint when the new one is safe, and not before."""

    file_backend: Any
    best_ckpt_path: Any

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self.file_backend = _LateRemoval(self.file_backend)
        if getattr(self, "best_ckpt_path", None):  # the folder may have moved, and the other is not ours
            self.best_ckpt_path = self._in_this_folder(self.best_ckpt_path)
        for key, path in getattr(self, "best_ckpt_path_dict", {}).items():
            self.best_ckpt_path_dict[key] = path and self._in_this_folder(path)

    def _in_this_folder(self, path: str) -> str:
        return self.file_backend.join_path(self.out_dir, Path(path).name)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        super()._save_checkpoint_with_step(runner, step, meta)
        self._remove_outdated()

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        super()._save_best_checkpoint(runner, metrics)
        self._remove_outdated()

    def _remove_outdated(self) -> None:
        best = [getattr(self, "best_ckpt_path", None), *getattr(self, "best_ckpt_path_dict", {}).values()]
        self.file_backend.remove_all(but=[self.last_ckpt, *best])


class _LateRemoval:
    """A file backend that only notes what to remove, until told to do so."""

    def __init__(self, backend: Any):
        self._backend = backend
        self._noted: list[tuple[Callable[[str], None], str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._noted.append((self._backend.remove, path))

    def rmtree(self, path: str) -> None:
        self._noted.append((self._backend.rmtree, path))

    def remove_all(self, but: Sequence[str | None]) -> None:
        for remove, path in self._noted:
            if path not in but and self._backend.exists(path):
                remove(path)
        self._noted.clear()


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
    """What a run that diverged ends with; the pictures of the batch go into a file."""
    samples = data_batch.get("data_samples", []) if isinstance(data_batch, dict) else []
    pictures = [str(getattr(sample, "img_path", "without a path")) for sample in samples]
    title = f"iteration {runner.iter + 1}, process {get_rank()}: {', '.join(bad)}"
    file = Path(runner.work_dir) / NONFINITE
    try:
        file.write_text("\n".join([title, *pictures]) + "\n")
        where = f"; the pictures of the batch are listed in {file}"
    except OSError:
        where = f"; the pictures of the batch: {', '.join(pictures)}"
    return f"{title}{where}; {last_good(runner)}"


def last_good(runner: Runner) -> str:
    """Where to go on from after the weights are lost."""
    saved = runner.last_saved or runner.resumed_from
    start = f"the last good checkpoint is {saved}" if saved else "no checkpoint was written yet"
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
