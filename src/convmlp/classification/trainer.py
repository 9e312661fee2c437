"""A training run: the loop, and how it is saved and continued."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from timm.utils import dispatch_clip_grad, distribute_bn, unwrap_model
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..backbones import hold
from ..common.devices import autocast, resolve_amp_dtype
from ..common.errors import Diverged, RunError, Stopped, plural
from ..common.signals import StopRequest
from ..deploy import FullBatches
from ..weights import extract_state_dict, read_checkpoint
from . import charts
from .batches import seed_all
from .checkpoints import BEST, LAST, capture, write_checkpoint, write_last
from .evaluation import evaluate
from .finite import FiniteCheck, find_nonfinite
from .history import History
from .loaders import DataConfig, Loader
from .losses import share_of_hits
from .models import build_optimizer, build_schedule, build_task, first_stages
from .process import Process
from .progress import Clock, EpochProgress, ExternalLogs, epoch_line
from .settings import Options

_logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Trainer:
    """A training run: what changes during it, and how it is saved and continued."""

    options: Options
    process: Process
    folder: Path
    model: nn.Module
    train_loader: Loader
    val_loader: Loader
    class_names: list[str]
    data_config: DataConfig
    criterion: nn.Module
    metric: str  # what makes an epoch the best

    def __post_init__(self) -> None:
        options, process, model = self.options, self.process, self.model
        self.amp_dtype = resolve_amp_dtype(options.amp_dtype, process.device) if options.amp else None
        if options.amp and self.amp_dtype is None:
            _logger.info("this CPU has no native bfloat16: training in float32, as with --no-amp")
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=self.amp_dtype == torch.float16)
        self.average: nn.Module | None = None  # of the weights
        self.eval_model = model  # without DDP, whose forward would wait for the other processes
        self._prepare_task()
        self.optimizer = build_optimizer(options, model, process.device)
        self.updates_per_epoch = -(-len(self.train_loader) // options.grad_accum_steps)
        self.scheduler, self.epochs = build_schedule(options, self.metric, self.optimizer, self.updates_per_epoch)

        self.epoch = 0
        self.batch = 0  # batches of this epoch that are trained on
        self.updates, self.skipped = 0, 0  # the latter are left out for numbers that were not finite
        precise = torch.float32 if process.device.type == "mps" else torch.float64
        self.sums = torch.zeros(2, dtype=precise, device=process.device)  # of the loss and the share of hits a batch
        self.count = 0
        self.stop = StopRequest()
        self.finite = FiniteCheck(self.folder, self.train_loader, process.rank)
        self.saved_at = time.monotonic()
        self.history = History(self.metric, averaged=self.task.has_ema())

    def _prepare_task(self) -> None:
        """The model with its loss, its average, compiled and distributed as the options ask."""
        options, process, model = self.options, self.process, self.model
        if options.channels_last:
            model.to(memory_format=torch.channels_last)
        if options.sync_bn:
            if process.device.type != "cuda":
                raise RunError("--sync-bn needs GPUs")
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.frozen = first_stages(model, options.freeze)
        hold(self.frozen)
        self.task = build_task(options, model, self.criterion, self.class_names, process)
        if options.model_ema:
            self.average = self.task.setup_ema(decay=options.model_ema_decay, use_warmup=options.model_ema_warmup)
        if options.compile:
            self.eval_model = FullBatches(self.task.compile(dynamic=False), options.eval_batch_size)
        if process.distributed:
            self.task.prepare_distributed(
                device_ids=[process.device.index] if process.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                find_unused_parameters=options.find_unused_parameters,
            )

    def run(self, logs: ExternalLogs | None) -> None:
        """Train to the end. The primary process has the logs."""
        precision = "float32" if self.amp_dtype is None else str(self.amp_dtype).removeprefix("torch.")
        _logger.info(
            f"{self.options.model}, {plural(len(self.class_names), 'class')}, {self.train_loader.n_images} training "
            f"and {plural(self.val_loader.n_images, 'validation image')} of {self.data_config['input_size'][-1]} px\n"
            f"{self.process.world_size} x {self.process.device.type}, {precision}, {plural(self.epochs, 'epoch')} of "
            f"{plural(len(self.train_loader), 'batch')}, output in {self.folder}"
        )
        if logs and self.history.rows:
            charts.write_summary(self.folder / "summary.csv", self.history.rows)
        if self._end():
            _logger.info(f"the run is already complete: {self._end()}")
        try:
            with self.stop:
                while not self._end():
                    self._run_epoch(logs)
        finally:
            if logs:
                logs.close()

    def _run_epoch(self, logs: ExternalLogs | None) -> None:
        """Train and evaluate from where the run stands to the start of the next epoch."""
        start = time.perf_counter()
        figures, pace = self.train_epoch()
        row = self.evaluate_epoch(figures)
        if row is None:
            self._save_and_stop()
        self.save(evaluated=True)
        if logs:
            charts.write_summary(self.folder / "summary.csv", self.history.rows)
            charts.write_curves(self.folder / "curves.png", self.history.rows)
            logs.write(row)
            _logger.info(epoch_line(row, self.epochs, pace, time.perf_counter() - start))
            if collapse := self.history.collapse(self.options):
                _logger.warning(collapse)
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums.zero_()
        self.count = 0
        if self.epoch < self.epochs and self._end():
            _logger.info(f"stopping early: {self._end()}")

    def _end(self) -> str:
        """Why the run is at its end, or ''."""
        stale, patience = self.history.epochs_since_better(), self.options.early_stop
        if self.epoch >= self.epochs:
            return plural(self.epoch, "epoch")
        if patience and stale >= patience:
            return f"{plural(stale, 'epoch')} without a better {self.metric} (--early-stop {patience})"
        return ""

    def train_epoch(self) -> tuple[dict[str, float], str]:
        """The rest of this epoch; returns loss and accuracy of the whole epoch, and in words how fast it went."""
        options, process = self.options, self.process
        first, n_batches = self.batch, len(self.train_loader)
        check_interval = 1 if process.device.type == "cpu" else options.log_interval
        self.task.train()
        hold(self.frozen)
        self.optimizer.zero_grad()
        self.train_loader.start(self.epoch, first)
        clock = Clock(options.batch_size * process.world_size)
        batches = clock.watch(self.train_loader)
        with EpochProgress(self.epoch, first, n_batches, options.log_interval, process.primary) as progress:
            checked = first
            while self.batch < n_batches:
                loss = self.train_step(batches)
                if loss is None:
                    break
                # Here, between two updates, and nowhere else, the run can be looked at, saved or stopped
                stops_now = saves_now = False
                if self.batch < n_batches:
                    stops_now, saves_now = map(bool, self.stop.maxima(self.stop.number, self._save_is_due()))
                if stops_now or saves_now or self.batch == n_batches or self.batch - checked >= check_interval:
                    checked = self.batch
                    self._stop_if_not_finite()
                    left = clock.time_for((self.epochs - self.epoch) * n_batches - self.batch)
                    status = f"loss {loss.item():.3f}, lr {self._lr():.1e}, {clock.pace()}, {left} left"
                    progress.show(status, self.batch)
                if stops_now:
                    self._save_and_stop()
                if saves_now:
                    self.save(evaluated=False)
        if first < n_batches and process.distributed and options.dist_bn:
            distribute_bn(self.model, process.world_size, options.dist_bn == "reduce")
            if self.average is not None:
                distribute_bn(self.average, process.world_size)
        count = sum(process.gather(self.count)) or math.nan
        total_loss, hits = np.sum(process.gather(self.sums.tolist()), axis=0).tolist()
        figures = {"train_loss": total_loss / count, "train_top1": 100 * hits / count}
        if options.multi_label:
            del figures["train_top1"]
        return figures, clock.pace()

    def train_step(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
        """One update of the weights, from one batch or from --grad-accum-steps of them.

        Returns the last loss, or None where a stream ends before its time.
        """
        options, task = self.options, self.task
        size = min(options.grad_accum_steps, len(self.train_loader) - self.batch)
        statistics = [buffer.clone() for buffer in self.model.buffers()] if options.skip_nonfinite else []
        figures: list[torch.Tensor] = []
        for images, targets in islice(batches, size):
            if options.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            # Dropout and stochastic depth draw numbers; keyed by the step, they are the same after a resumption
            seed_all(options.seed, "step", self.epoch, self.batch, self.process.rank)
            # Processes average their gradients with the last batch of an update, and save the time before
            with nullcontext() if len(figures) == size - 1 else task.no_sync():
                with autocast(self.process.device, self.amp_dtype):
                    found = task(images, targets)
                    loss = found["loss"]
                # Gradients add up over batches; in float16 the small ones would be 0, so the loss is scaled up
                self.scaler.scale(loss / size).backward()
            figures.append(torch.stack([loss.detach(), share_of_hits(found["output"], targets)]))
            self.finite.add("the loss", self.batch, figures[-1][0])
            self.batch += 1
        if not figures:
            return None
        # Clipping bounds how far one odd batch can push the weights
        norm = self.clip_gradients()
        if not self.scaler.is_enabled():  # which itself leaves out an update that overflows
            self.finite.add("the norm of the gradients", self.batch - 1, norm)
        # With --skip-nonfinite a bad update leaves no trace, not even in the statistics of BatchNorm
        skips_now = options.skip_nonfinite > 0 and self._must_skip()
        if skips_now:
            for buffer, value in zip(self.model.buffers(), statistics, strict=True):
                buffer.copy_(value)
        else:
            self.scaler.step(self.optimizer)
            self.count += len(figures)
            for each in figures:
                self.sums += each
        self.scaler.update()
        self.optimizer.zero_grad()
        # The average follows the weights, and the schedule sets the learning rate of the next update
        self.updates += 1
        if not skips_now:
            task.update_ema(step=self.updates)
        if self.scheduler:
            self.scheduler.step_update(self.updates)
        return figures[-1][0]

    def clip_gradients(self) -> torch.Tensor:
        """Clip as the options ask; returns the norm of all gradients as it was before."""
        options = self.options
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([weight.grad for weight in self.task.parameters() if weight.grad is not None])
        if options.clip_grad is not None:
            parameters = self.task.get_clip_parameters(exclude_head=options.clip_mode == "agc")
            if options.clip_mode == "norm":
                clip_grads_with_norm_(parameters, options.clip_grad, norm)
            else:
                dispatch_clip_grad(parameters, options.clip_grad, mode=options.clip_mode)
        return norm

    def _must_skip(self) -> bool:
        """Whether this update is left out, because any process met a number in it that is not finite."""
        bad, allowed = self.finite.first_bad(), self.options.skip_nonfinite
        if bad:
            self.finite.describe(bad, self.epoch)
        n_batches = len(self.train_loader)
        [before_the_end] = self.stop.maxima(n_batches - bad.batch if bad else 0)
        if not before_the_end:
            return False
        self.skipped += 1
        what = f"batch {n_batches - before_the_end} of epoch {self.epoch}: its loss or gradients are not finite"
        if self.skipped > allowed:
            raise Diverged(f"{what}; that is more than --skip-nonfinite {allowed}; {self._last_good()}")
        _logger.warning(f"{what}; the update is left out ({self.skipped} of at most {allowed})")
        return True

    def _stop_if_not_finite(self) -> None:
        bad = self.finite.first_bad()
        if bad:
            raise Diverged(
                f"{self.finite.describe(bad, self.epoch)}; {self._last_good()}. A lower --lr, --clip-grad 1 or "
                "--no-amp may help; --skip-nonfinite N leaves out up to N such updates"
            )

    def evaluate_epoch(self, figures: dict[str, float]) -> dict[str, float] | None:
        """The row of this epoch in the summary, or None if a signal came first."""
        row: dict[str, float] = {"epoch": self.epoch, **figures}
        for prefix, model in {"eval_": self.eval_model, "eval_ema_": self.average}.items():
            if model is None:
                continue
            values = evaluate(model, self.val_loader, self.options, self.process, desc=prefix, stop=self.stop)
            if not values:
                return None
            row |= {prefix + name: value for name, value in values.items()}
        row["lr"] = self._lr()
        self.history.add(row)
        if self.scheduler:
            self.scheduler.step(self.epoch + 1, self.history.figure(row))
        return row

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def save(self, evaluated: bool) -> None:
        """Write last.pth, unless weights, averages or the optimizer's moments have become NaN or infinite."""
        state = capture(self, evaluated)
        for part in ("state_dict", "state_dict_ema", "optimizer"):
            name = find_nonfinite(state.get(part), part)
            if name:
                raise Diverged(f"{name} is not finite after update {self.updates}; {self._last_good()}")
        if self.process.primary:
            if evaluated and self.history.best_epoch == self.epoch:  # before last.pth, which speaks of it
                write_checkpoint(self.folder / BEST, {key: v for key, v in state.items() if key != "optimizer"})
            write_last(self.folder, state)
        self.saved_at = time.monotonic()

    def _save_is_due(self) -> bool:
        """Whether to save within the epoch, as far as this process knows."""
        options = self.options
        by_steps = options.checkpoint_interval and self.updates % options.checkpoint_interval == 0
        by_time = options.checkpoint_minutes and time.monotonic() - self.saved_at >= 60 * options.checkpoint_minutes
        return self.train_loader.resumable and bool(by_steps or by_time)

    def _save_and_stop(self) -> NoReturn:
        name = self.stop.agreed()
        if not self.train_loader.resumable:
            raise Stopped(f"{name}: streamed data resume at epochs only, so epoch {self.epoch} is lost")
        self.save(evaluated=False)
        raise Stopped(f"{name}: saved at batch {self.batch} of epoch {self.epoch}; --resume auto goes on from there")

    def _last_good(self) -> str:
        last = self.folder / LAST
        return f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"

    def load_best(self) -> nn.Module:
        """The model in evaluation mode, or its average, with the weights of the best epoch; all processes take part."""
        if self.process.primary:
            self.network.load_state_dict(extract_state_dict(read_checkpoint(self.best_checkpoint)))
        self.process.broadcast(self.network)
        return (self.eval_model if self.average is None else self.average).eval()

    @property
    def network(self) -> nn.Module:
        """The model as it is evaluated, neither compiled nor distributed, to look inside."""
        return self.model if self.average is None else unwrap_model(self.average)

    @property
    def best_checkpoint(self) -> Path:
        return self.folder / (BEST if (self.folder / BEST).exists() else LAST)
