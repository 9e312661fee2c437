"""How ConvMLP starts: signal and gradient at step 0, and what it learns with and without a warm-up.

    python tools/starts.py [--models convmlp_s ...] [--sizes 32 ...] [--seeds 0 1 2]
    python tools/starts.py CLOTHES [--models convmlp_s ...] [--sizes 32 ...] [--warmup 0 1] [--epochs 4] [--lr 1e-3]

The starts differ in the depthwise convolutions of the Conv-MLP blocks alone. The first call feeds noise to each, in
training mode. The second makes an image folder of the first 2000 and 500 images of Fashion-MNIST, and runs
classification.py on it from each start; if it was interrupted, it continues. CLOTHES is the folder of the four files,
/usr/share/datasets/fashion-mnist with Debian's package dataset-fashion-mnist. The table is printed, and is in OUTPUT.
"""

import argparse
import csv
import math
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
from clothes import make_images
from torch import nn

from convmlp import ConvMLP, zoo
from convmlp.layers import ConvMLPBlock

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 10
IMAGES = {"train": 2000, "val": 500}
OPTIONS = "--batch-size 64 --scale 0.7 1 --workers 0 --no-amp --resume auto".split()
STARTS = {  # from normal noise of the weight's shape, (dim, 1, 3, 3)
    "reference": lambda noise: noise * math.sqrt(2 / (9 * len(noise))),
    "per_group": lambda noise: noise * math.sqrt(2 / 9),
    "variance": lambda noise: noise * math.sqrt(1 / 9),
    "identity": lambda noise: noise * 0.02 + nn.init.dirac_(torch.empty_like(noise), groups=len(noise)),
}


def build(variant: str, start: str, seed: int) -> tuple[ConvMLP, list[ConvMLPBlock]]:
    """A model, which all starts give the same other weights, and its blocks."""
    torch.manual_seed(seed)
    model = getattr(zoo, variant)(num_classes=CLASSES)
    blocks = [module for module in model.modules() if isinstance(module, ConvMLPBlock)]
    for block in blocks:
        block.connect.weight.data = STARTS[start](torch.randn(block.connect.weight.shape))
    return model, blocks


def scales(variant: str, size: int, start: str, seed: int) -> list[list[float]]:
    """For each block: std of its output, norm of the gradient there, norm of that of `connect` over its own."""
    model, blocks = build(variant, start, seed)
    outputs: list[torch.Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    logits = model.train()(torch.randn(16, 3, size, size))
    weights = [block.connect.weight for block in blocks]
    loss = nn.functional.cross_entropy(logits, torch.arange(16) % CLASSES)
    norms = [gradient.norm().item() for gradient in torch.autograd.grad(loss, [*outputs, *weights])]
    relative = [norm / weight.norm().item() for norm, weight in zip(norms[len(blocks) :], weights, strict=True)]
    return [[output.std().item() for output in outputs], norms[: len(blocks)], relative]


def measure(options: argparse.Namespace) -> list[str]:
    """A row for each size and start: the range of each value, a mean over the seeds, over the blocks of all models."""
    rows = ["| px | start | std of the output | gradient there | relative gradient of connect |"]
    rows += ["|--:|---|---|---|---|"]
    for size, start in product(options.sizes, STARTS):
        means = [np.mean([scales(model, size, start, seed) for seed in options.seeds], 0) for model in options.models]
        values = np.concatenate(means, axis=1)
        rows.append(row(size, start, *(f"{min(blocks):.2g} to {max(blocks):.2g}" for blocks in values)))
    return rows


def train(variant: str, size: int, warmup: int, start: str, seed: int, options: argparse.Namespace) -> list[float]:
    """Top-1 in per cent after each epoch of a run."""
    name = f"{variant}_{size}px_warmup{warmup}_{start}_seed{seed}"
    weights = options.output / "start.pth"
    torch.save(build(variant, start, seed)[0].state_dict(), weights)
    command = [sys.executable, str(ROOT / "classification.py"), *OPTIONS, "--output", str(options.output)]
    command += ["--experiment", name, "--model", variant, "--initial-checkpoint", str(weights), "--seed", str(seed)]
    command += ["--img-size", str(size), "--warmup-epochs", str(warmup), "--epochs", str(options.epochs)]
    command += ["--lr", str(options.lr)]
    if subprocess.run([*command, str(options.output / "images")]).returncode:
        sys.exit(f"starts.py: {name} failed")
    with open(options.output / name / "summary.csv", newline="") as file:
        return [float(epoch["eval_top1"]) for epoch in csv.DictReader(file)]


def compare(options: argparse.Namespace) -> list[str]:
    """A row for each model, size, warm-up and start: top-1 after each epoch, mean over the seeds."""
    for split, count in IMAGES.items():
        make_images(options.clothes, options.output / "images" / split, split, count)
    rows = ["| model | px | warm-up | start | top-1 after each epoch, mean | last, each seed |"]
    rows += ["|---|--:|--:|---|---|---|"]
    for case in product(options.models, options.sizes, options.warmup, STARTS):
        runs = [train(*case, seed, options) for seed in options.seeds]
        means, last = np.mean(runs, axis=0), [run[-1] for run in runs]
        rows.append(row(*case, *(" ".join(f"{value:.1f}" for value in values) for values in (means, last))))
    return rows


def row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("clothes", type=Path, nargs="?", metavar="CLOTHES")
    parser.add_argument("--models", nargs="+", default=["convmlp_s"], choices=zoo.VARIANTS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--warmup", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("output/starts"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    table = "\n".join(compare(options) if options.clothes else measure(options)) + "\n"
    (options.output / ("train.md" if options.clothes else "scale.md")).write_text(table)
    print(table)


if __name__ == "__main__":
    main()
