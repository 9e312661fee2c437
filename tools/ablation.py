"""Take ConvMLP apart: train the four steps from Pure-MLP to ConvMLP-S on handwritten digits, side by side.

    pip install '.[tools]'
    python tools/ablation.py [--seeds 0 1 2] [--output output/ablation] [option of classification.py ...]

Each step adds one kind of convolution, in the order of the paper, and is trained with
configs/classification/quickstart.yml once per seed. OUTPUT/ablation.md and ablation.png compare the scores of the last
epochs; the runs are in OUTPUT/STEP_SEED. A call that was interrupted continues where it stopped.
"""

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
from matplotlib.ticker import MaxNLocator

import convmlp.timm_models  # noqa: F401
from convmlp.common.errors import RunError
from convmlp.common.figures import new_figure, save_figure
from convmlp.common.files import make_folder, write_atomically
from convmlp.use.info import grouped, measure

ROOT = Path(__file__).resolve().parents[1]
STEPS = {
    "Pure-MLP": dict(conv_stage=False, conv_downsample=False, spatial_connect=False),
    "+ convolution stage": dict(conv_stage=True, conv_downsample=False, spatial_connect=False),
    "+ convolutional downsampling": dict(conv_stage=True, conv_downsample=True, spatial_connect=False),
    "+ depthwise convolution = ConvMLP-S": dict(conv_stage=True, conv_downsample=True, spatial_connect=True),
}
INPUT_SIZE = (3, 224, 224)


class Result(NamedTuple):
    """A step: what it costs at 224 px with 1000 classes, and its top-1 in per cent for each seed."""

    name: str
    parameters: int
    macs: int
    top1: list[float]


def train(number: int, seed: int, output: Path, options: Sequence[str]) -> float:
    """Train a step with a seed, or continue, and return the top-1 of its last epoch."""
    name = f"step{number}_seed{seed}"
    switches = ",".join(f"{key}={value}" for key, value in list(STEPS.values())[number].items())
    config = ROOT / "configs" / "classification" / "quickstart.yml"
    command = [sys.executable, str(ROOT / "classification.py"), "-c", str(config), "--output", str(output)]
    command += ["--experiment", name, "--resume", "auto", "--seed", str(seed), "--model-kwargs", switches, *options]
    if subprocess.run(command).returncode:
        sys.exit(f"ablation.py: {name} failed")
    with open(output / name / "summary.csv", newline="") as file:
        return float(list(csv.DictReader(file))[-1]["eval_top1"])


def run(seeds: Sequence[int], output: Path, options: Sequence[str]) -> list[Result]:
    """All steps with all seeds, seed by seed, so that an interrupted call has something to compare."""
    top1: list[list[float]] = [[] for _ in STEPS]
    for seed in seeds:
        for number in range(len(STEPS)):
            top1[number].append(train(number, seed, output, options))
    results = []
    for (name, switches), values in zip(STEPS.items(), top1, strict=True):
        cost = measure(timm.create_model("convmlp_s", **switches), INPUT_SIZE)
        results.append(Result(name, cost.parameters, cost.macs, values))
    return results


def table(results: Sequence[Result]) -> str:
    """The results as Markdown."""
    lines = ["| | parameters | MACs | top-1, mean | each seed |", "|---|--:|--:|--:|---|"]
    for result in results:
        seeds = ", ".join(f"{value:.2f}" for value in result.top1)
        macs = f"{result.macs / 1e9:.3f} G"
        mean = f"{np.mean(result.top1):.2f}"
        lines.append(f"| {result.name} | {grouped(result.parameters)} | {macs} | {mean} | {seeds} |")
    return "\n".join(lines) + "\n"


def draw(results: Sequence[Result], path: Path) -> None:
    """A row for each step: a point for each seed, a line at their mean."""
    figure = new_figure(7, 2.4)
    axis = figure.subplots()
    positions = np.arange(len(results))[::-1]
    for position, result in zip(positions, results, strict=True):
        mean = np.mean(result.top1)
        axis.plot(result.top1, [position] * len(result.top1), "o", color="#7fb2d9", markersize=7)
        axis.plot([mean, mean], [position - 0.3, position + 0.3], color="#1b4f72", linewidth=2)
        axis.text(1.02, position, f"{mean:.2f}", transform=axis.get_yaxis_transform(), va="center")
    axis.set(yticks=positions, yticklabels=[result.name for result in results], ylim=(-0.6, len(results) - 0.4))
    axis.set_xlabel("top-1 on 360 held-out digits, %")
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("output/ablation"))
    options, others = parser.parse_known_args()
    if any(other.startswith(("--model", "-c", "--config", "--seed", "--experiment")) for other in others):
        parser.error("model, config, seed and experiment are what this program sets")
    try:
        make_folder(options.output)
    except RunError as error:
        parser.error(str(error))
    results = run(options.seeds, options.output, others)
    text = table(results)
    write_atomically(options.output / "ablation.md", lambda path: path.write_text(text))
    draw(results, options.output / "ablation.png")
    print(f"{text}\n{options.output}: ablation.md, ablation.png")


if __name__ == "__main__":
    main()
