"""Being asked to stop, by Ctrl-C, by a scheduler or by torchrun: a run then saves where it stands, and ends."""

import os
import re
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from .errors import one_line

SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


class StopRequest:
    """As a context, takes SIGTERM, SIGINT and SIGUSR1 for requests to stop at the end of a step.

    A second SIGINT interrupts at once. Signals come to each process at its own moment, so the processes of a run agree
    on the step that is the last: by gloo on CPUs, which does not wait for what a GPU computes.
    """

    def __init__(self) -> None:
        self.number = 0
        self._group: Any = None  # or a group, never NON_GROUP_MEMBER: no process is left out
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no signals
            self._earlier = {number: signal.signal(number, self._note) for number in SIGNALS}
        else:
            self._earlier = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def agreed(self) -> str | None:
        """The name of the signal that any process was sent, or None. All processes call it after the same steps."""
        [number] = self.maxima(self.number)
        return signal.Signals(number).name if number else None

    def maxima(self, *numbers: int) -> list[int]:
        """The largest that any process gives for each of these numbers. All processes call it after the same steps."""
        if self._group is None:
            return list(numbers)
        largest = torch.tensor(numbers)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self._group)
        return largest.tolist()


def leave_signals_to_the_parent(worker: int = 0) -> None:
    """For processes that load data: they end when the process that they work for says so.

    Schedulers and torchrun signal all processes of a job, and a step that lost its data could not be finished.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which says who sent it; macOS lacks it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def lost_process(error: Exception) -> str | None:
    """What to say if this error means that another process of the run has ended, or None."""
    text = one_line(error, 10_000)
    if not dist.is_initialized() or not re.search("gloo|NCCL|Connection|Broken pipe", text):
        return None
    reason = re.search("Connection [a-z]+ by peer|Broken pipe", text)
    return f"another process of the run has ended: {reason[0] if reason else text[:150]}"
