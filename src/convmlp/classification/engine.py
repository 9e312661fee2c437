"""Training and evaluation of an image classifier, built from timm's parts."""

import logging
import os
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
import yaml
from timm.data import resolve_data_config
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationEvaluator, ClassificationTask, LogitDistillationTask, TrainingTask
from timm.utils import NativeScaler, dispatch_clip_grad, distribute_bn
from torch import nn
from tqdm import tqdm

from .. import __version__, timm_models  # noqa: F401  (registers our models with timm)
from ..model import ConvMLP
from ..zoo import (
    CheckpointError,
    adapt_state_dict,
    checkpoint_urls,
    download,
    extract_state_dict,
    load_pretrained,
    read_checkpoint,
)
from . import report
from .checkpoints import BEST, LAST, PREVIOUS, find_newest, read_training_checkpoint, write_checkpoint, write_last
from .data import Loader, StreamLoader, check_classes, create_mixup, make_loader, open_source, seed_all
from .options import RunError, parse_options, stored_options, suggest
from .process import Process, autocast, resolve_amp_dtype, start_process

_logger = logging.getLogger(__name__)

N_PICTURES = 40
MUST_AGREE_WITHIN_AN_EPOCH = ("batch_size", "grad_accum_steps", "seed", "dataset", "data_dir", "train_split")
FUSED_OPTIMIZERS = ("adam", "adamw", "sgd", "momentum", "nesterov")


class Diverged(Exception):
    """The loss or the weights are no longer finite."""


def main(argv: list[str] | None = None) -> int:
    """classification.py: exit code 0, 2 for a mistake in the call or the data, 1 for a run that failed."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("convmlp").setLevel(logging.INFO)
    try:
        options = parse_options(argv)
        if options.eval:
            checkpoint = read_checkpoint(options.eval)
            if isinstance(checkpoint, dict) and isinstance(checkpoint.get("args"), dict):
                options = parse_options(argv, base=checkpoint["args"])
        process = start_process(options.device)
        if not process.primary:
            logging.getLogger("convmlp").setLevel(logging.ERROR)
        if options.eval:
            evaluate_checkpoint(options, process)
        else:
            train(options, process)
        return 0
    except (RunError, CheckpointError) as error:
        _complain(f"error: {error}")
        return 2
    except Diverged as error:
        _complain(str(error))
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _complain(message: str) -> None:
    rank = int(os.environ.get("RANK", 0))
    if rank:  # an error of all processes is shown once: by the first, whose end ends the others in this time
        time.sleep(5)
        message = f"process {rank}: {message}"
    print(f"classification.py: {message}", file=sys.stderr)


def train(options: Namespace, process: Process) -> None:
    """Train as the options say, and leave the run in its folder.

    Raises:
        RunError, CheckpointError: a mistake in options, data or files, found before training wherever that is possible.
        Diverged: the loss or the weights are not finite; the last good checkpoint stays.
    """
    folder = run_folder(options)
    resumed = _find_resumable(options, folder)
    train_source, val_source = open_source(options, train=True), open_source(options, train=False)
    class_names = check_classes(train_source, val_source, options)
    options.num_classes = len(class_names)
    seed_all(options.seed, "initialisation")
    model = create_model(options, process).to(process.device)
    data_config = _data_config(options, model)
    trainer = Trainer(
        options,
        process,
        folder,
        model,
        make_loader(train_source, options, data_config, process, train=True),
        make_loader(val_source, options, data_config, process, train=False),
        class_names,
        data_config,
    )
    if resumed:
        trainer.load(*resumed)
    if process.primary:
        _claim_folder(folder, keep=bool(resumed))
        (folder / "args.yaml").write_text(yaml.safe_dump(stored_options(options), sort_keys=False))
    trainer.run()


def evaluate_checkpoint(options: Namespace, process: Process) -> None:
    """Evaluate the checkpoint of --eval on the validation images; print and write what came out."""
    source = open_source(options, train=False)
    class_names = check_classes(source, source, options)
    options.num_classes = len(class_names)
    model = create_model(Namespace(**{**vars(options), "pretrained": False, "initial_checkpoint": None}), process)
    load_weights(model, options.eval, options.use_ema, new_head=False)
    model = model.to(process.device)
    data_config = _data_config(options, model)
    loader = make_loader(source, options, data_config, process, train=False)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    details = Details(len(class_names), loader.n_images, data_config)
    metrics = evaluate(model, loader, options, process, details, desc="evaluating")
    folder = run_folder(options)
    if process.primary:
        _make_folder(folder)
        _log_unreadable(loader)
        write_details(folder, details, class_names)
        _logger.info(report.per_class_table(details.confusion, class_names))
        _logger.info(
            f"{options.eval}: top-1 {metrics['top1']:.2f} %  top-5 {metrics['top5']:.2f} %  loss {metrics['loss']:.4f}"
            f"  on {details.confusion.sum()} images\npictures and per_class.csv: {folder}"
        )


# --- model and weights -------------------------------------------------------------------------------------------


def create_model(options: Namespace, process: Process) -> nn.Module:
    """The model of the options with its starting weights."""
    if not timm.is_model(options.model):
        raise RunError(f"unknown --model {options.model}{suggest(options.model, timm.list_models())}")
    settings = {"drop_path_rate": options.drop_path, "global_pool": options.gp}
    try:
        model = timm.create_model(
            options.model,
            num_classes=options.num_classes,
            in_chans=options.in_chans,
            drop_rate=options.drop,
            **{key: value for key, value in settings.items() if value is not None},
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise RunError(f"--model {options.model}: {error}") from error
    if options.initial_checkpoint:
        load_weights(model, options.initial_checkpoint, options.use_ema, new_head=True)
    elif options.pretrained and isinstance(model, ConvMLP):
        urls = checkpoint_urls(options.model.split(".")[0].removesuffix("_classification"))
        if process.local_rank == 0:
            download(urls, progress=process.primary)
        process.barrier()
        load_pretrained(model, urls)
    elif options.pretrained:
        from timm.models import load_pretrained as load_timm_pretrained

        load_timm_pretrained(model, num_classes=options.num_classes, in_chans=options.in_chans)
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def load_weights(model: nn.Module, path: str, use_ema: bool, new_head: bool) -> None:
    """Load a checkpoint; a head of other classes starts afresh if `new_head`, else it is an error."""
    state_dict = extract_state_dict(read_checkpoint(path), use_ema, name=path)
    classifier = model.pretrained_cfg["classifier"]
    weight = state_dict.get(f"{classifier}.weight")
    if weight is not None and len(weight) != model.num_classes and not new_head:
        raise RunError(f"{path} has {len(weight)} classes, the data {model.num_classes}")
    if isinstance(model, ConvMLP):
        model.load_state_dict(adapt_state_dict(state_dict, model, name=path))
        return
    if weight is not None and len(weight) != model.num_classes:
        own = model.state_dict()
        state_dict |= {key: own[key] for key in own if key.startswith(f"{classifier}.")}
        _logger.warning(f"{path} has {len(weight)} classes, the data {model.num_classes}: the head starts afresh")
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model: {' '.join(str(error).split())[:400]}") from error


def _data_config(options: Namespace, model: nn.Module) -> dict[str, Any]:
    """Image size and normalisation, of the options or the model's; plain values."""
    config = resolve_data_config(vars(options), model=model)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": config["mean"], "std": config["std"]}  # for a teacher
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


# --- folders -----------------------------------------------------------------------------------------------------


def run_folder(options: Namespace) -> Path:
    """--output/--experiment; the experiment is by default the config's or the model's name."""
    name = options.experiment or (Path(options.config).stem if options.config else options.model)
    return Path(options.output) / (f"{name}-eval" if options.eval and not options.experiment else name)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"cannot write into the output folder {folder}: {error.strerror}") from error


def _find_resumable(options: Namespace, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue from, after making sure that no other run is overwritten unasked."""
    _make_folder(folder)
    if options.resume == "auto" and not options.overwrite:
        found = find_newest(folder)
        if found is None:
            _logger.info(f"nothing to resume in {folder}: a new run")
        return found
    source = Path(options.resume) if options.resume and options.resume != "auto" else None
    continues_there = source is not None and source.resolve().parent == folder.resolve()
    if (folder / LAST).exists() and not continues_there and not options.overwrite:
        raise RunError(
            f"{folder} holds a run; --resume auto continues it, --overwrite or --experiment NAME starts anew"
        )
    return (source, read_training_checkpoint(source)) if source else None


def _claim_folder(folder: Path, keep: bool) -> None:
    """Remove what an earlier run left, unless it is continued."""
    if not keep:
        for name in (LAST, PREVIOUS, BEST, "summary.csv"):
            (folder / name).unlink(missing_ok=True)


# --- evaluation --------------------------------------------------------------------------------------------------


class Details:
    """Beyond the figures: the confusion counts, and some pictures with their predictions, mistakes among them."""

    def __init__(self, num_classes: int, n_images: int, data_config: dict[str, Any]):
        self.confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
        self.pictures: list[report.Picture] = []
        self._data_config = data_config
        self._n_images = n_images
        self._seen = 0
        self._mistakes = 0

    def update(self, images: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        probabilities, predictions = (x.cpu() for x in logits.float().softmax(1).max(1))
        targets = targets.cpu()
        np.add.at(self.confusion, (targets.numpy(), predictions.numpy()), 1)
        for image, target, prediction, probability in zip(images, targets, predictions, probabilities, strict=True):
            mistake = bool(target != prediction) and self._mistakes < N_PICTURES // 2
            self._mistakes += mistake
            spread = self._seen * (N_PICTURES // 2) // self._n_images  # this many even parts of the images are seen
            if mistake or spread < (self._seen + 1) * (N_PICTURES // 2) // self._n_images:
                pixels = report.to_image(image, self._data_config["mean"], self._data_config["std"])
                self.pictures.append(report.Picture(pixels, int(target), int(prediction), float(probability)))
            self._seen += 1


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Loader | StreamLoader,
    options: Namespace,
    process: Process,
    details: Details | None = None,
    desc: str = "",
) -> dict[str, float]:
    """loss, top1 and top5 (in per cent) over the images of all processes, each counted once."""
    model.eval()
    evaluator = ClassificationEvaluator(device=process.device)
    amp_dtype = resolve_amp_dtype(options.amp_dtype, process.device) if options.amp else None
    hidden = None if process.primary else True
    for images, targets in tqdm(loader, desc=desc, disable=hidden, leave=False, unit="batch"):
        if options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(process.device, amp_dtype):
            logits = model(images)
        evaluator.update(logits, targets)
        if details:
            details.update(images, logits, targets)
    if details:
        details.confusion = sum(process.gather(details.confusion))
    return dict(evaluator.compute(distributed=process.distributed))


def write_details(folder: Path, details: Details, class_names: list[str]) -> None:
    """Confusion matrix, per-class accuracies and pictures of an evaluation."""
    report.write_confusion(folder / "confusion_matrix.png", details.confusion, class_names)
    report.write_per_class(folder / "per_class.csv", details.confusion, class_names)
    report.write_sheet(folder / "predictions.png", details.pictures, class_names)


def _log_unreadable(loader: Loader | StreamLoader) -> None:
    if loader.unreadable:
        shown = "\n  ".join(loader.unreadable[:10])
        _logger.warning(f"{len(loader.unreadable)} images could not be read and were skipped:\n  {shown}")


# --- training ----------------------------------------------------------------------------------------------------


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
        self.task = _create_task(options, model, process.device)
        self.optimizer = _create_optimizer(options, model, process.device)
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
            write_last(self.folder, state)
            if evaluated and self.best and self.best["epoch"] == self.epoch:
                write_checkpoint(self.folder / BEST, {key: v for key, v in state.items() if key != "optimizer"})

    def _last_good(self) -> str:
        last = self.folder / LAST
        return f"the last good checkpoint is {last}" if last.exists() else "no checkpoint was written yet"

    def _metric(self, row: dict[str, float]) -> float:
        """The figure that says how good an epoch was: of the averaged weights where they are kept."""
        prefix = "eval_ema_" if self.task.has_ema() else "eval_"
        return row[prefix + self.options.eval_metric]

    def run(self) -> None:
        """Train to the end, then show how the best checkpoint does."""
        n_train, n_val = len(self.train_loader.dataset), len(self.val_loader.dataset)
        precision = "float32" if self.amp_dtype is None else str(self.amp_dtype).removeprefix("torch.")
        _logger.info(
            f"{self.options.model}, {len(self.class_names)} classes, {n_train} training and {n_val} validation images "
            f"of {self.data_config['input_size'][-1]} px\n{self.process.world_size} x {self.process.device.type}, "
            f"{precision}, {self.epochs} epochs of {len(self.train_loader)} batches, output in {self.folder}"
        )
        logs = _ExternalLogs(self.options, self.folder) if self.process.primary else None
        if self.epoch >= self.epochs:
            _logger.info("the run is already complete")
        while self.epoch < self.epochs:
            start = time.perf_counter()
            train_loss, rate = self.train_epoch()
            row = self._evaluate_epoch(train_loss)
            self.save(evaluated=True)
            if self.process.primary:
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
            if saves_now or self.batch == n_batches or len(unchecked) >= check_interval:
                self._check_finite(torch.stack(unchecked), number)
                rate = (self.batch - first) * batch_images / (time.perf_counter() - start)
                status = f"loss {unchecked[-1].item():.3f}, lr {self._lr():.1e}, {rate:.0f} img/s"
                bar.set_postfix_str(status, refresh=False)
                if bar.disable and number and number % options.log_interval == 0:
                    _logger.info(f"epoch {self.epoch} batch {number}/{n_batches}: {status}")
                unchecked.clear()
            bar.update()
            if saves_now and self.batch < n_batches:
                self.save(evaluated=False)
        bar.close()
        _log_unreadable(self.train_loader)
        rate = (self.batch - first) * batch_images / (time.perf_counter() - start)
        if process.distributed and options.dist_bn:
            distribute_bn(self.model, process.world_size, options.dist_bn == "reduce")
        return sum(process.gather(self.loss_sum.item())) / (n_batches * process.world_size), rate

    def _backward(self, loss: torch.Tensor, updates_now: bool) -> None:
        options = self.options
        parameters = list(self.task.get_clip_parameters(exclude_head=options.clip_mode == "agc"))
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
        model = self.task.get_eval_model(ema=self.task.has_ema())
        weights = self.task.get_trainable_module(ema=True).module if self.task.has_ema() else self.model
        if self.process.primary:
            weights.load_state_dict(extract_state_dict(read_checkpoint(self.folder / BEST)))
        self.process.broadcast(weights)
        details = Details(len(self.class_names), self.val_loader.n_images, self.data_config)
        metrics = evaluate(model, self.val_loader, self.options, self.process, details, desc="evaluating the best")
        if self.process.primary:
            _log_unreadable(self.val_loader)
            write_details(self.folder, details, self.class_names)
            _logger.info(
                f"best epoch {self.best['epoch']}: top-1 {metrics['top1']:.2f} % ({np.trace(details.confusion)} of "
                f"{details.confusion.sum()} images), top-5 {metrics['top5']:.2f} %, loss {metrics['loss']:.4f}\n"
                f"{self.folder}: best.pth, last.pth, summary.csv, args.yaml, curves.png, confusion_matrix.png, "
                "predictions.png, per_class.csv"
            )


class _Float32Loss(nn.Module):
    """A loss of float32 logits: autocast on a CPU would compute it in bfloat16."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(logits.float(), targets)


def _create_task(options: Namespace, model: nn.Module, device: torch.device) -> TrainingTask:
    criterion = _Float32Loss(
        create_classification_loss(smoothing=options.smoothing, soft_targets=create_mixup(options) is not None)
    )
    if not options.kd_model:
        return ClassificationTask(model, criterion, device=device, verbose=False)
    if not timm.is_model(options.kd_model):
        raise RunError(f"unknown --kd-model {options.kd_model}{suggest(options.kd_model, timm.list_models())}")
    teacher = timm.create_model(
        options.kd_model,
        pretrained=not options.kd_checkpoint,
        num_classes=options.num_classes,
        in_chans=options.in_chans,
    )
    if options.kd_checkpoint:
        load_weights(teacher, options.kd_checkpoint, options.use_ema, new_head=False)
    return LogitDistillationTask(
        model,
        teacher.to(device),
        criterion,
        distill_loss_weight=options.kd_weight,
        temperature=options.kd_temperature,
        device=device,
        verbose=False,
    ).to(device)


def _create_optimizer(options: Namespace, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    fused = {"fused": True} if options.opt.lower() in FUSED_OPTIMIZERS and device.type in ("cuda", "cpu") else {}
    try:
        return create_optimizer_v2(model, **optimizer_kwargs(options), **fused)
    except (ValueError, AssertionError, TypeError) as error:
        raise RunError(f"--opt {options.opt}: {error}") from error


class _ExternalLogs:
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
