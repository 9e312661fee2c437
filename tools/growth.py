"""How the cost of ConvMLP grows with the size of the image and of the batch: python tools/growth.py [--out FILE]

Runs tools/benchmark.py for each size, and draws docs/pictures/growth.png; arguments after -- go to the benchmark. It
takes ten minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convmlp.common.figures import new_figure, save_figure

ROOT = Path(__file__).resolve().parents[1]
MODEL = "convmlp_s"
SIDES = (96, 160, 224, 320, 448)
SIDES_BATCH = 8
BATCH_SIZES = (1, 2, 4, 8, 16)
BATCHES_SIDE = 224
MODES = ("eager", "channels-last")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/pictures/growth.png")
    parser.add_argument("more", nargs="*", help="options of benchmark.py, after --")
    options = parser.parse_args()
    by_side = [row for side in SIDES for row in measure(side, [SIDES_BATCH], options.more)]
    by_batch = measure(BATCHES_SIDE, BATCH_SIZES, options.more)

    figure = new_figure(11, 3.8)
    time, memory, speed = figure.subplots(1, 3)
    draw(time, by_side, lambda row: row["input_size"][-1], lambda row: row["ms_per_batch"] / row["batch_size"])
    time.set(title=f"batches of {SIDES_BATCH}", xlabel="side of the image, px", ylabel="ms per image")
    draw(memory, by_side, lambda row: row["input_size"][-1], lambda row: row["peak_mb"] - row["before_mb"])
    memory.set(title=f"batches of {SIDES_BATCH}", xlabel="side of the image, px", ylabel="peak memory, MB")
    draw(speed, by_batch, lambda row: row["batch_size"], lambda row: row["images_per_s"])
    speed.set(title=f"images of {BATCHES_SIDE} px", xlabel="images in a batch", ylabel="images per second")
    for axes in (time, memory, speed):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    speed.legend()
    save_figure(figure, options.out)
    print(options.out)


def measure(side: int, batch_sizes: Sequence[int], more: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of the benchmark for one size of images."""
    command = [sys.executable, str(ROOT / "tools/benchmark.py"), MODEL, "--img-size", str(side), "--modes", *MODES]
    command += ["--batch-sizes", *map(str, batch_sizes), "--json", "-", *more]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return [row for row in json.loads(run.stdout)["results"] if "images_per_s" in row]


def draw(axes: Any, rows: Sequence[dict[str, Any]], x: Any, y: Any) -> None:
    """A line for each mode and number format."""
    for kind in dict.fromkeys((row["mode"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["mode"], row["dtype"]) == kind]
        axes.plot([x(row) for row in own], [y(row) for row in own], marker="o", label=", ".join(kind))


if __name__ == "__main__":
    main()
