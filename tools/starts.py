"""How ConvMLP starts: signal and gradient at step 0, and what is learnt with and without a warm-up.

    pip install '.[tools]'
    python tools/starts.py scale [--models convmlp_s ...] [--sizes 32 64 128] [--seeds 0 1 2]
    python tools/starts.py train FASHION_MNIST [--models convmlp_s] [--sizes 32] [--epochs 5] [--warmup 0 1] [--seeds ...]

The starts differ in the depthwise convolutions of the Conv-MLP blocks alone. `scale` feeds noise to each in training
mode. `train` makes an image folder of the first 2000 and 500 images of the clothes in FASHION_MNIST (the four gzipped
files; Debian's package dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist), and runs classification.py
on it from each start. OUTPUT/scale.md or train.csv and train.md hold the tables; training goes on where it stopped.
"""

import argparse
import csv
import gzip
import math
import subprocess
import sys
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import convmlp
from convmlp import ConvMLP
from convmlp.layers import ConvMLPBlock

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 10
IMAGES = {"train": ("train", 2000), "val": ("t10k", 500)}
STARTS = {
    "reference": lambda noise, dim: noise * math.sqrt(2 / (9 * dim)),
    "fan_out / groups": lambda noise, dim: noise * math.sqrt(2 / 9),
    "variance": lambda noise, dim: noise / 3,
    "identity": lambda noise, dim: nn.init.dirac_(torch.empty_like(noise), groups=dim) + 0.02 * noise,
}
OPTIONS = "--no-pretrained --batch-size 64 --lr 1e-3 --scale 0.7 1 --workers 0 --no-amp --checkpoint-minutes 0".split()


def build(variant: str, start: str, seed: int) -> ConvMLP:
    """A model whose other weights are the same from every start."""
    torch.manual_seed(seed)
    model = getattr(convmlp, variant)(num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, ConvMLPBlock):
            weight = module.connect.weight
            weight.data = STARTS[start](torch.randn(weight.shape), len(weight))
    return model


def scale(variant: str, size: int, start: str, seed: int) -> list[list[float]]:
    """For each block: std of its output, norm of the gradient there, and of `connect` over the norm of `connect`."""
    model = build(variant, start, seed).train()
    blocks = [module for module in model.modules() if isinstance(module, ConvMLPBlock)]
    outputs: list[torch.Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = model(torch.randn(16, 3, size, size))
    loss = nn.functional.cross_entropy(logits, torch.arange(16) % CLASSES)
    gradients = torch.autograd.grad(loss, [*outputs, *(block.connect.weight for block in blocks)])
    of_outputs, of_weights = gradients[: len(blocks)], gradients[len(blocks) :]
    relative = [float(g.norm() / block.connect.weight.norm()) for g, block in zip(of_weights, blocks, strict=True)]
    return [[float(x.std()) for x in outputs], [float(g.norm()) for g in of_outputs], relative]


def measure_scale(options: argparse.Namespace) -> str:
    """A line for each model, size and start: the first and the last block, means over the seeds."""
    lines = [
        "| model | px | start | std of a block's output, first to last | gradient there | of `connect`, relative |",
        "|---|--:|---|---|---|---|",
    ]
    for variant, size, start in product(options.models, options.sizes, STARTS):
        values = np.array([scale(variant, size, start, seed) for seed in options.seeds]).mean(0)
        spans = " | ".join(f"{row[0]:.2g} to {row[-1]:.2g}" for row in values)
        lines.append(f"| {variant} | {size} | {start} | {spans} |")
        print(lines[-1], *(" ".join(f"{x:.2g}" for x in row) for row in values), sep="\n    ", flush=True)
    return "\n".join(lines) + "\n"


def make_folder(source: Path, target: Path) -> Path:
    """The first images of each split as a folder of PNG files; target/train/CLASS/NUMBER.png."""
    for split, (prefix, count) in IMAGES.items():
        with gzip.open(source / f"{prefix}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(16 + count * 784), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(source / f"{prefix}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read(8 + count), np.uint8, offset=8)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = target / split / str(label) / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return target


def train(case: tuple[str, int, int, str, int], epochs: int, output: Path) -> list[float]:
    """Top-1 in per cent after each epoch of one run, which continues if it was interrupted."""
    variant, size, warmup, start, seed = case
    name = "_".join(str(part).replace(" / ", "_by_") for part in case)
    weights = output / "start.pth"
    torch.save(build(variant, start, seed).state_dict(), weights)
    command = [sys.executable, str(ROOT / "classification.py"), *OPTIONS, "--output", str(output), "--resume", "auto"]
    command += ["--experiment", name, "--model", variant, "--img-size", str(size), "--warmup-epochs", str(warmup)]
    command += ["--initial-checkpoint", str(weights), "--epochs", str(epochs), "--seed", str(seed)]
    if subprocess.run([*command, str(output / "images")]).returncode:
        sys.exit(f"starts.py: {name} failed")
    with open(output / name / "summary.csv", newline="") as file:
        return [float(row["eval_top1"]) for row in csv.DictReader(file)]


def measure_training(options: argparse.Namespace) -> str:
    """A line for each model, size, warm-up and start: top-1 after each epoch, mean over the seeds, and each at last."""
    make_folder(options.data, options.output / "images")
    results: dict[tuple[str, int, int, str], list[list[float]]] = defaultdict(list)
    for seed, *case in product(options.seeds, options.models, options.sizes, options.warmup, STARTS):
        results[tuple(case)].append(train((*case, seed), options.epochs, options.output))
    lines = [
        "| model | px | warm-up | start | top-1 after each epoch, mean | last, each seed |",
        "|---|--:|--:|---|---|---|",
    ]
    for case, runs in results.items():
        means = " ".join(f"{value:.1f}" for value in np.mean(runs, 0))
        last = ", ".join(f"{run[-1]:.1f}" for run in runs)
        lines.append(f"| {' | '.join(map(str, case))} | {means} | {last} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("what", choices=["scale", "train"])
    parser.add_argument("data", type=Path, nargs="?", metavar="FASHION_MNIST")
    parser.add_argument("--models", nargs="+", default=["convmlp_s"], choices=convmlp.zoo.VARIANTS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--warmup", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("output/starts"))
    options = parser.parse_args()
    if (options.what == "train") != (options.data is not None):
        parser.error("FASHION_MNIST goes with train")
    options.output.mkdir(parents=True, exist_ok=True)
    text = measure_scale(options) if options.what == "scale" else measure_training(options)
    (options.output / f"{options.what}.md").write_text(text)
    print(f"\n{text}\n{options.output / options.what}.md")


if __name__ == "__main__":
    main()
