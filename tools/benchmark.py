"""How fast models infer on this machine.

    pip install '.[tools]'
    python tools/benchmark.py [MODEL ...] [--modes MODE ...] [--json FILE] [--plot FILE]

Each variant of a model works in a process of its own, because the threads of some runtimes keep spinning after a call
and slow down whatever else their process does. The processes take turns, so that whatever else goes on in the machine
slows all of them alike. Ctrl-C and SIGTERM end the measuring; what was measured until then is written.
"""

import argparse
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import speed_report
import torch
import workloads
from peers import SIMILAR, published
from tqdm import tqdm
from workloads import BASE, DTYPES, MODES, Variant

from convmlp import deploy
from convmlp.common.command import Parser, positive_float, positive_int, run
from convmlp.common.devices import choose_device, count_cores, resolve_amp_dtype
from convmlp.common.errors import RunError, some
from convmlp.common.figures import check_format, save_figure
from convmlp.common.files import check_writable
from convmlp.common.output import say, show_table, write_result
from convmlp.common.packages import missing, need, pip_line
from convmlp.use.classifier import open_any

PAUSE = 0.1  # seconds between turns, in which the threads of the last one stop spinning
PATIENCE = 5  # seconds in which a process may end by itself and remove its files


def make_parser() -> Parser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="benchmark.py", description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="timm names or checkpoints; by default convmlp_s")
    add("--peers", action="store_true", help="also models of timm whose accuracy is similar")
    help_modes = f"{', '.join(MODES)} (all that this machine can run)"
    add("--modes", nargs="+", choices=MODES, metavar="MODE", help=help_modes)
    help_dtypes = f"{', '.join(DTYPES)} (float32 and what the device has for mixed precision)"
    add("--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help=help_dtypes)
    add("--batch-sizes", nargs="+", type=positive_int, metavar="N", help="images at once (1 8, on a GPU 1 128)")
    add("--img-size", type=positive_int, metavar="PX", help="side of the square the model sees (its own)")
    add("--device", default="auto", help="auto, cuda, mps, cpu, cuda:1, ...")
    add("--threads", type=positive_int, metavar="N", help="of the processor (PyTorch's choice)")
    add("--rounds", type=positive_int, default=5, metavar="N", help="turns that each variant takes (5)")
    add("--seconds", type=positive_float, default=1.0, metavar="S", help="length of a turn (1)")
    add("--json", metavar="FILE", help="write all that was found as JSON; - is the screen")
    add("--plot", metavar="FILE", help="draw published accuracy against measured speed")
    add("--debug", action="store_true", help="show where an error comes from")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise what this machine does not have, or what cannot be written."""
    if options.threads and options.threads > count_cores():
        raise RunError(f"--threads {options.threads} is more than this machine has: {count_cores()}")
    if options.img_size and options.img_size < 32:
        raise RunError(f"--img-size must be at least 32, got {options.img_size}")
    for mode in options.modes or ():
        need(f"--modes {mode}", *deploy.PACKAGES.get(mode, ()))
    if options.plot:
        options.plot = options.plot if Path(options.plot).suffix else f"{options.plot}.png"
        check_format(Path(options.plot))
    for file in (options.json, options.plot):
        if file and file != "-":
            check_writable(Path(file))


def plan(options: argparse.Namespace, device: torch.device) -> tuple[list[list[Variant]], list[str]]:
    """The variants of each model and batch size, eager float32 first, and what was left out and why.

    Raises:
        RunError: a name is not known, or this machine can run nothing of what was asked for.
    """
    models = list(dict.fromkeys([*(options.models or ["convmlp_s"]), *(SIMILAR if options.peers else ())]))
    for model in models:
        open_any(model, pretrained=False, device="cpu", img_size=options.img_size)
    if options.plot and not any(published(model) for model in models):
        raise RunError(f"--plot: no published accuracy is known of {some(models)}; --peers adds models that have one")
    own = resolve_amp_dtype("auto", device)
    dtypes = options.dtypes or ["float32", *(name for name, dtype in DTYPES.items() if dtype == own)]
    reasons = {pair: why_not(*pair, device) for pair in product(options.modes or MODES, dtypes)}
    left_out = [f"{mode} {dtype}: {reason}" for (mode, dtype), reason in reasons.items() if reason]
    if len(left_out) == len(reasons):
        raise RunError(f"nothing is left to compare: {'; '.join(left_out)}")
    pairs = dict.fromkeys([BASE, *(pair for pair, reason in reasons.items() if not reason)])
    common = {"device": str(device), "threads": options.threads or torch.get_num_threads()}
    products = [Variant(**common, dtype=dtype) for dtype in dict.fromkeys(dtype for _, dtype in pairs)]
    sizes = options.batch_sizes or [1, 8 if device.type == "cpu" else 128]
    groups = []
    for model, size in product(models, dict.fromkeys(sizes)):
        names = {**common, "model": model, "batch_size": size, "img_size": options.img_size}
        groups.append([*products, *(Variant(**names, mode=mode, dtype=dtype) for mode, dtype in pairs)])
    return groups, left_out


def why_not(mode: str, dtype: str, device: torch.device) -> str:
    """Why a mode does not go together with a number format or a device here, or ''."""
    if mode in deploy.PACKAGES and device.type != "cpu":
        return f"it is measured on CPUs only, not on {device.type}"
    if absent := missing(*deploy.PACKAGES.get(mode, ())):
        return pip_line(*absent)
    return "" if DTYPES[dtype] in deploy.DTYPES.get(mode, DTYPES.values()) else f"it does not compute in {dtype}"


@dataclass
class Worker:
    """The process of a variant, with what it has said: facts when it was ready, then seconds a call, for each turn."""

    variant: Variant
    facts: dict[str, Any] = field(default_factory=dict)
    turns: list[list[float]] = field(default_factory=list)
    pool: Any = None

    def start(self) -> None:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), workloads.be_quiet)
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which it inherits: this process ends it
        self.pool.submit(int)
        signal.signal(signal.SIGINT, handler)

    def ask(self, seconds: float | None) -> None:
        """Let it measure for so long, or, None, prepare; after it has failed, do nothing."""
        if "failed" in self.facts:
            return
        try:
            if seconds is None:
                self.facts = self.pool.submit(workloads.prepare, self.variant).result()
            else:
                times, self.facts["peak_mb"] = self.pool.submit(workloads.measure, seconds).result()
                self.turns.append(times)
        except BrokenProcessPool:
            self.facts["failed"] = "its process was killed, perhaps because memory ran out"
        except RunError as error:
            self.facts["failed"] = str(error)


def take_turns(workers: Sequence[Worker], rounds: int, seconds: float, bar: tqdm) -> None:
    """Measure in rounds; every second one goes backwards, so that nobody always follows the same one."""

    def ask(worker: Worker, seconds: float | None, what: str) -> None:
        bar.set_description_str(f"{what} {worker.variant}")
        bar.update()
        worker.ask(seconds)

    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            ask(worker, None, "preparing")
        for number in range(rounds):
            for worker in workers[:: -1 if number % 2 else 1]:
                time.sleep(PAUSE)
                ask(worker, seconds, f"round {number + 1} of {rounds}:")
    finally:
        for worker in workers:
            if worker.pool:
                worker.pool.shutdown(wait=False)
        for process in multiprocessing.active_children():
            process.join(PATIENCE)
            process.kill()  # one that is still at work


def work(argv: list[str]) -> None:
    options = make_parser().parse(argv)
    check(options)
    groups, left_out = plan(options, choose_device(options.device))
    was_busy = speed_report.is_busy()
    teams = [[Worker(variant) for variant in group] for group in groups]
    steps, interrupted = sum(map(len, teams)) * (1 + options.rounds), False
    say(f"{steps} steps of {options.seconds:g} s, or more where something is prepared")
    with tqdm(total=steps, leave=False, disable=None, unit="step") as bar:
        try:
            for team in teams:
                take_turns(team, options.rounds, options.seconds, bar)
        except KeyboardInterrupt:
            interrupted = True
    found = speed_report.describe(teams, ["benchmark.py", *argv], was_busy, interrupted, left_out)
    rows = found["results"]
    if rows:
        write_result(options.json, lambda file: json.dump(found, file, indent=1))
    if rows and options.json != "-":
        show_table(speed_report.make_table(rows), whole=True)
        print(*speed_report.notes(found), sep="\n")
    if rows and options.plot:
        unknown = dict.fromkeys(row["model"] for row in rows if row["top1"] is None)
        if unknown:
            say(f"not in the plot, because no published accuracy is known: {', '.join(unknown)}")
        save_figure(speed_report.speed_figure(rows, found["machine"]["name"]), Path(options.plot))
        say(f"drawn: {options.plot}")
    if interrupted:
        raise KeyboardInterrupt
    if all("failed" in row for row in rows):
        raise RunError(f"nothing could be measured: {rows[0]['failed']}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run("benchmark.py", lambda: work(sys.argv[1:]), debug="--debug" in sys.argv))
