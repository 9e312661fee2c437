"""How fast models infer and train on this machine, and how fast images load for training.

    pip install '.[tools]'
    python tools/benchmark.py [MODEL ...] [--train] [--loading] [--json FILE] [--plot FILE]

Each variant of a model works in a process of its own, because the threads of some runtimes keep spinning after a call
and slow down whatever else their process does. The processes take turns, so that whatever else goes on in the machine
slows all of them alike. Ctrl-C and SIGTERM end the measuring; what was measured until then is written.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import speed_report
import torch
from peers import SIMILAR, published
from tqdm import tqdm
from workloads import BASE, Variant, loading_variants, peak_memory, prepare

from convmlp import deploy
from convmlp.common.command import Parser, positive_float, positive_int, run
from convmlp.common.devices import choose_device, count_cores, resolve_amp_dtype
from convmlp.common.errors import RunError, one_line, some
from convmlp.common.figures import check_format, save_figure
from convmlp.common.files import check_writable
from convmlp.common.output import say, show_table, write_result
from convmlp.common.packages import missing, need, pip_line
from convmlp.use.classifier import open_any

MODES = {  # each by itself in inference; in training each adds to the one before
    "inference": ("eager", "amp", "channels-last", "folded", "compiled", "prepared", "onnxruntime", "openvino"),
    "training": ("eager", "channels-last", "fused", "compiled"),
}
PACKAGES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
PAUSE = 0.1  # seconds between turns, in which the threads of the last one stop spinning
PATIENCE = 5  # seconds in which a process may end by itself and remove its files
ENDED = (EOFError, BrokenPipeError, ConnectionResetError)  # of a pipe whose other end is gone


def make_parser() -> Parser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="benchmark.py", description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="timm names or checkpoints; by default convmlp_s")
    add("--peers", action="store_true", help="also models of timm whose accuracy is similar")
    add("--train", action="store_true", help="training steps instead of inference")
    add("--loading", action="store_true", help="loading of training images, alone or beside --train")
    modes = dict.fromkeys([*MODES["inference"], *MODES["training"]])
    training = f"(all that this machine can run); with --train {', '.join(MODES['training'])}, each adds to the last"
    add("--modes", nargs="+", choices=modes, metavar="MODE", help=f"{', '.join(MODES['inference'])} {training}")
    dtypes = ("float32", "bfloat16", "float16")
    help_dtypes = f"{', '.join(dtypes)} (float32 and what the device has for mixed precision)"
    add("--dtypes", nargs="+", choices=dtypes, metavar="DTYPE", help=help_dtypes)
    batches = "images at once (1 8, on a GPU 1 128; with --train 16, on a GPU 128)"
    add("--batch-sizes", nargs="+", type=positive_int, metavar="N", help=batches)
    add("--img-size", type=positive_int, metavar="PX", help="side of the square the model sees (its own)")
    add("--device", default="auto", help="auto, cuda, mps, cpu, cuda:1, ...")
    add("--threads", type=positive_int, metavar="N", help="of the processor (PyTorch's choice)")
    add("--rounds", type=positive_int, default=5, metavar="N", help="turns that each variant takes (5)")
    add("--seconds", type=positive_float, default=1.0, metavar="S", help="length of a turn (1)")
    add("--data", metavar="DIR", help="images for --loading, CLASS/IMAGE; by default pieces of two photographs")
    add("--workers", type=positive_int, metavar="N", help="processes for --loading (the cores, up to 8)")
    add("--json", metavar="FILE", help="write all that was found as JSON; - is the screen")
    add("--plot", metavar="FILE", help="draw published accuracy against measured speed")
    add("--debug", action="store_true", help="show where an error comes from")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise what does not go together, or cannot be written."""
    of_loading, of_models = ("data", "workers"), ("modes", "dtypes", "batch_sizes", "threads", "peers", "plot")
    with_models = options.train or not options.loading
    for name in (() if options.loading else of_loading) + (() if with_models else of_models):
        if getattr(options, name):
            way = "is for --loading" if name in of_loading else "is for models: leave out --loading, or add --train"
            raise RunError(f"--{name.replace('_', '-')} {way}")
    if options.models and not with_models:
        raise RunError(f"--loading takes no model, got {options.models[0]}; with --train it does")
    if options.threads and options.threads > count_cores():
        raise RunError(f"--threads {options.threads} is more than this machine has: {count_cores()}")
    if options.img_size and options.img_size < 32:
        raise RunError(f"--img-size must be at least 32, got {options.img_size}")
    if options.data and not Path(options.data).is_dir():
        raise RunError(f"no such data folder: {options.data}")
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
    task, on_cpu = "training" if options.train else "inference", device.type == "cpu"
    for mode in options.modes or ():
        need(f"--modes {mode}", *PACKAGES.get(mode, ()))
    models = list(dict.fromkeys([*(options.models or ["convmlp_s"]), *(SIMILAR if options.peers else ())]))
    for model in models:
        open_any(model, pretrained=False, device="cpu", img_size=options.img_size)
    if options.plot and not any(published(model) for model in models):
        raise RunError(f"--plot: no published accuracy is known of {some(models)}; --peers adds models that have one")
    # Mixed precision is the usual way of 2021, on a GPU
    modes = options.modes or [mode for mode in MODES[task] if mode not in ({"amp"} if on_cpu else PACKAGES)]
    own = resolve_amp_dtype("auto", device)
    dtypes = options.dtypes or ["float32", *([str(own).removeprefix("torch.")] if own else [])]
    reasons = {pair: why_not(task, *pair, device) for pair in product(modes, dtypes)}
    left_out = [f"{mode} {dtype}: {reason}" for (mode, dtype), reason in reasons.items() if reason]
    if len(left_out) == len(reasons):
        raise RunError(f"nothing is left to compare: {'; '.join(left_out)}")
    fit = dict.fromkeys([BASE, *(pair for pair, reason in reasons.items() if not reason)])
    usual = {("inference", True): [1, 8], ("inference", False): [1, 128], ("training", True): [16]}
    common = {"device": str(device), "threads": options.threads or torch.get_num_threads()}
    products = [Variant("products", **common, dtype=dtype) for dtype in dict.fromkeys(dtype for _, dtype in fit)]
    groups = []
    for model, size in product(models, dict.fromkeys(options.batch_sizes or usual.get((task, on_cpu), [128]))):
        names = {**common, "model": model, "batch_size": size, "img_size": options.img_size}
        groups.append([*products, *(Variant(task, **names, mode=mode, dtype=dtype) for mode, dtype in fit)])
    return groups, left_out


def why_not(task: str, mode: str, dtype: str, device: torch.device) -> str:
    """Why a mode does not go together with a task, a number format or a device here, or ''."""
    if mode not in MODES[task]:
        return f"it is not for {task}"
    if mode in PACKAGES and device.type != "cpu":
        return f"it is measured on CPUs only, not on {device.type}"
    if absent := missing(*PACKAGES.get(mode, ())):
        return pip_line(*absent)
    if mode in PACKAGES and getattr(torch, dtype) not in deploy.DTYPES[mode]:
        return f"it does not compute in {dtype}"
    if mode == "amp" and dtype == "float32":
        return "mixed precision needs a type of 16 bits"
    if task == "training" and dtype == "float16" and device.type != "cuda":
        return "PyTorch scales gradients for it on CUDA only"
    return ""


@dataclass
class Worker:
    """The process of a variant, with what it has said: facts when it was ready, then seconds a call, for each turn."""

    variant: Variant
    facts: dict[str, Any] = field(default_factory=dict)
    turns: list[list[float]] = field(default_factory=list)
    process: Any = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
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
        except ENDED:
            self.process.join()
            code = self.process.exitcode
            killed = "was killed, perhaps because memory ran out" if code == -9 else f"ended with code {code}"
            answer = {"failed": f"its process {killed}"}
        self.turns += [answer.pop("times")] if "times" in answer else []
        self.facts |= answer


def serve(connection: Connection, variant: Variant) -> None:
    """Prepare the work when the other end of a pipe says so, then measure for as many seconds as each message says."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # which results and messages of the main process have for themselves
        os.dup2(nowhere, stream)
    try:
        connection.recv()
        started, before = time.perf_counter(), peak_memory("cpu")
        measure, facts = prepare(variant)
        connection.send({**facts, "before_mb": before, "prepared_in_s": time.perf_counter() - started})
        while True:
            times = measure(connection.recv())
            connection.send({"times": times, "peak_mb": peak_memory(variant.device)})
    except ENDED:
        pass
    except Exception as error:  # of compilers, drivers and models, which raise anything
        kind = "" if isinstance(error, RunError) else f"{type(error).__name__}: "
        connection.send({"failed": kind + one_line(error, 250)})


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
        started = [worker for worker in workers if worker.process]
        for worker in started:
            worker.connection.close()
        for worker in started:
            worker.process.join(PATIENCE)  # to remove its files; one that is at work is killed
            worker.process.kill()
            worker.process.join()


def measure(teams: Sequence[Sequence[Worker]], rounds: int, seconds: float) -> bool:
    """Let one team after the other take turns; whether it was interrupted."""
    steps = sum(len(team) for team in teams) * (1 + rounds)
    say(f"{steps} steps of {seconds:g} s, or more where something is prepared")
    with tqdm(total=steps, leave=False, disable=None, unit="step") as bar:

        def tell(what: str) -> None:
            bar.set_description_str(what)
            bar.update()

        try:
            for team in teams:
                take_turns(team, rounds, seconds, tell)
        except KeyboardInterrupt:
            return True
    return False


def work(argv: list[str]) -> None:
    options = make_parser().parse(argv)
    check(options)
    device = choose_device(options.device)
    groups, left_out = plan(options, device) if options.train or not options.loading else ([], [])
    was_busy = speed_report.is_busy()
    with tempfile.TemporaryDirectory() as temporary:
        if options.loading:
            groups = [loading_variants(str(device), options, Path(temporary)), *groups]
        teams = [[Worker(variant) for variant in group] for group in groups]
        interrupted = measure(teams, options.rounds, options.seconds)
    found = speed_report.describe(teams, ["benchmark.py", *argv], was_busy, interrupted, left_out)
    rows = found["loading"] + found["results"]
    if rows:
        write_result(options.json, lambda file: json.dump(found, file, indent=1))
    if rows and options.json != "-":
        show_table(speed_report.make_table(rows), whole=True)
        planned = sum(variant.task != "products" for group in groups for variant in group)
        print(*speed_report.notes(found, planned), sep="\n")
    if rows and options.plot:
        unknown = dict.fromkeys(row["model"] for row in found["results"] if row["top1"] is None)
        if unknown:
            say(f"not in the plot, because no published accuracy is known: {', '.join(unknown)}")
        save_figure(speed_report.speed_figure(found["results"], found["machine"]["name"]), Path(options.plot))
        say(f"drawn: {options.plot}")
    if interrupted:
        raise KeyboardInterrupt
    if all("failed" in row for row in rows):
        raise RunError(f"nothing could be measured: {rows[0]['failed']}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run("benchmark.py", lambda: work(sys.argv[1:]), debug="--debug" in sys.argv))
