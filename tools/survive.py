#!/usr/bin/env python
"""Kill a training run again and again, and see whether it ends like one that was left alone.

    python tools/survive.py [--kills 20] [--processes 2] [--seed 0]

Both runs train ConvMLP-S on scikit-learn's digits, with RandAugment, mixup, cutmix, random erasing, dropout, averaged
weights and loading processes. One is ended by SIGKILL, all its processes at once: at random times, while a checkpoint
is being written, and during validation; each time it is started again, with `--resume auto`. In the end its
checkpoints and summary.csv must be those of the undisturbed run, bit for bit. The exit code is 0 if they are.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
TRAINING = "--dataset sklearn-digits --img-size 32 --epochs 1 --warmup-epochs 1 --workers 2 --lr 1e-3 --clip-grad 1 "
TRAINING += (
    "--aa rand-m9-mstd0.5-inc1 --mixup 0.8 --cutmix 1 --reprob 0.5 --drop 0.1 --model-ema --model-ema-decay 0.9 "
)
TRAINING += "--checkpoint-interval 3 --log-interval 1 --resume auto"
TOTAL_BATCH = 64
MOMENTS = ("at any time", "in a save", "in validation")
KILLS_A_RUN = 5
LONGEST = 15.0  # seconds from a start to a kill at any time; starting alone takes about half of it
PATIENCE = 600.0  # a run that takes longer hangs


class Run:
    """A training run in its own processes."""

    def __init__(self, folder: Path, processes: int):
        self.folder = folder
        self.started = time.monotonic()
        command = [str(ROOT / "dist_classification.sh"), str(processes), *TRAINING.split()]
        command += ["--batch-size", str(TOTAL_BATCH // processes), "--output", str(folder.parent)]
        command += ["--find-unused-parameters"] if processes > 2 else []
        self.process = subprocess.Popen(
            [*command, "--experiment", folder.name],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def wait(self) -> None:
        """Until the run has ended by itself.

        Raises:
            SystemExit: it failed, or hangs.
        """
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            code = "none: it hangs"
        if code != 0:
            raise SystemExit(f"{self.folder} ended with code {code}:\n{''.join(self.lines[-20:])}")

    def kill(self) -> None:
        """SIGKILL to every process of the run; torchrun's are not in one process group."""
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        self.process.kill()
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(family, 30)
        self.process.wait()

    def kill_at(self, moment: str, rng: random.Random) -> bool:
        """Kill the run at such a moment; False if it ended before."""
        if moment == "at any time":
            end = rng.uniform(0, LONGEST)
            self._await(lambda: self.seconds > end)
        elif moment == "in a save":
            left = rng.randrange(1, 6)  # of the files that are written, this one
            seen: set[tuple[str, int]] = set()
            self._await(lambda: seen.update(self._being_written()) or len(seen) >= left)
        else:
            self._await(lambda: any("batch 22/22" in line for line in self.lines))
            time.sleep(rng.uniform(0, 0.5))
        if not self.running:
            return False
        self.kill()
        return True

    def _being_written(self) -> Iterator[tuple[str, int]]:
        for path in self.folder.glob(".*.part*"):
            try:
                yield path.name, path.stat().st_ino
            except FileNotFoundError:  # it has its name by now
                pass

    def _await(self, condition: Any) -> None:
        while self.running and not condition():
            time.sleep(0.001)
            if self.seconds > PATIENCE:
                raise SystemExit(f"{self.folder} hangs:\n{''.join(self.lines[-20:])}")


def read(path: Path) -> dict[str, Any]:
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["args"]["experiment"]
    return checkpoint


def largest_difference(ours: Any, theirs: Any) -> float:
    """Between the tensors of two checkpoints; infinite where anything else differs."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor) and ours.shape == theirs.shape:
        return (ours.double() - theirs.double()).abs().max().item() if ours.numel() else 0.0
    if isinstance(ours, dict) and isinstance(theirs, dict) and list(ours) == list(theirs):
        return max((largest_difference(ours[key], theirs[key]) for key in ours), default=0.0)
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        return max((largest_difference(*pair) for pair in zip(ours, theirs, strict=True)), default=0.0)
    return 0.0 if ours == theirs else float("inf")


def compare(ours: Path, theirs: Path) -> float:
    """The largest difference between what two runs left."""
    names = ("last.pth", "previous.pth", "best.pth")
    largest = max(largest_difference(read(ours / name), read(theirs / name)) for name in names)
    same = (ours / "summary.csv").read_bytes() == (theirs / "summary.csv").read_bytes()
    print(f"{ours.name}: tensors differ by at most {largest}, summary.csv is {'the same' if same else 'DIFFERENT'}")
    return largest if same else float("inf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, help="by gloo, with one total batch")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as work:
        undisturbed = Path(work, "undisturbed")
        Run(undisturbed, options.processes).wait()
        kills, runs, largest = 0, 0, 0.0
        while kills < options.kills:
            folder = Path(work, f"killed{runs}")
            for _ in range(min(KILLS_A_RUN, options.kills - kills)):
                moment = MOMENTS[kills % len(MOMENTS)]
                run = Run(folder, options.processes)
                if not run.kill_at(moment, rng):
                    run.wait()
                    break
                kills += 1
                doing = next((line.strip() for line in reversed(run.lines) if line.strip()), "starting")
                print(f"kill {kills}, {moment}, after {run.seconds:.1f} s: {doing[:90]}", flush=True)
            Run(folder, options.processes).wait()
            runs += 1
            largest = max(largest, compare(folder, undisturbed))
    print(f"{kills} kills survived of {kills}, in {runs} runs; largest difference {largest}")
    return 0 if largest == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
