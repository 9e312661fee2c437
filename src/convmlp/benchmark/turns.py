"""Processes that are measured in turns: one computes, the others wait."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

PAUSE = 0.1  # seconds between turns, in which the threads of the last one stop spinning
PATIENCE = 10  # seconds in which a process may end by itself


class WorkerFailed(Exception):
    """A process could not do what it was asked for; the message says why, in a line."""


class Worker:
    """A process that runs `serve` of the module `worker`, and ends with this one.

    It has a session of its own: Ctrl-C in a terminal does not reach it, and what it started ends with it.
    """

    def __init__(self, command: Sequence[str], threads: int):
        """Start `python -m` with these words."""
        self._idle = False
        self._errors = tempfile.TemporaryFile()
        # modules are found where this process finds them, not beside whatever lies in the current folder
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        found_alike = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **found_alike, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout  # pipes were asked for
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """What the process answers.

        Raises:
            WorkerFailed: it failed, or is no more.
        """
        self._idle = False
        self._say(do, **details)
        return self.listen()

    def _say(self, do: str, **details: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps({"do": do, **details}).encode() + b"\n")
            self._requests.flush()

    def listen(self) -> dict[str, Any]:
        """The next answer; the first comes unasked, when all is imported."""
        line = self._answers.readline()
        if not line:
            raise WorkerFailed(self._epitaph())
        answer = json.loads(line)
        self._idle = True
        if "failed" in answer:
            raise WorkerFailed(answer["failed"])
        return answer

    def _epitaph(self) -> str:
        try:
            code = self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            return "its process no longer answers"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        if code == -signal.SIGKILL:
            return "its process was killed, perhaps for want of memory"
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
        return f"its process ended {how}{': ' if last else ''}{last[:200]}"

    def close(self) -> None:
        """End the process: in peace, so that it can clear away its files, or at once if it is at work."""
        if self._idle:
            self._say("quit")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for file in (self._requests, self._answers, self._errors):
            with contextlib.suppress(BrokenPipeError):
                file.close()


@dataclass
class Contestant:
    """Something measured in turns: what it said when it was ready, and the times of its calls in each turn, seconds."""

    title: str
    command: Sequence[str]
    spec: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    turns: list[list[float]] = field(default_factory=list)
    failed: str | None = None
    worker: Worker | None = None

    def start(self) -> None:
        self.worker = Worker(self.command, self.spec["threads"])

    def await_start(self) -> None:
        self._note(Worker.listen)

    def prepare(self) -> None:
        self._note(lambda worker: worker.ask("prepare", **self.spec))

    def take_turn(self, seconds: float) -> None:
        self._note(lambda worker: worker.ask("measure", seconds=seconds))

    def _note(self, ask: Callable[[Worker], dict[str, Any]]) -> None:
        if self.worker is None:  # since it failed
            return
        try:
            self.about |= ask(self.worker)
        except WorkerFailed as error:
            self.failed = str(error)
            self.close()
        else:
            if "seconds" in self.about:
                self.turns.append(self.about.pop("seconds"))

    def close(self) -> None:
        if self.worker:
            self.worker.close()
        self.worker = None


def prepare_all(contestants: Sequence[Contestant], tell: Callable[[str], None]) -> None:
    """Start the processes together, then let one after another get ready."""
    for contestant in contestants:
        contestant.start()
    for contestant in contestants:
        contestant.await_start()
    for contestant in contestants:
        tell(f"preparing {contestant.title}")
        contestant.prepare()
        time.sleep(PAUSE)


def take_turns(contestants: Sequence[Contestant], rounds: int, seconds: float, tell: Callable[[str], None]) -> None:
    """Measure in rounds; each second one goes backwards, so that nobody always follows the same one."""
    for number in range(rounds):
        for contestant in contestants[:: -1 if number % 2 else 1]:
            tell(f"round {number + 1} of {rounds}: {contestant.title}")
            if not contestant.failed:
                contestant.take_turn(seconds)
                time.sleep(PAUSE)
