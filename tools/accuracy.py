"""What models learn from scratch on Fashion-MNIST: ConvMLP-S beside peers of timm, or step by step from Pure-MLP.

    pip install '.[tools]'
    python tools/accuracy.py [CLOTHES] [--models NAME ...] [--images 10000] [--epochs 15] [--seeds 0 1 2]
    python tools/accuracy.py [CLOTHES] --ablation

Every model is trained by the same command, `convmlp train --recipe scratch` at 32 px, on the first training images; a
tenth of them chooses the epoch whose checkpoint is then tested on all 10 000 test images. CLOTHES is the folder of the
four files, by default that of Debian's package dataset-fashion-mnist. OUTPUT holds the runs, a table and a picture. A
call that was interrupted keeps the runs that were complete.
"""

import argparse
import csv
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
from clothes import PACKAGED, make_images
from matplotlib.axes import Axes
from peers import OTHERS, OURS, Point, label_points

import convmlp.timm_models  # noqa: F401
from convmlp.common.command import Parser, positive_int, run
from convmlp.common.errors import RunError
from convmlp.common.figures import new_figure, save_figure
from convmlp.common.files import write_atomically
from convmlp.use.info import grouped, measure

SIZE = 32  # px
N_CLASSES, N_TEST = 10, 10_000

PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ConvMLP-S": ("convmlp_s", {}),
    "Pure-MLP-S": ("pure_mlp_s", {}),
    "resnet18": ("resnet18", {}),
    "mobilenetv4_conv_small": ("mobilenetv4_conv_small", {}),
    "convnext_femto": ("convnext_femto", {}),
    "poolformer_s12": ("poolformer_s12", {}),
    "resmlp_12 at 48 px": ("resmlp_12_224", {"img_size": 48}),  # its patches of 16 px would be 4 at 32 px
}
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "Pure-MLP-S": ("pure_mlp_s", {}),
    "+ convolution stage": ("convmlp_s", {"conv_downsample": False, "spatial_connect": False}),
    "+ convolutional downsampling": ("convmlp_s", {"spatial_connect": False}),
    "+ depthwise convolution = ConvMLP-S": ("convmlp_s", {}),
}


class Result(NamedTuple):
    """A model: what it costs with ten classes, and for each seed its top-1 in per cent and its
    minutes of processor time in training.
    """

    name: str
    parameters: int
    macs: int
    top1: list[float]
    minutes: list[float]


def train(name: str, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """Train and test a model, unless that was done: its top-1 in per cent, and the processor minutes of training."""
    model, settings = options.entries[name]
    arguments = [f"{key}={value}" for key, value in settings.items() if key != "img_size"]
    experiment = "-".join([model, *arguments, f"seed{seed}"])
    folder, images = options.output / experiment, options.output / "images"
    record = folder / "minutes.json"
    if not record.exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = [images / "train", "--recipe", "scratch", "--val-share", 0.1, "--epochs", options.epochs]
        command += ["--output", options.output, "--experiment", experiment, "--seed", seed, "--model", model]
        command += ["--model-kwargs", *arguments] if arguments else []
        minutes = _call(*command, "--img-size", settings.get("img_size", SIZE))
        _call(images, "--eval", folder / "best.pth")
        record.write_text(json.dumps(minutes))
    with open(folder / "eval" / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    right, total = (sum(int(row[column]) for row in rows) for column in ("right", "images"))
    return 100 * right / total, json.loads(record.read_text())


def _call(*arguments: object) -> float:
    """Run `convmlp train`; its minutes of processor time, which other programs on the machine hardly change."""
    command = [sys.executable, "-m", "convmlp", "train", *map(str, arguments)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if subprocess.run(command).returncode:
        raise RunError(f"{' '.join(command)} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60


def compare(options: argparse.Namespace) -> list[Result]:
    """All models with all seeds, seed by seed, so that an interrupted call has something to compare."""
    for split, count in {"train": options.images, "val": N_TEST}.items():
        make_images(options.clothes, options.output / "images" / split, split, count)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in options.entries}
    for seed in options.seeds:
        for name, runs in found.items():
            runs.append(train(name, seed, options))
    results = []
    for name, runs in found.items():
        model, settings = options.entries[name]
        size = settings.get("img_size", SIZE)
        cost = measure(timm.create_model(model, num_classes=N_CLASSES, **settings), (3, size, size))
        top1, minutes = (list(values) for values in zip(*runs, strict=True))
        results.append(Result(name, cost.parameters, cost.macs, top1, minutes))
    return results


def table(results: Sequence[Result]) -> str:
    """The results as Markdown."""
    lines = ["| | parameters | MACs | top-1, mean | each seed | processor minutes |", "|---|--:|--:|--:|---|--:|"]
    for each in results:
        seeds = ", ".join(f"{value:.2f}" for value in each.top1)
        cost = f"{grouped(each.parameters)} | {each.macs / 1e6:.1f} M"
        lines.append(f"| {each.name} | {cost} | {np.mean(each.top1):.2f} | {seeds} | {np.mean(each.minutes):.1f} |")
    return "\n".join(lines) + "\n"


def draw(results: Sequence[Result], path: Path) -> None:
    """Accuracy, the mean of the seeds and their range, against processor time and against multiply-adds."""
    figure = new_figure(13, 4.6)
    left, right = figure.subplots(1, 2)
    _draw_panel(left, results, [float(np.mean(each.minutes)) for each in results], "processor minutes of training")
    _draw_panel(right, results, [each.macs / 1e6 for each in results], "million multiply-adds")
    save_figure(figure, path)


def _draw_panel(panel: Axes, results: Sequence[Result], costs: Sequence[float], title: str) -> None:
    points = []
    for each, cost in zip(results, costs, strict=True):
        is_ours, mean = each.name.endswith("ConvMLP-S"), float(np.mean(each.top1))
        colour = OURS if is_ours else OTHERS
        panel.plot([cost, cost], [min(each.top1), max(each.top1)], color=colour)
        panel.plot(cost, mean, "o", color=colour)
        points.append(Point(cost, mean, f"{each.name} ({mean:.1f})", is_ours))
    panel.set(xlabel=title, ylabel=f"top-1 on {N_TEST} test images, %")
    panel.margins(x=0.1, y=0.08)
    panel.set_xlim(left=0)
    panel.grid(alpha=0.3)
    label_points(panel, points)


def make_parser() -> Parser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="accuracy.py", description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("clothes", type=Path, nargs="?", default=PACKAGED, metavar="CLOTHES")
    add("--ablation", action="store_true", help="the steps from Pure-MLP-S to ConvMLP-S")
    add("--models", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help=f"of {', '.join(PEERS)}")
    add("--images", type=positive_int, default=10_000, metavar="N", help="to train on (10000)")
    add("--epochs", type=positive_int, default=15, metavar="N", help="of the schedule, after one of warm-up (15)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--output", type=Path, metavar="DIR", help="by default output/accuracy or output/ablation")
    add("--debug", action="store_true", help="show where an error comes from")
    return parser


def work(argv: list[str]) -> None:
    options = make_parser().parse(argv)
    title = "ablation" if options.ablation else "accuracy"
    options.entries = STEPS if options.ablation else {name: PEERS[name] for name in options.models}
    options.output = options.output or Path("output", title)
    results = compare(options)
    text = table(results)
    write_atomically(options.output / f"{title}.md", lambda path: path.write_text(text))
    draw(results, options.output / f"{title}.png")
    print(f"{text}\n{options.output}: {title}.md, {title}.png")


if __name__ == "__main__":
    sys.exit(run("accuracy.py", lambda: work(sys.argv[1:]), debug="--debug" in sys.argv))
