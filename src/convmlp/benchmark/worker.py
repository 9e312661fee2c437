"""A process of the benchmark: python -m convmlp.benchmark.worker KIND. Requests and answers are lines of JSON.

When all is imported it says {}. {"do": "prepare", ...} builds what is to be measured, and is told what that is;
{"do": "measure", "seconds": s} is told the times of its calls, in seconds, and the peak of memory since it was built.
An answer may be {"failed": "reason"}. {"do": "quit"} ends the process, and so does the end of its input, at once.
"""

import gc
import json
import os
import queue
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from ..common.errors import RunError

MEGABYTE = 2**20


class Subject(Protocol):
    """Something to be measured; `about` says what it is, in plain values."""

    about: dict[str, Any]

    def measure(self, seconds: float) -> list[float]:
        """The time of each call, in seconds, after one that does not count."""
        ...

    def peak_memory(self) -> int | None:
        """Bytes on the device since it was built; None: it is the memory of the process that counts."""
        ...


Build = Callable[[dict[str, Any]], Subject]


class Calls:
    """A function that is called again and again, and timed by the clock."""

    def __init__(self, run: Callable[[], Any], about: dict[str, Any] | None = None):
        self.run = run
        self.about = about or {}
        for _ in range(2):  # what is made or measured at a first call
            run()

    def measure(self, seconds: float) -> list[float]:
        self.run()  # after a pause the caches are cold and the threads asleep
        times: list[float] = []
        start = now = time.perf_counter()
        while now < start + seconds or not times:
            before = time.perf_counter()
            self.run()
            now = time.perf_counter()
            times.append(now - before)
        return times

    def peak_memory(self) -> int | None:
        return None


def serve(build: Build) -> None:
    """Answer requests until one says to quit."""
    requests, reply = _take_pipes()
    subject: Subject | None = None
    reply({})
    for request in requests:
        do = request.pop("do")
        if do == "quit":
            subject = None  # which clears away its files
            gc.collect()
            os._exit(0)  # without two seconds of taking PyTorch apart
        try:
            if do == "prepare":
                started, before = time.perf_counter(), peak_memory()
                subject = build(request)
                seconds = time.perf_counter() - started
                answer = {**subject.about, "prepared_in_s": seconds, "before_mb": before / MEGABYTE}
                _forget_peak()
            else:
                assert subject is not None, "nothing was prepared"
                times = subject.measure(request["seconds"])
                on_device = subject.peak_memory()
                peak = peak_memory() if on_device is None else on_device
                answer = {"seconds": times, "peak_mb": peak / MEGABYTE}
        except Exception as error:  # of compilers, drivers and models, which raise anything
            kind = "" if isinstance(error, RunError) else type(error).__name__
            text = " ".join(str(error).split())[:250]
            answer = {"failed": ": ".join(filter(None, [kind, text]))}
        reply(answer)


def _take_pipes() -> tuple[Iterator[dict[str, Any]], Callable[[dict[str, Any]], None]]:
    """The requests, and what answers them. What libraries print goes elsewhere, and they have no input."""
    source, target = os.dup(0), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    waiting: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        rest = b""
        while chunk := os.read(source, 2**16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                waiting.put(json.loads(line))
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # with the compilers and loaders that were started here
        os._exit(1)

    def reply(answer: dict[str, Any]) -> None:
        target.write(json.dumps(answer).encode() + b"\n")
        target.flush()

    threading.Thread(target=read, daemon=True).start()
    return iter(waiting.get, None), reply


def peak_memory() -> int:
    """Bytes of main memory that this process had at most."""
    status = Path("/proc/self/status")  # getrusage would count the process that started this one, too
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.M) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _forget_peak() -> None:
    """What it took to get ready, such as to compile, is no part of what it takes to run."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not on this system, or not allowed: then the peak is of both
        pass


# Only the module of what is measured is imported, so that a runtime's memory holds no PyTorch
BUILDERS: Mapping[str, str] = {
    "matmul": ".networks:build_matmul",
    "inference": ".networks:build_inference",
    "training": ".networks:build_training",
    "onnx-file": ".networks:build_onnx_file",
    "onnxruntime": ".runtimes:build_onnxruntime",
    "openvino": ".runtimes:build_openvino",
}


if __name__ == "__main__":
    module, _, name = BUILDERS[sys.argv[1]].partition(":")
    serve(getattr(import_module(module, __package__), name))
