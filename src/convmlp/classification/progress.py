"""Progress of a run: how fast an epoch goes, and where its figures are shown."""

import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..common.packages import need
from .settings import Options

_logger = logging.getLogger(__name__)


FIRST_BATCHES = 10  # of a run
FIGURES = {"top1": "top-1", "top5": "top-5", "map": "mAP", "balanced_accuracy": "balanced", "macro_f1": "F1"}


class Clock:
    """How fast an epoch goes, and how much of its time this process waits for the next batch."""

    def __init__(self, batch_images: int):
        self.batch_images = batch_images
        self.n_batches = 0
        self.waited = 0.0
        self.start = time.perf_counter()

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, with a look at the clock before and after each is asked for."""
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

    def time_for(self, batches: int) -> str:
        """How long so many batches will take at the speed until now, as hours, minutes and seconds."""
        return tqdm.format_interval((time.perf_counter() - self.start) / self.n_batches * batches)


class EpochProgress:
    """As a context, a bar over the batches of an epoch, or lines in the log where there is no terminal."""

    def __init__(self, epoch: int, first: int, n_batches: int, log_interval: int, primary: bool):
        self.title = f"epoch {epoch}"
        self.is_first_epoch = epoch == 0
        self.n_batches = n_batches
        self.batch = first
        self.log_interval = log_interval
        hidden = None if primary else True
        self.bar = tqdm(total=n_batches, initial=first, desc=self.title, disable=hidden, leave=False, unit="batch")

    def __enter__(self) -> "EpochProgress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def show(self, status: str, batch: int) -> None:
        """Show how far the epoch is."""
        is_first = self.is_first_epoch and self.batch < FIRST_BATCHES <= batch  # tells how long the run will take
        if self.bar.disable and (is_first or batch // self.log_interval > self.batch // self.log_interval):
            _logger.info(f"{self.title} batch {batch}/{self.n_batches}: {status}")
        self.bar.set_postfix_str(status, refresh=False)
        self.bar.update(batch - self.batch)
        self.batch = batch


def epoch_line(row: dict[str, float], epochs: int, pace: str, seconds: float) -> str:
    """What the log says of an epoch that took so many seconds."""
    epoch = int(row["epoch"])
    figures = [f"{label} {row[f'eval_{key}']:.2f}" for key, label in FIGURES.items() if f"eval_{key}" in row]
    averaged = next((f" (averaged {row[f'eval_ema_{key}']:.2f})" for key in FIGURES if f"eval_ema_{key}" in row), "")
    figures[0] += averaged
    time_left = tqdm.format_interval((epochs - epoch - 1) * seconds)
    return (
        f"epoch {epoch:{len(str(epochs))}}/{epochs}  loss {row['train_loss']:.4f}  val loss {row['eval_loss']:.4f}  "
        f"{'  '.join(figures)}  lr {row['lr']:.1e}  {pace}  {seconds:.0f} s, {time_left} left"
    )


class ExternalLogs:
    """TensorBoard, Weights & Biases and MLflow, when asked for."""

    def __init__(self, options: Options, folder: Path):
        self.tensorboard = self.wandb = self.mlflow = None
        if options.log_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"))
        if options.log_wandb:
            import wandb

            settings = {"name": folder.name, "config": options.stored(), "dir": str(folder)}
            self.wandb = wandb.init(project=options.wandb_project, **settings)
        if options.log_mlflow:
            import mlflow

            self.mlflow = mlflow
            mlflow.start_run(run_name=folder.name)
            mlflow.log_params(options.stored())

    @staticmethod
    def check(options: Options) -> None:
        """Make sure that their packages are there, before long work."""
        if options.log_tensorboard:
            need("--log-tensorboard", "tensorboard")
        if options.log_wandb:
            need("--log-wandb", "wandb")
        if options.log_mlflow:
            need("--log-mlflow", "mlflow")

    def write(self, row: dict[str, float]) -> None:
        if self.tensorboard:
            for name, value in row.items():
                self.tensorboard.add_scalar(name, value, row["epoch"])
        if self.wandb:
            self.wandb.log(row)
        if self.mlflow:
            self.mlflow.log_metrics(row, step=int(row["epoch"]))

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()
        if self.mlflow:
            self.mlflow.end_run()
