"""A training run: the loop, and how it is saved and continued."""

import logging
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import NativeScaler, dispatch_clip_grad, distribute_bn
from torch import nn
from tqdm import tqdm

from .. import __version__
from ..devices import autocast, resolve_amp_dtype
from ..errors import RunError
from ..zoo import extract_state_dict, read_checkpoint
from . import report
from .checkpoints import BEST, LAST, write_checkpoint, write_last
from .evaluation import Details, evaluate, log_unreadable, write_details
from .loaders import Loader, StreamLoader, seed_all
from .models import create_optimizer, create_task
from .options import stored_options
from .process import Process

_logger = logging.getLogger(__name__)

MUST_AGREE_WITHIN_AN_EPOCH = ("batch_size", "grad_accum_steps", "seed", "dataset", "data_dir", "train_split")


class Diverged(Exception):
    """The loss or the weights are no longer finite."""


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
            _logger.info("this CPU has no native bfloat16: training in float32 in spite of --amp")
        self.scaler = NativeScaler(device=process.device.type) if self.amp_dtype == torch.float16 else None

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
        if options.model_ema:
            self.task.setup_ema(decay=options.model_ema_decay, use_warmup=options.model_ema_warmup)
        if options.compile:
            self.task.compile()
        self.eval_model = self.task.get_eval_model()  # before DDP, whose forward would wait for the other processes
        if process.distributed:
            device_ids = [process.device.index] if process.device.type == "cuda" else None
            self.task.prepare_distributed(device_ids=device_ids, gradient_as_bucket_view=True)

        self.epoch = 0
        self.batch = 0  # batches of this epoch that are trained on
        self.updates = 0
        precise = torch.float32 if process.device.type == "mps" else torch.float64
        self.loss_sum = torch.zeros((), dtype=precise, device=process.device)
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
            "loss_sums": self.process.gather(self.loss_sum.item()),
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
        if self.scaler:
            state[self.scaler.state_dict_key] = self.scaler.state_dict()
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
        if self.scaler and self.scaler.state_dict_key in state:
            self.scaler.load_state_dict(state[self.scaler.state_dict_key])
        self.updates = state["updates"]
        self.history = state["history"]
        self.best = state["best"]
        if state["evaluated"]:
            self.epoch, self.batch = state["epoch"] + 1, 0
            self.updates = self.epoch * self.updates_per_epoch  # which another batch size may have changed
        else:
            self.epoch, self.batch = state["epoch"], state["batch"]
            self.loss_sum.fill_(state["loss_sums"][self.process.rank])
        if self.scheduler:
            self.scheduler.step_update(self.updates)
            for row in self.history:  # plateau is a function of the metrics so far
                self.scheduler.step(int(row["epoch"]) + 1, self._metric(row))
        _logger.info(f"resuming from {path}: epoch {self.epoch}, batch {self.batch}")

    def save(self, evaluated: bool) -> None:
        """Write last.pth, unless weights or losses have become NaN or infinite."""
        for name, tensor in self.eval_model.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise Diverged(f"{name} is not finite after update {self.updates}; {self._last_good()}")
        state = self.state(evaluated)
        if self.process.primary:
            if evaluated and self.best and self.best["epoch"] == self.epoch:  # before last.pth, which speaks of it
                write_checkpoint(self.folder / BEST, {key: v for key, v in state.items() if key != "optimizer"})
            write_last(self.folder, state)

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
        while self.epoch < self.epochs:
            start = time.perf_counter()
            train_loss, rate = self.train_epoch()
            row = self._evaluate_epoch(train_loss)
            self.save(evaluated=True)
            if logs:
                report.write_summary(self.folder / "summary.csv", self.history)
                report.write_curves(self.folder / "curves.png", self.history)
                logs.write(row)
                _logger.info(self._epoch_line(row, rate, time.perf_counter() - start))
            self.epoch, self.batch = self.epoch + 1, 0
            self.loss_sum.zero_()
        if logs:
            logs.close()
        self._finish()

    def train_epoch(self) -> tuple[float, float]:
        """The rest of this epoch; returns the mean loss of the whole epoch and the images per second of all."""
        options, process, task = self.options, self.process, self.task
        n_batches, accumulate = len(self.train_loader), options.grad_accum_steps
        check_interval = 1 if process.device.type == "cpu" else options.log_interval
        batch_images = options.batch_size * process.world_size
        task.train()
        self.optimizer.zero_grad()
        self.train_loader.start(self.epoch, self.batch)
        unchecked: list[torch.Tensor] = []
        first, start = self.batch, time.perf_counter()
        bar = tqdm(
            total=n_batches,
            initial=first,
            desc=f"epoch {self.epoch}",
            disable=None if process.primary else True,
            leave=False,
            unit="batch",
        )
        for number, (images, targets) in enumerate(self.train_loader, first):
            in_update = min(accumulate, n_batches - number // accumulate * accumulate)
            updates_now = number % accumulate == in_update - 1
            if options.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            seed_all(options.seed, "step", self.epoch, number, process.rank)
            with nullcontext() if updates_now else task.no_sync():
                with autocast(process.device, self.amp_dtype):
                    loss = task(images, targets)["loss"]
                self._backward(loss / in_update, updates_now)
            self.loss_sum += loss.detach()
            self.batch = number + 1
            if updates_now:
                self.optimizer.zero_grad()
                self.updates += 1
                task.update_ema(step=self.updates)
                if self.scheduler:
                    self.scheduler.step_update(self.updates)
            unchecked.append(loss.detach())
            saves_now = bool(
                updates_now and options.checkpoint_interval and self.updates % options.checkpoint_interval == 0
            )
            if saves_now or self.batch == n_batches or self.batch % check_interval == 0:
                self._check_finite(torch.stack(unchecked), number)
                rate = (self.batch - first) * batch_images / (time.perf_counter() - start)
                status = f"loss {unchecked[-1].item():.3f}, lr {self._lr():.1e}, {rate:.0f} img/s"
                bar.set_postfix_str(status, refresh=False)
                if bar.disable and self.batch % options.log_interval == 0:
                    _logger.info(f"epoch {self.epoch} batch {self.batch}/{n_batches}: {status}")
                unchecked.clear()
            bar.update()
            if saves_now and self.batch < n_batches:
                self.save(evaluated=False)
        bar.close()
        rate = (self.batch - first) * batch_images / (time.perf_counter() - start)
        if process.distributed and options.dist_bn:
            distribute_bn(self.model, process.world_size, options.dist_bn == "reduce")
            if task.has_ema():
                distribute_bn(task.get_trainable_module(ema=True).module, process.world_size)
        return sum(process.gather(self.loss_sum.item())) / (n_batches * process.world_size), rate

    def _backward(self, loss: torch.Tensor, updates_now: bool) -> None:
        options = self.options
        parameters = self.task.get_clip_parameters(exclude_head=options.clip_mode == "agc")
        if self.scaler:
            self.scaler(
                loss,
                self.optimizer,
                clip_grad=options.clip_grad,
                clip_mode=options.clip_mode,
                parameters=parameters,
                need_update=updates_now,
            )
            return
        loss.backward()
        if updates_now:
            if options.clip_grad is not None:
                dispatch_clip_grad(parameters, options.clip_grad, mode=options.clip_mode)
            self.optimizer.step()

    def _check_finite(self, losses: torch.Tensor, number: int) -> None:
        finite = torch.isfinite(losses).tolist()
        if all(finite):
            return
        bad = number - len(finite) + 1 + finite.index(False)
        names = self.train_loader.names(self.epoch, bad)
        images = f" (process {self.process.rank}: {', '.join(names[:3])}, ...)" if names else ""
        raise Diverged(
            f"the loss is {losses[finite.index(False)].item()} at batch {bad} of epoch {self.epoch}{images}; "
            f"{self._last_good()}. A lower --lr, --clip-grad 1 or no --amp may help"
        )

    def _evaluate_epoch(self, train_loss: float) -> dict[str, float]:
        metrics = {"eval_": evaluate(self.eval_model, self.val_loader, self.options, self.process, desc="evaluating")}
        if self.task.has_ema():
            ema = self.task.get_eval_model(ema=True)
            metrics["eval_ema_"] = evaluate(ema, self.val_loader, self.options, self.process, desc="evaluating average")
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

    def _epoch_line(self, row: dict[str, float], rate: float, seconds: float) -> str:
        ema = f" (averaged {row['eval_ema_top1']:.2f})" if "eval_ema_top1" in row else ""
        left = (self.epochs - self.epoch - 1) * seconds
        return (
            f"epoch {self.epoch:{len(str(self.epochs))}}/{self.epochs}  loss {row['train_loss']:.4f}  "
            f"val loss {row['eval_loss']:.4f}  top-1 {row['eval_top1']:.2f}{ema}  top-5 {row['eval_top5']:.2f}  "
            f"lr {row['lr']:.1e}  {rate:.0f} img/s  {seconds:.0f} s, {_duration(left)} left"
        )

    def _finish(self) -> None:
        """Evaluate the best checkpoint once more, in detail."""
        model = self.task.get_eval_model(ema=True) if self.task.has_ema() else self.eval_model
        weights = self.task.get_trainable_module(ema=True).module if self.task.has_ema() else self.model
        if self.process.primary:
            best = self.folder / (BEST if (self.folder / BEST).exists() else LAST)
            weights.load_state_dict(extract_state_dict(read_checkpoint(best)))
        self.process.broadcast(weights)
        details = Details(len(self.class_names), self.val_loader.n_images, self.data_config)
        metrics = evaluate(model, self.val_loader, self.options, self.process, details, desc="evaluating the best")
        for loader in (self.train_loader, self.val_loader):
            log_unreadable(loader, self.process)
        if self.process.primary:
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
