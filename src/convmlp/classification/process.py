"""This process among those of the run, and the device it works on."""

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.utils import init_distributed_device

from ..common.devices import choose_device
from ..common.errors import RunError

MEETING_SECONDS = 5

Result = TypeVar("Result")


@dataclass(frozen=True)
class Process:
    """Where this process stands among the `world_size` processes of the run."""

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def primary(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.world_size > 1

    @contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """Let one process of each machine go first, such as for a download that the others then find."""
        if self.distributed and self.local_rank != 0:
            dist.barrier()
        yield
        if self.distributed and self.local_rank == 0:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in the order of their ranks."""
        if not self.distributed:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_primary(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on the primary process, or its RunError, on all of them.

        They meet every few seconds, so however long it takes, no collective operation times out.
        """
        if not self.distributed:
            return work()
        with ThreadPoolExecutor(1) as pool:
            futures = [pool.submit(work)] if self.primary else []
            while not self.gather(not wait(futures, MEETING_SECONDS).not_done)[0]:
                pass
            error = futures[0].exception() if futures else None
            result = futures[0].result() if futures and not error else None
        result, error = self.gather((result, error) if self.primary else None)[0]
        if error:
            raise error
        return result

    def broadcast(self, module: torch.nn.Module) -> None:
        """Give every process the primary's weights and statistics."""
        if self.distributed:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)


def start_process(device: str) -> Process:
    """Choose the device and join the other processes that torchrun or Slurm started (nccl on GPUs, else gloo).

    Only the primary process logs more than errors.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda" and int(os.environ.get("LOCAL_RANK", 0)) >= torch.cuda.device_count():
        raise RunError(f"more processes on this machine than its {torch.cuda.device_count()} GPUs")
    settings = SimpleNamespace(device=str(chosen))
    chosen = init_distributed_device(settings)
    if settings.rank:
        logging.getLogger("convmlp").setLevel(logging.ERROR)
    return Process(chosen, settings.rank, settings.local_rank, settings.world_size)
