"""Speed of `convmlp predict` on a folder of photographs, beside what its parts can do alone.

    python tools/predict_speed.py [--images 1000] [--model convmlp_s]

The folder holds crops of scikit-image's and scikit-learn's photographs, JPEGs of 500x400 px. Reading alone, the
compiled model alone, and the command, as it is and with --exact, take turns. What the two limits leave is 1 /
(1/reading + 1/computing) on a CPU, whose cores do both, and the slower of them elsewhere. The command's seconds are
those beyond a call for one image, with a compiled form that an earlier call kept.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images
from torch import nn

from convmlp import deploy
from convmlp.common.command import Parser, positive_int, run
from convmlp.common.devices import resolve_amp_dtype
from convmlp.common.errors import RunError
from convmlp.use.classifier import Classifier, open_classifier
from convmlp.use.predict import BATCH_SIZE, predict_each

SIZE = (500, 400)
ROUNDS = 3


class Nothing(nn.Module):
    """The logits of a model that takes no time."""

    def __init__(self, n_classes: int):
        super().__init__()
        self.n_classes = n_classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), self.n_classes)


def write_photographs(folder: Path, count: int) -> None:
    photographs = [data.astronaut(), data.chelsea(), data.coffee(), *load_sample_images().images]
    random = np.random.default_rng(0)
    for number in range(count):
        photograph = Image.fromarray(photographs[number % len(photographs)])
        width = random.integers(200, photograph.width)
        height = min(width * SIZE[1] // SIZE[0], photograph.height)
        left, top = random.integers(photograph.width - width + 1), random.integers(photograph.height - height + 1)
        crop = photograph.crop((left, top, left + width, top + height)).resize(SIZE, Image.Resampling.BICUBIC)
        crop.save(folder / f"{number:06}.jpg", quality=90)


def call(model: str, *arguments: object) -> float:
    """Seconds of `convmlp predict` on these images."""
    command = [sys.executable, "-m", "convmlp", "predict", "--model", model, *map(str, arguments)]
    start = time.perf_counter()
    outcome = subprocess.run([*command, "--csv", "/dev/null"], capture_output=True, text=True)
    if outcome.returncode:
        raise RunError(outcome.stderr.strip())
    return time.perf_counter() - start


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Images a second, the median of some rounds in which all take turns."""
    classifier = open_classifier(options.model)
    paths = sorted(folder.iterdir())
    dtype = resolve_amp_dtype("auto", classifier.device) or torch.float32
    images = torch.randn(BATCH_SIZE, *classifier.data_config["input_size"], device=classifier.device)
    prepared = deploy.prepare(classifier.model, dtype=dtype, example_input=images)
    call(options.model, folder)  # which compiles
    works: dict[str, Callable[[], float]] = {
        "reading alone": lambda: len(paths) / seconds(lambda: read(paths, classifier)),
        f"{prepared.backend} in {dtype}, alone": lambda: BATCH_SIZE / seconds(lambda: prepared(images).cpu()),
        "convmlp predict": lambda: (len(paths) - 1) / (call(options.model, folder) - call(options.model, paths[0])),
        "convmlp predict --exact": lambda: (
            (len(paths) - 1) / (call(options.model, folder, "--exact") - call(options.model, paths[0], "--exact"))
        ),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            found[name].append(work())
    return {name: median(rates) for name, rates in found.items()}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read(paths: list[Path], classifier: Classifier) -> None:
    for _ in predict_each(paths, classifier, network=Nothing(len(classifier.class_names))):
        pass


def work(argv: list[str]) -> None:
    parser = Parser(prog="predict_speed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=positive_int, default=1000, metavar="N")
    parser.add_argument("--model", default="convmlp_s")
    options = parser.parse(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder, options.images)
        rates = measure(options, folder)
    reading, computing, fast, exact = rates.values()
    on_cpu = not torch.accelerator.is_available()
    limit = 1 / (1 / reading + 1 / computing) if on_cpu else min(reading, computing)
    for what, rate in rates.items():
        print(f"{what:32}{rate:8.1f} images/s")
    print(f"{'what the two limits leave':32}{limit:8.1f} images/s; convmlp predict reaches {fast / limit:.0%} of it")
    print(f"convmlp predict is {fast / exact:.2f} times as fast as with --exact")
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"peak memory of a call: {memory:.0f} MB")


if __name__ == "__main__":
    sys.exit(run("predict_speed.py", lambda: work(sys.argv[1:])))
