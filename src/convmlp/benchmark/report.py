"""The figures of the benchmark: a table with notes, and JSON together with the machine."""

import datetime
import json
import os
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch
from rich import box
from rich.markup import escape
from rich.table import Table

from .. import __version__
from ..common.devices import count_cores
from .comparison import Row, best_of
from .variants import INFERENCE, TRAINING, Plan

COLUMNS = ["model", "mode", "dtype", "batch", "images/s", "spread", "ms/batch", "x base", "GFLOP/s", "share", "peak MB"]
SLOW_TO_PREPARE = 10  # seconds that are worth a word
BUSY = 0.3  # of the cores, by programs that were there before
FAR_OFF = 0.1  # of the largest logit


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
            _number(row.get("images_per_s")),
            _percent(row.get("spread")),
            _number(row.get("ms_per_batch")),
            "" if row.get("ratio") is None else f"{row['ratio']:.2f}",
            _number(row.get("gflops")),
            _percent(row.get("share")),
            "" if row.get("peak_mb") is None or "failed" in row else f"{row['peak_mb']:.0f}",
            escape(note),
        ]
        table.add_row(*cells[: len(table.columns)])
        shown = group
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _note(row: Row) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    notes = [row.get("backend", "")]
    if row["prepared_in_s"] > SLOW_TO_PREPARE:
        notes.append(f"ready after {row['prepared_in_s']:.0f} s")
    if row.get("difference") is not None and not row["difference"] <= FAR_OFF:
        notes.append(f"logits differ by {row['difference']:.1g} of the largest")
    return ", ".join(filter(None, notes))


def sections(
    plan: Plan, rows: Sequence[Row], rates: Sequence[Row], loaded: Sequence[Row], was_busy: bool
) -> list[tuple[Table, list[str]]]:
    """Tables, each with what one has to know to read it."""
    found = []
    if loaded:
        found.append((make_loading_table(loaded), notes_on_loading(loaded)))
    if rows:
        found.append((make_table(rows), notes_on(plan, rows, rates)))
    notes = found[-1][1]
    if loaded and plan.task == TRAINING:
        notes += _cores_needed(loaded[0], best_of(rows))
    if was_busy:
        notes.append("other programs were at work when this began: figures are lower and farther apart than need be")
    return found


def notes_on(plan: Plan, rows: Sequence[Row], rates: Sequence[Row]) -> list[str]:
    what = "" if plan.task == INFERENCE else "; a step: loss, gradients, AdamW, average of the weights"
    measured = [f"{rate['dtype']} {_number(rate['gflops'])}" for rate in rates if "gflops" in rate]
    memory = "allocated on the GPU"
    before = [row["before_mb"] for row in rows if "before_mb" in row]
    if before and not plan.device.startswith("cuda"):
        memory = f"of the process, which has {min(before):.0f} to {max(before):.0f} MB before there is a model"
    return [
        f"{describe_machine(plan)}; noise for pictures; random weights and BatchNorm statistics, but for checkpoints"
        f"{what}",
        "images/s, ms/batch: medians; spread: of the middle half of the times; x base: against eager float32, by round",
        f"share: of what matrix products reach here, {', '.join(measured) or 'which failed'} GFLOP/s; convolutions may "
        "be faster",
        f"peak MB: {memory}",
        *(f"left out: {reason}" for reason in plan.left_out),
    ]


def make_loading_table(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE)
    for column in ("loading pictures", "images/s", "spread"):
        table.add_column(column, justify="left" if column == "loading pictures" else "right", no_wrap=True)
    table.add_column("", overflow="fold", max_width=60)
    for row in rows:
        title = f"{row['workers']} workers" if row["workers"] > 1 else "1 worker" if row["workers"] else "one core"
        note = f"failed: {row['failed']}" if "failed" in row else ""
        table.add_row(title, _number(row.get("images_per_s")), _percent(row.get("spread")), escape(note))
    return table


def notes_on_loading(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    return [f"the ImageNet recipe's augmentation, {first['img_size']} px, {first['pictures']} different pictures"]


def _cores_needed(core: Row, fastest: Row | None) -> list[str]:
    if not fastest or "images_per_s" not in core:
        return []
    name = f"{fastest['model']} {fastest['mode']} {fastest['dtype']}, batch {fastest['batch_size']}"
    rates = [_number(row["images_per_s"]) for row in (core, fastest)]
    cores = fastest["images_per_s"] / core["images_per_s"]
    return [f"a core loads {rates[0]} images/s: to keep up with {name}, {rates[1]} images/s, takes {cores:.2g} cores"]


def is_busy() -> bool:
    """Whether other programs were at work in the last minute."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * count_cores()


def describe_machine(plan: Plan) -> str:
    device = torch.device(plan.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return f"{name}, {plan.threads} of {count_cores()} threads"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    packages = ("timm", "onnxruntime", "openvino")
    installed = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    found = {package: installed[package] for package in packages if package in installed}
    return {"convmlp": __version__, "python": platform.python_version(), "torch": str(torch.__version__), **found}


def as_json(
    command: Sequence[str],
    was_busy: bool,
    plan: Plan,
    rows: Sequence[Row],
    rates: Sequence[Row],
    loading: Sequence[Row],
) -> dict[str, Any]:
    """All that was found, in plain values; times in the unit of their name, memory in MiB."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    settings = {key: getattr(plan, key) for key in ("device", "threads", "img_size", "rounds", "seconds")}
    return {
        "command": list(command),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor(),
            "cores": count_cores(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "gpus": gpus,
            "system": platform.platform(),
            "versions": _versions(),
            "was_busy": was_busy,
        },
        "settings": settings,
        "left_out": plan.left_out,
        "matrix_products": list(rates),
        "results": list(rows),
        "loading": list(loading),
    }


def write_json(file: TextIO, content: dict[str, Any]) -> None:
    json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
    file.write("\n")
