"""Training by epochs that can go on within an epoch, and loading of data that outlives a signal."""

import copy
import itertools
from collections.abc import Callable

from mmengine.dist import get_world_size
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader

from ..common.signals import leave_signals_to_the_parent


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
            self.batches_done = idx + 1  # before the step, whose hooks may write a checkpoint
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


def start_worker(start: Callable[[int], None] | None, worker: int) -> None:
    """Start a process that loads data; it goes on when a scheduler signals all processes of a job."""
    leave_signals_to_the_parent()
    if start:
        start(worker)
