"""What benchmark.py found: rows of numbers, a table with notes, and a figure of accuracy against speed."""

import datetime
import os
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from peers import IMG_SIZE, OTHERS, OURS, Point, label_points, published
from rich import box
from rich.markup import escape
from rich.table import Table
from workloads import BASE

from convmlp.common.devices import count_cores
from convmlp.common.figures import new_figure, plain
from convmlp.common.packages import missing
from convmlp.zoo import variant_of

if TYPE_CHECKING:
    from benchmark import Worker

COLUMNS = {
    **{"model": "model", "mode": "mode", "dtype": "dtype", "batch_size": "batch", "images_per_s": "images/s"},
    **{"spread": "spread", "ms_per_batch": "ms/batch", "ratio": "x base", "gflops": "GFLOP/s", "share": "share"},
    **{"peak_mb": "peak MB", "note": ""},
}
SLOW_TO_PREPARE = 10  # seconds that are worth a word
BUSY = 0.3  # of the cores, by programs that were there before
FAR_OFF = 0.1  # of the largest logit

Row = dict[str, Any]


def is_busy() -> bool:
    """Whether other programs were at work in the last minute."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * count_cores()


def describe(
    teams: "Sequence[Sequence[Worker]]", command: list[str], was_busy: bool, interrupted: bool, left_out: list[str]
) -> dict[str, Any]:
    """All that was found, in plain values; times in the unit of their name, memory in MiB."""
    variant, cpuinfo = teams[0][0].variant, Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    processor = name[1].strip() if name else platform.processor() or platform.machine()
    device = torch.cuda.get_device_name(variant.device) if variant.device.startswith("cuda") else processor
    packages = ("convmlp", "torch", "timm", "onnxruntime", "openvino")
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "name": f"{device}, {variant.threads} of {count_cores()} threads",
            "processor": processor,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "versions": {name: metadata.version(name) for name in packages if not missing(name)}
            | {"torch": str(torch.__version__)},  # with the build
            "was_busy": was_busy,
        },
        "interrupted": interrupted,
        "left_out": left_out,
        "planned": sum(bool(worker.variant.model) for team in teams for worker in team),
        "results": [row for team in teams for row in make_rows(team)],
    }


def make_rows(team: "Sequence[Worker]") -> list[Row]:
    """A row for each variant of a model that was measured or failed; of the matrix products the best call counts."""
    base = next((worker for worker in team if (worker.variant.mode, worker.variant.dtype) == BASE), None)
    products = [worker for worker in team if not worker.variant.model and worker.turns]
    best = {worker.variant.dtype: worker.facts["operations"] / min(map(min, worker.turns)) / 1e9 for worker in products}
    done = [worker for worker in team if worker.variant.model and (worker.turns or "failed" in worker.facts)]
    return [make_row(worker, base, best.get(worker.variant.dtype)) for worker in done]


def make_row(worker: "Worker", base: "Worker | None" = None, best: float | None = None) -> Row:
    """The numbers of a variant: medians of its calls, and its ratio to the base's time, taken round by round.

    `best` are the GFLOP/s of matrix products in its number format.
    """
    variant = worker.variant
    row: Row = {key: getattr(variant, key) for key in ("model", "mode", "dtype", "batch_size")}
    row["weights"], row["top1"] = published(variant.model) or (variant.model, None)
    row |= {key: base.facts[key] for key in ("input_size", "macs") if base and key in base.facts}
    row |= worker.facts
    if "failed" in row:
        return row
    calls = [seconds for turn in worker.turns for seconds in turn]
    middle = median(calls)
    if len(calls) > 1:
        low, _, high = quantiles(calls, method="inclusive")
        row["spread"] = (high - low) / middle
    row |= {"images_per_s": row["batch_size"] / middle, "ms_per_batch": 1000 * middle}
    row["turns_ms"] = [1000 * median(turn) for turn in worker.turns]
    if base and base.turns and "failed" not in base.facts:
        row["ratio"] = median(median(a) / median(b) for a, b in zip(base.turns, worker.turns, strict=False))
    if "macs" in row:
        row |= {"gflops": 2 * row["macs"] * row["batch_size"] / middle / 1e9, "gflops_of_products": best}
        row["share"] = row["gflops"] / best if best else None
    return row


def make_table(rows: Sequence[Row]) -> Table:
    """A line for each variant, with a rule between groups."""
    rows = [{**row, "note": _note(row)} for row in rows]
    table = Table(box=box.SIMPLE)
    for key, title in COLUMNS.items():
        if key == "note":
            table.add_column(title, overflow="fold", max_width=60, min_width=20)
        else:
            table.add_column(title, justify="left" if key in ("model", "mode", "dtype") else "right", no_wrap=True)
    for row, after in zip(rows, [*rows[1:], rows[-1]], strict=True):
        ends = (row["model"], row["batch_size"]) != (after["model"], after["batch_size"])
        table.add_row(*(_cell(key, row.get(key)) for key in COLUMNS), end_section=ends)
    return table


def _cell(key: str, value: Any) -> str:
    if key in ("spread", "share") and value is not None:
        return f"{value:.0%}"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
    return "" if value is None else escape(str(value))


def _note(row: Row) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    found = [row.get("backend", "")]
    if row.get("prepared_in_s", 0) > SLOW_TO_PREPARE:
        found.append(f"ready after {row['prepared_in_s']:.0f} s")
    if row.get("difference", 0) > FAR_OFF:
        found.append(f"logits differ by {row['difference']:.1g} of the largest")
    return ", ".join(filter(None, found))


def notes(found: dict[str, Any]) -> list[str]:
    """What one has to know to read the table."""
    results = found["results"]
    best: dict[str, float] = {}
    for row in results:
        best[row["dtype"]] = max(best.get(row["dtype"], 0), row.get("gflops_of_products") or 0)
    rates = ", ".join(f"{dtype} {rate:.0f}" for dtype, rate in best.items() if rate) or "not measured"
    lines = [
        f"{found['machine']['name']}; images of noise, random weights and BatchNorm statistics, but for checkpoints",
        "medians; spread: of the middle half of the times; x base: against eager float32, round by round; share: of "
        f"what matrix products reach here ({rates} GFLOP/s)",
        *(f"left out: {reason}" for reason in found["left_out"]),
    ]
    if found["machine"]["was_busy"]:
        lines.append("other programs were at work when this began: speeds are lower and vary more than they need to")
    if found["interrupted"]:
        done = f"{len(results)} of {found['planned']} variants were measured"
        lines.append(f"interrupted: {done}, the last ones in fewer rounds")
    return lines


def speed_figure(rows: Sequence[Row], title: str) -> Figure:
    """A line for each model whose accuracy is published, from eager float32 (open) to its fastest mode (filled).

    There is a panel for each batch size.
    """
    rows = [row for row in rows if row["top1"] is not None and "images_per_s" in row]
    sizes = sorted({row["batch_size"] for row in rows})
    figure = new_figure(9 * max(1, len(sizes)), 5.6)
    figure.suptitle(f"{plain(title)}\nopen: eager float32; filled: the fastest mode", fontsize=9)
    for number, size in enumerate(sizes, 1):
        own = [row for row in rows if row["batch_size"] == size]
        panel = figure.add_subplot(1, len(sizes), number)
        pixels = " or ".join(str(side) for side in sorted({row["input_size"][-1] for row in own}))
        panel.set_xlabel(f"images/s measured: batch {size}, {pixels} px")
        panel.set_ylabel(f"ImageNet-1k top-1, %, as published for {IMG_SIZE} px")
        _draw_panel(panel, own)
    return figure


def _draw_panel(panel: Axes, rows: Sequence[Row]) -> None:
    points = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["images_per_s"])
        best, eager = own[-1], [row for row in own if (row["mode"], row["dtype"]) == BASE]
        is_ours, top1 = variant_of(model) is not None, best["top1"]
        colour, speeds = OURS if is_ours else OTHERS, [row["images_per_s"] for row in (*eager, best)]
        panel.plot(speeds, [top1] * len(speeds), "-o", color=colour, markevery=[-1])
        panel.plot(speeds[: len(eager)], [top1] * len(eager), "o", color=colour, markerfacecolor="white")
        how = f" ({best['mode']} {best['dtype']})" if eager != [best] else ""
        points.append(Point(speeds[-1], top1, best["weights"] + how, is_ours))
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.1, y=0.08)
    panel.grid(alpha=0.3)
    label_points(panel, points)
