"""A training run: the loop, and how it is saved and continued."""

import logging
import math
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import timm
import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import dispatch_clip_grad, distribute_bn, unwrap_model
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

from .. import __version__
from ..common.devices import autocast, resolve_amp_dtype
from ..common.errors import Diverged, RunError, Stopped
from ..common.signals import StopRequest
from ..weights import extract_state_dict, read_checkpoint
from . import report
from .checkpoints import BEST, LAST, write_checkpoint, write_last
from .evaluation import Details, FullBatches, evaluate, log_unreadable, write_details
from .loaders import Loader, StreamLoader, seed_all
from .models import create_optimizer, create_task
from .options import stored_options
from .process import Process

_logger = logging.getLogger(__name__)

NONFINITE = "nonfinite.txt"
MUST_AGREE_WITHIN_AN_EPOCH = ("batch_size", "grad_accum_steps", "seed", "dataset", "data_dir", "train_split")


class _Number(NamedTuple):
    """Something that has to be finite: what it is, the batch it belongs to, and a scalar tensor."""

    name: str
    batch: int
    value: torch.Tensor


def _first_nonfinite(numbers: list[_Number]) -> _Number | None:
    if not numbers:
        return None
    finite = torch.isfinite(torch.stack([number.value.float() for number in numbers])).tolist()
    return None if all(finite) else numbers[finite.index(False)]


def _find_nonfinite(state: Any, name: str) -> str | None:
    """The name of the first tensor in a nested state that holds NaN or infinity."""
    if isinstance(state, torch.Tensor):
        return None if torch.isfinite(state).all() else name
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return next((bad for key, value in items if (bad := _find_nonfinite(value, f"{name}.{key}"))), None)


class _Clock:
    """How fast an epoch goes, and how much of its time this process waits for the next batch."""

    def __init__(self, batch_images: int):
        self.batch_images = batch_images
        self.n_batches = 0
        self.waited = 0.0
        self.start = time.perf_counter()

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            self.n_batches += 1
            yield batch

    def pace(self) -> str:
        seconds = time.perf_counter() - self.start
        rate = self.n_batches * self.batch_images / seconds
        return f"{rate:.0f} img/s, {self.waited / seconds:.0%} waiting for data"


class Trainer:
    """A training run: what changes during it, and how it is saved and continued."""

    def __init__(
        self,
        options: Namespace,
        process: Process,
        folder: Path,
        model: nn.Module,
        train_loader: Loader | StreamLoader,
        val_loader: Loader | StreamLoader,
        class_names: list[str],
        data_config: dict[str, Any],
    ):
        self.options = options
        self.process = process
        self.folder = folder
        self.model = model
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.class_names = class_names
        self.data_config = data_config
        self.amp_dtype = resolve_amp_dtype(options.amp_dtype, process.device) if options.amp else None
        if options.amp and self.amp_dtype is None:
            _logger.info("this CPU has no native bfloat16: training in float32, as with --no-amp")
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=self.amp_dtype == torch.float16)

        if options.channels_last:
            model.to(memory_format=torch.channels_last)
        if options.sync_bn:
            if process.device.type != "cuda":
                raise RunError("--sync-bn needs GPUs")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.task = create_task(options, model, process, class_names)
        self.optimizer = create_optimizer(options, model, process.device)
        self.updates_per_epoch = -(-len(train_loader) // options.grad_accum_steps)
        try:
            self.scheduler, self.epochs = create_scheduler_v2(
                self.optimizer,
                **{**scheduler_kwargs(options), "step_on_epochs": options.sched == "plateau"},
                updates_per_epoch=self.updates_per_epoch,
            )
        except ValueError as error:
            raise RunError(f"--sched {options.sched}: {error}") from error
        self.average: nn.Module | None = None  # of the weights
        if options.model_ema:
            self.average = self.task.setup_ema(decay=options.model_ema_decay, use_warmup=options.model_ema_warmup)
        self.eval_model = model  # without DDP, whose forward would wait for the other processes
        if options.compile:
            compiled = self.task.compile(dynamic=False)
            self.eval_model = FullBatches(compiled, options.validation_batch_size or options.batch_size)
        if process.distributed:
            device_ids = [process.device.index] if process.device.type == "cuda" else None
            self.task.prepare_distributed(
                device_ids=device_ids,
                gradient_as_bucket_view=True,
                find_unused_parameters=options.find_unused_parameters,
            )

        self.epoch = 0
        self.batch = 0  # batches of this epoch that are trained on
        self.updates = 0
        self.skipped = 0  # of the updates, those left out for numbers that were not finite
        precise = torch.float32 if process.device.type == "mps" else torch.float64
        self.loss_sum = torch.zeros((), dtype=precise, device=process.device)
        self.loss_count = 0
        self.stop = StopRequest()
        self.saved_at = time.monotonic()
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] | None = None

    # A checkpoint stands between two updates: at `batch` of `epoch`, or after the evaluation of `epoch`.

    def state(self, evaluated: bool) -> dict[str, Any]:
        """The checkpoint; all processes take part, the primary writes it."""
        state: dict[str, Any] = {
            "arch": self.options.model,
            "epoch": self.epoch,
            "batch": self.batch,
            "evaluated": evaluated,
            "updates": self.updates,
            "skipped": self.skipped,
            "loss_sums": self.process.gather(self.loss_sum.item()),
            "loss_counts": self.process.gather(self.loss_count),
            **self.task.get_checkpoint_state(),
            **(self.task.get_checkpoint_state(ema=True) if self.task.has_ema() else {}),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "best": self.best,
            "class_names": self.class_names,
            "data_config": self.data_config,
            "args": stored_options(self.options),
            "world_size": self.process.world_size,
            "versions": {"convmlp": __version__, "timm": timm.__version__, "torch": str(torch.__version__)},
        }
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        return state

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Continue from a checkpoint of this run."""
        ours = {"arch": self.options.model, "class_names": self.class_names}
        for key, value in ours.items():
            if state[key] != value:
                raise RunError(f"{path} is of another run: its {key} is {state[key]}, here it is {value}")
        changed = [
            f"{key} {state['args'].get(key)} -> {value}"
            for key, value in stored_options(self.options).items()
            if state["args"].get(key) != value and key not in ("output", "experiment", "workers")
        ]
        mid_epoch = 0 < state["batch"] and not state["evaluated"]
        if mid_epoch:
            moved = [key for key in MUST_AGREE_WITHIN_AN_EPOCH if state["args"][key] != getattr(self.options, key)]
            if moved or state["world_size"] != self.process.world_size:
                what = ", ".join(moved) or f"{state['world_size']} processes"
                raise RunError(f"{path} stands within an epoch and continues only with the same {what}")
        if changed:
            _logger.warning(f"resuming with changed options: {'; '.join(changed)}")
        if self.task.has_ema() != ("state_dict_ema" in state):
            raise RunError(f"{path}: --model-ema cannot be switched on or off when resuming")
        try:
            self.task.load_checkpoint_state(state["state_dict"])
            if self.task.has_ema():
                self.task.load_checkpoint_state(state["state_dict_ema"], ema=True)
            settings = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state["optimizer"])
            for group, own in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(own)  # the options given now hold, not those of the checkpoint
        except (RuntimeError, ValueError) as error:
            raise RunError(f"{path} does not fit this run: {' '.join(str(error).split())[:300]}") from error
        if self.scaler.is_enabled() and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        self.updates = state["updates"]
        self.skipped = state["skipped"]
        self.history = state["history"]
        self.best = state.get("best")
        if state["evaluated"]:
            self.epoch, self.batch = state["epoch"] + 1, 0
            self.updates = self.epoch * self.updates_per_epoch  # which another batch size may have changed
        else:
            self.epoch, self.batch = state["epoch"], state["batch"]
            self.loss_sum.fill_(state["loss_sums"][self.process.rank])
            self.loss_count = state["loss_counts"][self.process.rank]
        if self.scheduler:
            self.scheduler.step_update(self.updates)
            for row in self.history:  # plateau is a function of the metrics so far
                self.scheduler.step(int(row["epoch"]) + 1, self._metric(row))
        _logger.info(f"resuming from {path}: epoch {self.epoch}, batch {self.batch}")

    def save(self, evaluated: bool) -> None:
        """Write last.pth, unless weights, averages or the optimizer's moments have become NaN or infinite."""
        state = self.state(evaluated)
        for part in ("state_dict", "state_dict_ema", "optimizer"):
            name = _find_nonfinite(state.get(part), part)
            if name:
                raise Diverged(f"{name} is not finite after update {self.updates}; {self._last_good()}")
        if self.process.primary:
            if evaluated and self.best and self.best["epoch"] == self.epoch:  # before last.pth, which speaks of it
                write_checkpoint(self.folder / BEST, {key: v for key, v in state.items() if key != "optimizer"})
            write_last(self.folder, state)
        self.saved_at = time.monotonic()

    def _last_good(self) -> str:
        last = self.folder / LAST
        return f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"

    def _metric(self, row: dict[str, float]) -> float:
        """The figure that says how good an epoch was: of the averaged weights where they are kept."""
        prefix = "eval_ema_" if self.task.has_ema() else "eval_"
        return row[prefix + self.options.eval_metric]

    def run(self, logs: "ExternalLogs | None") -> None:
        """Train to the end, then show how the best checkpoint does. The primary process has the logs."""
        n_train, n_val = len(self.train_loader.dataset), len(self.val_loader.dataset)
        precision = "float32" if self.amp_dtype is None else str(self.amp_dtype).removeprefix("torch.")
        _logger.info(
            f"{self.options.model}, {len(self.class_names)} classes, {n_train} training and {n_val} validation images "
            f"of {self.data_config['input_size'][-1]} px\n{self.process.world_size} x {self.process.device.type}, "
            f"{precision}, {self.epochs} epochs of {len(self.train_loader)} batches, output in {self.folder}"
        )
        if logs and self.history:
            report.write_summary(self.folder / "summary.csv", self.history)
        if self.epoch >= self.epochs:
            _logger.info("the run is already complete")
        try:
            with self.stop:
                while self.epoch < self.epochs:
                    self._run_epoch(logs)
        finally:
            if logs:
                logs.close()
        self._finish()

    def _run_epoch(self, logs: "ExternalLogs | None") -> None:
        """Train and evaluate from where the run stands to the start of the next epoch."""
        start = time.perf_counter()
        train_loss, pace = self.train_epoch()
        row = self._evaluate_epoch(train_loss)
        if row is None:
            self._save_and_stop()
        self.save(evaluated=True)
        if logs:
            report.write_summary(self.folder / "summary.csv", self.history)
            report.write_curves(self.folder / "curves.png", self.history)
            logs.write(row)
            _logger.info(self._epoch_line(row, pace, time.perf_counter() - start))
        self.epoch, self.batch = self.epoch + 1, 0
        self.loss_sum.zero_()
        self.loss_count = 0

    def train_epoch(self) -> tuple[float, str]:
        """The rest of this epoch; returns the mean loss of the whole epoch, and in words how fast it went."""
        options, process, task = self.options, self.process, self.task
        n_batches, accumulate = len(self.train_loader), options.grad_accum_steps
        check_interval = 1 if process.device.type == "cpu" else options.log_interval
        batch_images = options.batch_size * process.world_size
        task.train()
        self.optimizer.zero_grad()
        self.train_loader.start(self.epoch, self.batch)
        unchecked: list[_Number] = []
        first, clock = self.batch, _Clock(batch_images)
        bar = tqdm(
            total=n_batches,
            initial=first,
            desc=f"epoch {self.epoch}",
            disable=None if process.primary else True,
            leave=False,
            unit="batch",
        )
        for number, (images, targets) in enumerate(clock.watch(self.train_loader), first):
            in_update = min(accumulate, n_batches - number // accumulate * accumulate)
            updates_now = number % accumulate == in_update - 1
            if options.skip_nonfinite and number % accumulate == 0:
                before_update = self._statistics()
            if options.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            seed_all(options.seed, "step", self.epoch, number, process.rank)
            with nullcontext() if updates_now else task.no_sync():
                with autocast(process.device, self.amp_dtype):
                    loss = task(images, targets)["loss"]
                self.scaler.scale(loss / in_update).backward()
            unchecked.append(_Number("the loss", number, loss.detach()))
            self.loss_sum += loss.detach()
            self.loss_count += 1
            self.batch = number + 1
            if updates_now:
                norm = self._clip_gradients()
                if not self.scaler.is_enabled():  # which itself leaves out what overflows
                    unchecked.append(_Number("the norm of the gradients", number, norm))
                skips_now = bool(options.skip_nonfinite) and self._must_skip(unchecked)
                if skips_now:
                    self._restore(before_update)
                else:
                    self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
                self.updates += 1
                if not skips_now:
                    task.update_ema(step=self.updates)
                if self.scheduler:
                    self.scheduler.step_update(self.updates)
            stops_now = saves_now = False
            if updates_now and self.batch < n_batches:
                stops_now, saves_now = map(bool, self.stop.maxima(self.stop.number, self._save_is_due()))
            if stops_now or saves_now or self.batch == n_batches or self.batch % check_interval == 0:
                self._check_finite(unchecked)
                status = f"loss {loss.item():.3f}, lr {self._lr():.1e}, {clock.pace()}"
                bar.set_postfix_str(status, refresh=False)
                if bar.disable and self.batch % options.log_interval == 0:
                    _logger.info(f"epoch {self.epoch} batch {self.batch}/{n_batches}: {status}")
            bar.update()
            if stops_now:
                bar.close()
                self._save_and_stop()
            if saves_now:
                self.save(evaluated=False)
        bar.close()
        pace = clock.pace()
        if process.distributed and options.dist_bn and first < n_batches:
            distribute_bn(self.model, process.world_size, options.dist_bn == "reduce")
            if self.average is not None:
                distribute_bn(self.average, process.world_size)
        count = sum(process.gather(self.loss_count))
        return sum(process.gather(self.loss_sum.item())) / count if count else math.nan, pace

    def _clip_gradients(self) -> torch.Tensor:
        """The norm of all gradients, as they were before clipping."""
        options = self.options
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.task.parameters() if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if options.clip_grad is not None:
            parameters = self.task.get_clip_parameters(exclude_head=options.clip_mode == "agc")
            if options.clip_mode == "norm":
                clip_grads_with_norm_(parameters, options.clip_grad, norm)
            else:
                dispatch_clip_grad(parameters, options.clip_grad, mode=options.clip_mode)
        return norm

    def _save_is_due(self) -> bool:
        """Whether to save within the epoch, as far as this process knows."""
        options = self.options
        if isinstance(self.train_loader, StreamLoader):  # which could not go on from there
            return False
        by_steps = options.checkpoint_interval and self.updates % options.checkpoint_interval == 0
        by_time = options.checkpoint_minutes and time.monotonic() - self.saved_at >= 60 * options.checkpoint_minutes
        return bool(by_steps or by_time)

    def _save_and_stop(self) -> NoReturn:
        name = self.stop.agreed()
        if isinstance(self.train_loader, StreamLoader):
            raise Stopped(f"{name}: streamed data resume at epochs only, so epoch {self.epoch} is lost")
        self.save(evaluated=False)
        raise Stopped(f"{name}: saved at batch {self.batch} of epoch {self.epoch}; --resume auto goes on from there")

    # Numbers that are not finite

    def _statistics(self) -> tuple[list[torch.Tensor], torch.Tensor, int]:
        """What a step changes beside the weights."""
        return [buffer.clone() for buffer in self.model.buffers()], self.loss_sum.clone(), self.loss_count

    def _restore(self, statistics: tuple[list[torch.Tensor], torch.Tensor, int]) -> None:
        buffers, self.loss_sum, self.loss_count = statistics
        for buffer, value in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(value)

    def _must_skip(self, unchecked: list[_Number]) -> bool:
        """Whether any process met a number that is not finite in this update."""
        bad = _first_nonfinite(unchecked)
        unchecked.clear()
        if bad:
            self._note(bad)
        [must_skip] = self.stop.maxima(bad is not None)
        if must_skip:
            self.skipped += 1
            what = f"batch {self.batch - 1} of epoch {self.epoch} is left out, its loss or gradients are not finite"
            if self.skipped > self.options.skip_nonfinite:
                raise Diverged(
                    f"{what}; that are more than --skip-nonfinite {self.options.skip_nonfinite}; {self._last_good()}"
                )
            _logger.warning(f"{what} ({self.skipped} of at most {self.options.skip_nonfinite})")
        return bool(must_skip)

    def _check_finite(self, unchecked: list[_Number]) -> None:
        """Stop if any of these is not finite; forget them otherwise."""
        bad = _first_nonfinite(unchecked)
        unchecked.clear()
        if not bad:
            return
        names = self._note(bad)
        images = f" (process {self.process.rank}: {', '.join(names[:3])}, ...; all in {NONFINITE})" if names else ""
        raise Diverged(
            f"{bad.name} is {bad.value.item()} at batch {bad.batch} of epoch {self.epoch}{images}; {self._last_good()}"
            ". A lower --lr, --clip-grad 1 or no --amp may help; --skip-nonfinite N leaves out up to N such updates"
        )

    def _note(self, bad: _Number) -> list[str]:
        """Write down which pictures the batch had, and return their names."""
        names = self.train_loader.names(self.epoch, bad.batch)
        title = f"epoch {self.epoch}, batch {bad.batch}, process {self.process.rank}: {bad.name} is {bad.value.item()}"
        with open(self.folder / NONFINITE, "a") as file:
            file.write("\n  ".join([title, *names]) + "\n")
        return names

    def _evaluate_epoch(self, train_loss: float) -> dict[str, float] | None:
        """The row of this epoch in the summary, or None if a signal came first."""
        models = {"eval_": self.eval_model}
        if self.average is not None:
            models["eval_ema_"] = self.average
        metrics = {}
        for prefix, model in models.items():
            desc = "evaluating average" if "ema" in prefix else "evaluating"
            values = evaluate(model, self.val_loader, self.options, self.process, desc=desc, stop=self.stop)
            if not values:
                return None
            metrics[prefix] = values
        row = {"epoch": self.epoch, "train_loss": train_loss}
        row |= {prefix + name: value for prefix, values in metrics.items() for name, value in values.items()}
        row["lr"] = self._lr()
        self.history.append(row)
        sign = -1 if self.options.eval_metric == "loss" else 1
        if self.best is None or sign * self._metric(row) > sign * self.best["value"]:
            self.best = {"epoch": self.epoch, "value": self._metric(row)}
        if self.scheduler:
            self.scheduler.step(self.epoch + 1, self._metric(row))
        return row

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _epoch_line(self, row: dict[str, float], pace: str, seconds: float) -> str:
        ema = f" (averaged {row['eval_ema_top1']:.2f})" if "eval_ema_top1" in row else ""
        left = (self.epochs - self.epoch - 1) * seconds
        return (
            f"epoch {self.epoch:{len(str(self.epochs))}}/{self.epochs}  loss {row['train_loss']:.4f}  "
            f"val loss {row['eval_loss']:.4f}  top-1 {row['eval_top1']:.2f}{ema}  top-5 {row['eval_top5']:.2f}  "
            f"lr {row['lr']:.1e}  {pace}  {seconds:.0f} s, {_duration(left)} left"
        )

    def _finish(self) -> None:
        """Evaluate the best checkpoint once more, in detail."""
        model, weights = self.eval_model, self.model
        if self.average is not None:
            model, weights = self.average, unwrap_model(self.average)
        if self.process.primary:
            best = self.folder / (BEST if (self.folder / BEST).exists() else LAST)
            weights.load_state_dict(extract_state_dict(read_checkpoint(best)))
        self.process.broadcast(weights)
        details = Details(len(self.class_names), self.val_loader.n_images, self.data_config)
        metrics = evaluate(model, self.val_loader, self.options, self.process, details, desc="evaluating the best")
        for loader in (self.train_loader, self.val_loader):
            log_unreadable(loader, self.process)
        if self.process.primary:
            assert self.best is not None  # of one epoch or more
            write_details(self.folder, details, self.class_names)
            _logger.info(
                f"best epoch {self.best['epoch']}: top-1 {metrics['top1']:.2f} % ({np.trace(details.confusion)} of "
                f"{details.confusion.sum()} images), top-5 {metrics['top5']:.2f} %, loss {metrics['loss']:.4f}\n"
                f"{self.folder}: best.pth, last.pth, summary.csv, args.yaml, curves.png, confusion_matrix.png, "
                "predictions.png, per_class.csv"
            )


class ExternalLogs:
    """TensorBoard and Weights & Biases, when asked for."""

    def __init__(self, options: Namespace, folder: Path):
        self.tensorboard = self.wandb = None
        try:
            if options.log_tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.tensorboard = SummaryWriter(str(folder / "tensorboard"))
            if options.log_wandb:
                import wandb

                self.wandb = wandb.init(
                    project=options.wandb_project, name=folder.name, config=stored_options(options), dir=str(folder)
                )
        except ImportError as error:
            raise RunError(f"a package is missing: pip install {error.name}") from error

    def write(self, row: dict[str, float]) -> None:
        if self.tensorboard:
            for name, value in row.items():
                self.tensorboard.add_scalar(name, value, row["epoch"])
        if self.wandb:
            self.wandb.log(row)

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
