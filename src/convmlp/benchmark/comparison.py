"""A run of the benchmark: the variants take turns, and their times become figures."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from .turns import Contestant, Worker, WorkerFailed, prepare_all, take_turns
from .variants import PACKAGES, Plan, Variant, published_top1

WORKER = f"{__package__}.worker"

# Forward, and backward for the input and for the weights of each layer
OPERATIONS_PER_MAC = {"inference": 2, "training": 6}

Row = dict[str, Any]
Tell = Callable[[str], None]


def count_steps(plan: Plan) -> int:
    """How often `compare` will tell what it is doing."""
    prepared = len(plan.dtypes) + len(plan.variants)
    turns = sum(len(plan.dtypes) + len(group) for group in plan.groups) * plan.rounds
    return prepared + turns


def compare(plan: Plan, tell: Tell = lambda what: None) -> tuple[list[Row], list[Row]]:
    """Measure the variants of a plan: a row for each of them, and one for the matrix products in each number format.

    The processes of a model and batch size take turns with each other and with the matrix products. A variant that
    fails has a row with the reason.
    """
    products = [
        Contestant(f"{dtype} matrix products", [WORKER, "matmul"], {"dtype": dtype, **plan.settings()})
        for dtype in plan.dtypes
    ]
    rows: list[Row] = []
    try:
        prepare_all(products, tell)
        for group in plan.groups:
            rows += _compare_group(plan, group, products, tell)
    finally:
        for product in products:
            product.close()
    rates = [_rate_row(product) for product in products]
    by_dtype = {rate["dtype"]: rate.get("gflops") for rate in rates}
    for row in rows:
        if "gflops" in row and by_dtype[row["dtype"]]:
            row["share"] = row["gflops"] / by_dtype[row["dtype"]]
    return rows, rates


def _compare_group(plan: Plan, group: Sequence[Variant], products: Sequence[Contestant], tell: Tell) -> list[Row]:
    with tempfile.TemporaryDirectory() as temporary:
        contestants = [_contestant(plan, variant, Path(temporary)) for variant in group]
        try:
            _write_onnx_files(plan, group, contestants)
            prepare_all([contestant for contestant in contestants if not contestant.failed], tell)
            take_turns([*products, *contestants], plan.rounds, plan.seconds, tell)
        finally:
            for contestant in contestants:
                contestant.close()
    base = contestants[0]
    return [_row(variant, own, base) for variant, own in zip(group, contestants, strict=True)]


def _contestant(plan: Plan, variant: Variant, folder: Path) -> Contestant:
    kind = variant.mode if variant.mode in PACKAGES else variant.task
    title = f"{variant.model} {variant.mode} {variant.dtype}, batch {variant.batch_size}"
    spec = plan.spec(variant)
    if variant.mode in PACKAGES:  # OpenVINO makes other formats of float32 by itself
        dtype = variant.dtype if variant.mode == "onnxruntime" else "float32"
        spec["folder"] = str(folder / dtype)
    return Contestant(title, [WORKER, kind], spec)


def _write_onnx_files(plan: Plan, group: Sequence[Variant], contestants: Sequence[Contestant]) -> None:
    """By processes of their own, so that what an export takes is not in the memory of the runtimes."""
    folders = dict.fromkeys(c.spec["folder"] for c in contestants if "folder" in c.spec)
    for folder in map(Path, folders):
        folder.mkdir()
        worker = Worker([WORKER, "onnx-file"], plan.threads)
        try:
            worker.listen()
            worker.ask("prepare", **{**plan.spec(group[0]), "dtype": folder.name, "folder": str(folder)})
        except WorkerFailed as error:
            for contestant in contestants:
                if contestant.spec.get("folder") == str(folder):
                    contestant.failed = f"no ONNX file: {error}"
        finally:
            worker.close()


def _row(variant: Variant, own: Contestant, base: Contestant) -> Row:
    of_model: Row = {key: base.about[key] for key in ("input_size", "macs", "parameters") if key in base.about}
    row: Row = {**asdict(variant), **of_model, "top1": published_top1(variant.model), **own.about}
    if own.failed or not own.turns:
        return {**row, "failed": own.failed or "it had no turn"}
    calls = [seconds for turn in own.turns for seconds in turn]
    middle = median(calls)
    row |= {
        "images_per_s": variant.batch_size / middle,
        "spread": spread(calls),
        "ms_per_batch": 1000 * middle,
        "calls": len(calls),
        "turns_ms": [1000 * median(turn) for turn in own.turns],
    }
    if base.turns and not base.failed:
        row["ratio"] = median(median(a) / median(b) for a, b in zip(base.turns, own.turns, strict=True))
    if "macs" in base.about:
        operations = OPERATIONS_PER_MAC[variant.task] * base.about["macs"] * variant.batch_size
        row["gflops"] = operations / middle / 1e9
    return row


def spread(times: Sequence[float]) -> float | None:
    """How far the middle half of the times lies apart, over their median; None for a single one."""
    if len(times) < 2:
        return None
    low, _, high = quantiles(times, method="inclusive")
    return (high - low) / median(times)


def _rate_row(product: Contestant) -> Row:
    """Of matrix products the best counts: what the machine can do."""
    row: Row = {"dtype": product.spec["dtype"], **product.about}
    if not product.turns:
        return {**row, "failed": product.failed or "it had no turn"}
    best = min(seconds for turn in product.turns for seconds in turn)
    return {**row, "gflops": product.about["operations"] / best / 1e9}


def best_of(rows: Sequence[Row]) -> Row | None:
    """The fastest of the rows that did not fail."""
    return max((row for row in rows if "images_per_s" in row), key=lambda row: row["images_per_s"], default=None)
