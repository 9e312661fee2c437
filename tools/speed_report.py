"""What benchmark.py found: rows of numbers, tables with notes, JSON, and a figure of accuracy against speed."""

import datetime
import os
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from peers import IMG_SIZE, OTHERS, OURS, Point, label_points, published
from rich import box
from rich.markup import escape
from rich.table import Table
from turns import Worker
from workloads import BASE

from convmlp import __version__
from convmlp.common.devices import count_cores
from convmlp.common.errors import plural
from convmlp.common.figures import new_figure, plain
from convmlp.zoo import variant_of

COLUMNS = ["model", "mode", "dtype", "batch", "images/s", "spread", "ms/batch", "x base", "GFLOP/s", "share", "peak MB"]
SLOW_TO_PREPARE = 10  # seconds that are worth a word
BUSY = 0.3  # of the cores, by programs that were there before
FAR_OFF = 0.1  # of the largest logit
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

Row = dict[str, Any]


class Report:
    """The rows of all teams of workers, and what one has to know to read them."""

    def __init__(self, teams: Sequence[Sequence[Worker]], left_out: list[str], was_busy: bool, was_interrupted: bool):
        self.left_out, self.was_busy, self.was_interrupted = left_out, was_busy, was_interrupted
        self.workers = [worker for team in teams for worker in team]
        found = [make_rows(team) for team in teams]
        self.rows = [row for rows, _ in found for row in rows if row["task"] != "loading"]
        self.loading = [row for rows, _ in found for row in rows if row["task"] == "loading"]
        rates = [rate for _, rates in found for rate in rates]
        best = {rate["dtype"]: rate for rate in sorted(rates, key=lambda rate: rate.get("gflops", 0))}
        self.rates = list(best.values())

    @property
    def machine(self) -> str:
        variant = self.workers[-1].variant
        device = torch.device(variant.device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        return f"{name}, {variant.threads} of {count_cores()} threads"

    def sections(self) -> list[tuple[Table, list[str]]]:
        """Tables, each with its notes."""
        found = []
        if self.loading:
            first = self.loading[0]
            notes = []
            if "images" in first:
                notes = [
                    f"the ImageNet recipe's augmentation, {first['img_size']} px, {first['images']} different images"
                ]
            found.append((loading_table(self.loading), notes))
        if self.rows:
            found.append((make_table(self.rows), self._notes()))
        notes = found[-1][1]
        if self.was_busy:
            notes.append(
                "other programs were at work when this began: speeds are lower and vary more than they need to"
            )
        if self.was_interrupted:
            done = len(self.rows) + len(self.loading)
            planned = sum(worker.variant.task != "products" for worker in self.workers)
            notes.append(f"interrupted: {done} of {planned} variants were measured, the last ones in fewer rounds")
        return found

    def _notes(self) -> list[str]:
        speeds = [f"{rate['dtype']} {number(rate['gflops'])}" for rate in self.rates if "gflops" in rate]
        before = [row["before_mb"] for row in self.rows if "before_mb" in row]
        memory = "allocated on the GPU"
        if before and not self.workers[-1].variant.device.startswith("cuda"):
            memory = f"the most that the process ever had, preparation included; without a model {max(before):.0f} MB"
        training = any(row["task"] == "training" for row in self.rows)
        step = "; a step: loss, gradients, AdamW, average of the weights" if training else ""
        notes = [
            f"{self.machine}; images of noise; random weights and BatchNorm statistics, but for checkpoints{step}",
            "images/s, ms/batch: medians; spread: of the middle half of the times; x base: against eager float32, "
            "round by round",
            f"share: of what matrix products reach here, {', '.join(speeds) or 'which failed'} GFLOP/s; "
            "convolutions may be faster",
            f"peak MB: {memory}",
            *(f"left out: {reason}" for reason in self.left_out),
        ]
        fastest = max(self.rows, key=lambda row: row.get("images_per_s", 0))
        if training and self.loading and "images_per_s" in self.loading[0] and "images_per_s" in fastest:
            core, model = self.loading[0]["images_per_s"], fastest["images_per_s"]
            name = f"{fastest['model']} {fastest['mode']} {fastest['dtype']}, batch {fastest['batch_size']}"
            notes.append(
                f"a core loads {number(core)} images/s: to keep up with {name}, {number(model)} images/s, takes "
                f"{model / core:.2g} cores"
            )
        return notes

    def as_json(self, command: Sequence[str]) -> dict[str, Any]:
        """All that was found, in plain values; times in the unit of their name, memory in MiB."""
        packages = ("timm", "onnxruntime", "openvino")
        installed = {each.metadata["Name"]: each.version for each in metadata.distributions()}
        versions = {"convmlp": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
        return {
            "command": list(command),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": {
                "name": self.machine,
                "processor": processor(),
                "cores": count_cores(),
                "capability": torch.backends.cpu.get_cpu_capability(),
                "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
                "system": platform.platform(),
                "versions": versions | {name: installed[name] for name in packages if name in installed},
                "was_busy": self.was_busy,
            },
            "interrupted": self.was_interrupted,
            "left_out": self.left_out,
            "matrix_products": self.rates,
            "results": self.rows,
            "loading": self.loading,
        }


def make_rows(workers: Sequence[Worker]) -> tuple[list[Row], list[Row]]:
    """A row for each variant of a group, and one for each number format's matrix products; without the unmeasured."""
    done = [worker for worker in workers if worker.turns or "failed" in worker.facts]
    rates = []
    for worker in done:
        if worker.variant.task == "products":
            row = {"dtype": worker.variant.dtype, **worker.facts}
            if worker.turns:  # the best counts: what the machine can do
                row["gflops"] = row["operations"] / min(min(turn) for turn in worker.turns) / 1e9
            rates.append(row)
    best = {rate["dtype"]: rate.get("gflops") for rate in rates}
    own = [worker for worker in done if worker.variant.task != "products"]
    bases = [worker for worker in workers if worker.variant.mode and worker.variant.is_base]
    rows = [make_row(worker, bases[0] if bases else None) for worker in own]
    for row in rows:
        if "gflops" in row and best.get(row["dtype"]):
            row["share"] = row["gflops"] / best[row["dtype"]]
    return rows, rates


def make_row(worker: Worker, base: Worker | None) -> Row:
    """The numbers of a variant: medians of its calls, and its ratio to the base's time, taken round by round."""
    variant = worker.variant
    row: Row = {key: getattr(variant, key) for key in ("task", "model", "mode", "dtype", "batch_size")}
    if base:
        row["weights"], row["top1"] = published(variant.model) or (variant.model, None)
        row |= {key: base.facts[key] for key in ("input_size", "macs", "parameters") if key in base.facts}
    row |= worker.facts
    if "failed" in row:
        return row
    calls = [seconds for turn in worker.turns for seconds in turn]
    middle = median(calls)
    row |= {
        "images_per_s": row["batch_size"] / middle,
        "spread": spread(calls),
        "ms_per_batch": 1000 * middle,
        "turns_ms": [1000 * median(turn) for turn in worker.turns],
    }
    if base and base.turns and "failed" not in base.facts:
        row["ratio"] = median(median(a) / median(b) for a, b in zip(base.turns, worker.turns, strict=False))
    if "macs" in row:  # backward computes twice what forward does: for the input and for the weights of each layer
        row["gflops"] = {"inference": 2, "training": 6}[variant.task] * row["macs"] * row["batch_size"] / middle / 1e9
    return row


def spread(times: Sequence[float]) -> float | None:
    """How far the middle half of the times lies apart, over their median; None for a single one."""
    if len(times) < 2:
        return None
    low, _, high = quantiles(times, method="inclusive")
    return (high - low) / median(times)


def make_table(rows: Sequence[Row]) -> Table:
    """A line for each variant."""
    notes = [_note(row) for row in rows]
    table = Table(box=box.SIMPLE)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("model", "mode", "dtype") else "right", no_wrap=True)
    if any(notes):
        table.add_column("", overflow="fold", max_width=60, min_width=20)
    shown = None
    for row, note in zip(rows, notes, strict=True):
        group = (row["model"], row["batch_size"])
        if shown and group != shown:
            table.add_section()
        cells = [
            escape(row["model"]) if group != shown else "",
            row["mode"],
            row["dtype"],
            str(row["batch_size"]),
            number(row.get("images_per_s")),
            percent(row.get("spread")),
            number(row.get("ms_per_batch")),
            "" if row.get("ratio") is None else f"{row['ratio']:.2f}",
            number(row.get("gflops")),
            percent(row.get("share")),
            "" if row.get("peak_mb") is None or "failed" in row else f"{row['peak_mb']:.0f}",
            escape(note),
        ]
        table.add_row(*cells[: len(table.columns)])
        shown = group
    return table


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _note(row: Row) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    notes = [row.get("backend", "")]
    if row.get("prepared_in_s", 0) > SLOW_TO_PREPARE:
        notes.append(f"ready after {row['prepared_in_s']:.0f} s")
    if row.get("difference", 0) > FAR_OFF:
        notes.append(f"logits differ by {row['difference']:.1g} of the largest")
    return ", ".join(filter(None, notes))


def loading_table(rows: Sequence[Row]) -> Table:
    table = Table("loading images", box=box.SIMPLE)
    for column in ("images/s", "spread"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", overflow="fold", max_width=60)
    for row in rows:
        title = plural(row["workers"], "worker") if row.get("workers") else "one core"
        note = f"failed: {row['failed']}" if "failed" in row else ""
        table.add_row(title, number(row.get("images_per_s")), percent(row.get("spread")), escape(note))
    return table


def is_busy() -> bool:
    """Whether other programs were at work in the last minute."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * count_cores()


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def speed_figure(rows: Sequence[Row], title: str) -> Figure:
    """A line for each model whose accuracy is published, from eager float32 (open) to its fastest mode (filled).

    There is a panel for each batch size.
    """
    rows = [row for row in rows if row["top1"] is not None and "images_per_s" in row]
    sizes = sorted({row["batch_size"] for row in rows})
    figure = new_figure(9 * max(1, len(sizes)), 5.6)
    figure.suptitle(f"{plain(title)}\nopen: eager float32; filled: the fastest mode", fontsize=9)
    if not rows:
        return figure
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for panel, size in zip(panels, sizes, strict=True):
        own = [row for row in rows if row["batch_size"] == size]
        _draw_panel(panel, own)
        pixels = " or ".join(str(side) for side in sorted({row["input_size"][-1] for row in own}))
        panel.set_xlabel(f"images/s measured: {own[0]['task']}, batch {size}, {pixels} px")
    panels[0].set_ylabel(f"ImageNet-1k top-1, %, as published for {IMG_SIZE} px")
    return figure


def _draw_panel(panel: Axes, rows: Sequence[Row]) -> None:
    points = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        best = max(own, key=lambda row: row["images_per_s"])
        eager = [row for row in own if (row["mode"], row["dtype"]) == BASE]
        is_ours, top1 = variant_of(model) is not None, best["top1"]
        colour = OURS if is_ours else OTHERS
        speeds = [row["images_per_s"] for row in (*eager, best)]
        panel.plot(speeds, [top1] * len(speeds), "-", color=colour, linewidth=1.2, zorder=2)
        for speed, fill in zip(speeds, ("white", colour) if eager else (colour,), strict=True):
            panel.plot(speed, top1, "o", markersize=6, markerfacecolor=fill, markeredgecolor=colour, zorder=3)
        how = f" ({best['mode']} {SHORT[best['dtype']]})" if eager != [best] else ""
        points.append(Point(speeds[-1], top1, best["weights"] + how, is_ours))
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.1, y=0.08)
    panel.grid(alpha=0.3)
    label_points(panel, points)
