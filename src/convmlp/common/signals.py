"""Signals to stop, from Ctrl-C, a scheduler or torchrun: a run then saves its state and ends."""

import os
import re
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from .errors import one_line

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class StopRequest:
    """A context in which SIGTERM, SIGINT and SIGUSR1 are requests to stop at the end of a step.

    A second SIGINT interrupts at once. Signals reach each process at a different moment, so the processes of a run
    agree on the last step. They use gloo on CPUs, which does not wait for a GPU.
    """

    def __init__(self) -> None:
        self.number = 0
        self._group: Any = None  # or a group, never NON_GROUP_MEMBER: no process is left out
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    def __enter__(self) -> "StopRequest":
        is_main = threading.current_thread() is threading.main_thread()  # Python allows no handlers elsewhere
        self._earlier = {number: signal.signal(number, self._note) for number in SIGNALS if is_main}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def agreed(self) -> str | None:
        """The name of a signal that any process received, or None. All processes must call this after the same step."""
        [number] = self.maxima(self.number)
        return signal.Signals(number).name if number else None

    def maxima(self, *numbers: int) -> list[int]:
        """The largest value of each number over all processes. All of them must call this after the same step."""
        if self._group is None:
            return list(numbers)
        largest = torch.tensor(numbers)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self._group)
        return largest.tolist()


def leave_signals_to_the_parent(worker: int = 0) -> None:
    """For processes that load data: they end when their parent says so.

    Schedulers and torchrun signal all processes of a job, and a step that lost its data could not be finished.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # it tells who sent the signal; macOS lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def lost_process(error: Exception) -> str | None:
    """The message if this error means that another process of the run has ended, else None."""
    text = one_line(error, 10_000)
    if not dist.is_initialized() or not re.search("gloo|NCCL|Connection|Broken pipe", text):
        return None
    reason = re.search("Connection [a-z]+ by peer|Broken pipe", text)
    return f"another process of the run has ended: {reason[0] if reason else text[:150]}"
