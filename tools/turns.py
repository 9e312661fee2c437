"""Processes that are measured in turns: one computes, the others wait."""

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from workloads import Variant, prepare

from convmlp.common.errors import RunError, one_line

PAUSE = 0.1  # seconds between turns, in which the threads of the last one stop spinning
PATIENCE = 5  # seconds in which a process may end by itself and remove its files

PRELOADED = ["convmlp.classification.loaders", "convmlp.use.classifier", "matplotlib.figure", "sklearn.datasets"]


@dataclass
class Worker:
    """The process of a variant, with what it has said: facts when it was ready, then seconds a call, for each turn."""

    variant: Variant
    facts: dict[str, Any] = field(default_factory=dict)
    turns: list[list[float]] = field(default_factory=list)
    process: Any = None

    def start(self) -> None:
        # Forked from a process that has imported PyTorch once for all; but such a process can use no GPU
        method = "forkserver" if self.variant.device == "cpu" and os.name == "posix" else "spawn"
        context = multiprocessing.get_context(method)
        context.set_forkserver_preload(PRELOADED)
        self.connection, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self.variant))
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which it inherits: this process ends it
        process.start()
        signal.signal(signal.SIGINT, handler)
        self.process = process
        theirs.close()

    def ask(self, seconds: float | None) -> None:
        """Let it measure for so long, or, None, prepare; after it has failed, do nothing."""
        if "failed" in self.facts:
            return
        try:
            self.connection.send(seconds)
            answer = self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            killed = "was killed, perhaps because memory ran out" if code == -9 else f"ended with code {code}"
            answer = {"failed": f"its process {killed}"}
        self.turns += [answer.pop("times")] if "times" in answer else []
        self.facts |= answer

    def close(self) -> None:
        """Let the process end by itself, so that it can remove its files; one that is at work is killed."""
        if self.process:
            self.process.join(PATIENCE)
            self.process.kill()
            self.process.join()


def take_turns(workers: Sequence[Worker], rounds: int, seconds: float, tell: Callable[[str], None]) -> None:
    """Measure in rounds; every second one goes backwards, so that nobody always follows the same one."""
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            tell(f"preparing {worker.variant}")
            worker.ask(None)
        for number in range(rounds):
            for worker in workers[:: -1 if number % 2 else 1]:
                tell(f"round {number + 1} of {rounds}: {worker.variant}")
                time.sleep(PAUSE)
                worker.ask(seconds)
    finally:
        for worker in workers:
            if worker.process:
                worker.connection.close()
        for worker in workers:
            worker.close()


def serve(connection: Connection, variant: Variant) -> None:
    """Prepare the work when the other end of a pipe says so, then measure for as many seconds as each message says."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # which results and messages of the main process have for themselves
        os.dup2(nowhere, stream)
    try:
        connection.recv()
        started, before = time.perf_counter(), _peak_memory()
        measure, facts = prepare(variant)
        connection.send({**facts, "before_mb": before, "prepared_in_s": time.perf_counter() - started})
        while True:
            times = measure(connection.recv())
            connection.send({"times": times, "peak_mb": _peak_memory(variant.device)})
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the main process has ended
        pass
    except Exception as error:  # of compilers, drivers and models, which raise anything
        kind = "" if isinstance(error, RunError) else f"{type(error).__name__}: "
        connection.send({"failed": kind + one_line(error, 250)})


def _peak_memory(device: str = "cpu") -> float | None:
    """The most MiB that were allocated on a GPU since the work was ready, or that this process ever had."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # getrusage would count the process that started this one, too
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.M) if status.exists() else None
    return int(found[1]) / 2**10 if found else None
