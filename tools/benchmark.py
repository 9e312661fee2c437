"""How fast models infer and train on this machine, and how fast images load for training.

    pip install '.[tools]'
    python tools/benchmark.py [MODEL ...] [--train] [--loading] [--json FILE] [--plot FILE]

Each variant of a model works in a process of its own, because the threads of some runtimes keep spinning after a call
and slow down whatever else their process does. The processes take turns, so that whatever else goes on in the machine
slows all of them alike. Ctrl-C and SIGTERM end the measuring; what was measured until then is written.
"""

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import speed_report as report
import timm
import torch
from peers import IMG_SIZE, SIMILAR, published
from PIL import Image
from sklearn.datasets import load_sample_images
from tqdm import tqdm
from turns import Worker, take_turns
from workloads import BASE, Variant

from convmlp import deploy
from convmlp.common.command import Parser, positive_float, positive_int, run
from convmlp.common.devices import choose_device, count_cores, resolve_amp_dtype
from convmlp.common.errors import RunError, some, suggest
from convmlp.common.figures import check_format, save_figure
from convmlp.common.files import check_writable
from convmlp.common.output import say, show_table, write_result
from convmlp.common.packages import missing, need, pip_line
from convmlp.timm_models import check_name
from convmlp.use.classifier import open_any

DTYPES = ("float32", "bfloat16", "float16")
MODES = {  # each by itself in inference; in training each adds to the one before
    "inference": ("eager", "amp", "channels-last", "folded", "compiled", "prepared", "onnxruntime", "openvino"),
    "training": ("eager", "channels-last", "fused", "compiled"),
}
PACKAGES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
N_SAMPLES, SAMPLE_SIZE = 64, (500, 400)  # the size of most images in ImageNet


def make_parser() -> Parser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="benchmark.py", description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="timm names or checkpoints; by default convmlp_s")
    add("--peers", action="store_true", help="also models of timm whose accuracy is similar")
    add("--train", action="store_true", help="training steps instead of inference")
    add("--loading", action="store_true", help="loading of training images, alone or beside --train")
    modes = f"{', '.join(MODES['inference'])}; with --train {', '.join(MODES['training'])}, each of which adds to the "
    modes += "one before; eager float32 is always there (all that this machine can run)"
    add("--modes", nargs="+", metavar="MODE", help=modes)
    add("--dtypes", nargs="+", metavar="DTYPE", help=f"{', '.join(DTYPES)} (all that the device has natively)")
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
    """Whether the options go together.

    Raises:
        RunError: they do not, or a file cannot be written.
    """
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
    check_known("--modes", options.modes or (), MODES[task])
    check_known("--dtypes", options.dtypes or (), DTYPES)
    for mode in options.modes or ():
        need(f"--modes {mode}", *PACKAGES.get(mode, ()))
    models = list(dict.fromkeys([*(options.models or ["convmlp_s"]), *(SIMILAR if options.peers else ())]))
    for model in models:
        if timm.is_model(model.partition(".")[0]) and not Path(model).exists():
            check_name("--model", model)
        else:
            open_any(model, pretrained=False, device="cpu", img_size=options.img_size)
    if options.plot and not any(published(model) for model in models):
        raise RunError(f"--plot: no published accuracy is known of {some(models)}; --peers adds models that have one")
    # Mixed precision is the usual way of 2021, on a GPU
    modes = options.modes or [mode for mode in MODES[task] if mode not in ({"amp"} if on_cpu else PACKAGES)]
    dtypes = options.dtypes or native_dtypes(device)
    pairs = {(mode, dtype): why_not(task, mode, dtype, device) for mode in modes for dtype in dtypes}
    left_out = [f"{mode} {dtype}: {reason}" for (mode, dtype), reason in pairs.items() if reason]
    if len(left_out) == len(pairs):
        raise RunError(f"nothing is left to compare: {'; '.join(left_out)}")
    fit = dict.fromkeys([BASE, *(pair for pair, reason in pairs.items() if not reason)])
    sizes = {("inference", True): (1, 8), ("inference", False): (1, 128), ("training", True): (16,)}
    threads = options.threads or torch.get_num_threads()
    common = {"device": str(device), "threads": threads, "img_size": options.img_size}
    products = [Variant("products", **common, dtype=dtype) for dtype in dict.fromkeys(dtype for _, dtype in fit)]
    groups = []
    for model, size in product(models, dict.fromkeys(options.batch_sizes or sizes.get((task, on_cpu), (128,)))):
        names = {"model": model, "batch_size": size}
        groups.append([*products, *(Variant(task, **common, **names, mode=mode, dtype=dtype) for mode, dtype in fit)])
    return groups, left_out


def check_known(option: str, names: Iterable[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise RunError(f"unknown {option} {name}{suggest(name, known) or f'; there are {some(known, 9)}'}")


def native_dtypes(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return [dtype for dtype in DTYPES if dtype != "bfloat16" or torch.cuda.is_bf16_supported()]
    return ["float32", *(["bfloat16"] if resolve_amp_dtype("auto", device) == torch.bfloat16 else [])]


def why_not(task: str, mode: str, dtype: str, device: torch.device) -> str:
    """Why a mode does not go together with a number format or a device here, or ''."""
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
    if dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return f"{torch.cuda.get_device_name(device)} does not have it"
    return ""


def loading_group(options: argparse.Namespace, device: torch.device, temporary: Path) -> list[Variant]:
    """Loading by the process itself, on one core, and by loading processes."""
    if not options.data:
        write_samples(temporary / "train" / "photographs")
    data, side = options.data or str(temporary), options.img_size or IMG_SIZE
    return [
        Variant("loading", str(device), 1, img_size=side, data=data, workers=workers)
        for workers in (0, options.workers)
    ]


def write_samples(folder: Path) -> None:
    """JPEG files as large as is usual in ImageNet, pieces of two photographs."""
    folder.mkdir(parents=True)
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = np.random.default_rng(0)
    for number in range(N_SAMPLES):
        photograph = photographs[number % len(photographs)]
        width, height = (side * rng.uniform(0.75, 1) for side in photograph.size)
        x, y = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
        piece = photograph.resize(SAMPLE_SIZE, Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
        piece.save(folder / f"{number:02}.jpg", quality=95)


def work(argv: list[str]) -> None:
    options = make_parser().parse(argv)
    check(options)
    device = choose_device(options.device)
    groups, left_out = plan(options, device) if options.train or not options.loading else ([], [])
    was_busy = report.is_busy()
    with tempfile.TemporaryDirectory() as temporary:
        if options.loading:
            groups = [loading_group(options, device, Path(temporary)), *groups]
        teams = [[Worker(variant) for variant in group] for group in groups]
        was_interrupted = measure(teams, options.rounds, options.seconds)
    found = report.Report(teams, left_out, was_busy, was_interrupted)
    if was_interrupted and not found.rows + found.loading:
        raise KeyboardInterrupt
    write_result(options.json, lambda file: json.dump(found.as_json(["benchmark.py", *argv]), file, indent=1))
    if options.json != "-":
        for table, notes in found.sections():
            show_table(table, whole=True)
            print(*notes, sep="\n")
    if options.plot:
        unknown = dict.fromkeys(row["model"] for row in found.rows if row["top1"] is None)
        if unknown:
            say(f"not in the plot, because no published accuracy is known: {', '.join(unknown)}")
        save_figure(report.speed_figure(found.rows, found.machine), Path(options.plot))
        say(f"drawn: {options.plot}")
    if was_interrupted:
        raise KeyboardInterrupt
    failed = [row["failed"] for row in found.rows + found.loading if "failed" in row]
    if len(failed) == len(found.rows + found.loading):
        raise RunError(f"nothing could be measured: {failed[0]}")


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


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run("benchmark.py", lambda: work(sys.argv[1:]), debug="--debug" in sys.argv))
