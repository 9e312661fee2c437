"""Tables of what was found on images: for the screen, as JSON, JSON lines, CSV and Parquet; names for drawn copies.

A row is a dict in plain values: "image", its path, perhaps "abstained" and "features", and then a list of what was
found on it, the best first; each a dict with index, name, one of probability, score and share (0 to 1), and where they
apply box (x1, y1, x2, y2 in pixels) and mask (COCO's run-length code). An image that could not be read is a row of
"image" and "error". The writers go through the rows without keeping them.
"""

import csv
import itertools
import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.markup import escape
from rich.table import Table

from ..common.packages import need

Row = dict[str, Any]
MEASURES = ("probability", "score", "share")
GROUP = 10_000  # rows of a Parquet file that are written at once


def make_table(rows: Sequence[Row]) -> Table:
    """A line for each thing found."""
    lines = [(row["image"], found) for row in rows for found in _found(row) or [{}]]
    unsure = {row["image"] for row in rows if row.get("abstained")}
    measure = _usual_measure(rows)
    table = Table(box=box.SIMPLE)
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column(measure, justify="right", no_wrap=True)
    if any("box" in found for _, found in lines):
        table.add_column("box", no_wrap=True)
    shown = None
    for image, found in lines:
        share = f"{100 * found[measure]:.1f} %" if found else ""
        sides = ", ".join(f"{side:.0f}" for side in found.get("box", ()))
        name = _plain(found.get("name", "nothing found"))
        if image in unsure and image != shown:
            name = f"not sure: {name}"
        cells = ["" if image == shown else _plain(image), name, share, sides]
        table.add_row(*cells[: len(table.columns)])
        shown = image
    return table


def _plain(text: str) -> str:
    """A name out of a file as rich shows it: neither its markup nor a command to the terminal."""
    return escape("".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in text))


def write_json(file: TextIO, rows: Iterable[Row]) -> None:
    """An object of two lists: "predictions", the rows, and "unreadable", messages that name the images."""
    errors, comma = [], ""
    file.write('{"predictions": [')
    for row in rows:
        if "error" in row:
            errors.append(row["error"])
        else:
            file.write(f"{comma}\n {_json(row)}")
            comma = ","
    file.write(f'\n], "unreadable": {_json(errors)}}}\n')


def write_json_lines(file: TextIO, rows: Iterable[Row]) -> None:
    """A line for each image, also for one that could not be read."""
    file.writelines(_json(row) + "\n" for row in rows)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def write_csv(file: TextIO, rows: Iterable[Row]) -> None:
    """A line for each thing found: image, rank from 1, index, name, ...; a box as x1, y1, x2, y2; no masks."""
    readable = (row for row in rows if "error" not in row)
    first = next(readable, {})
    columns = [key for line in _csv_lines(first)[:1] for key in line] or _usual_columns(first)
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    for row in itertools.chain([first], readable):
        writer.writerows(_csv_lines(row))


def _csv_lines(row: Row) -> list[dict[str, Any]]:
    lines = []
    for rank, found in enumerate(_found(row), 1):
        plain = {key: value for key, value in found.items() if key not in ("box", "mask")}
        plain |= dict(zip(("x1", "y1", "x2", "y2"), found.get("box", ()), strict=False))
        answer = {key: row[key] for key in ("abstained",) if key in row}
        lines.append({"image": row["image"], "rank": rank, **plain, **answer})
    return lines


def write_parquet(path: Path, rows: Iterable[Row]) -> None:
    """A row for each image that could be read, with lists as Arrow has them."""
    need("Parquet", "pyarrow")
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    readable = (row for row in rows if "error" not in row)
    group = list(itertools.islice(readable, GROUP))
    schema = _arrow_schema(group)
    with ParquetWriter(path, schema) as writer:
        while group:
            writer.write_table(pyarrow.Table.from_pylist(group, schema))
            group = list(itertools.islice(readable, GROUP))


def _arrow_schema(rows: Sequence[Row]) -> Any:
    """The types of the columns; a measure, a box or a mask may come in a later row than the first."""
    import pyarrow as pa

    found = {"index": pa.int64(), "name": pa.string(), _usual_measure(rows): pa.float64()}
    key = "detections" if "score" in found else "classes"
    if key == "detections":
        found["box"] = pa.list_(pa.float64())
    if any("mask" in each for row in rows for each in _found(row)):
        found["mask"] = pa.struct({"size": pa.list_(pa.int64()), "counts": pa.string()})
    types = {"image": pa.string(), "abstained": pa.bool_(), "features": pa.list_(pa.float32())}
    columns = {name: kind for name, kind in types.items() if rows and name in rows[0]}
    return pa.schema({**columns, key: pa.list_(pa.struct(found))})


def _usual_columns(row: Row) -> list[str]:
    """The columns, where nothing was found."""
    sides = ["x1", "y1", "x2", "y2"] if "detections" in row else []
    return ["image", "rank", "index", "name", _usual_measure([row]), *sides]


def _usual_measure(rows: Sequence[Row]) -> str:
    """What is measured; what would be, where nothing was found."""
    first = next((found for row in rows for found in _found(row)), {})
    usual = "score" if any("detections" in row for row in rows) else "probability"
    return next((key for key in first if key in MEASURES), usual)


def _found(row: Row) -> list[dict[str, Any]]:
    return row.get("detections") or row.get("classes") or []


def drawn_names(paths: Sequence[Path]) -> list[str]:
    """PNG names for drawn copies, all different: a name that is taken gets the folder's, the suffix or a number."""
    taken: set[str] = set()
    names = []
    for path in paths:
        longer = [path.stem, f"{path.parent.name}_{path.stem}", f"{path.stem}_{path.suffix.lstrip('.')}"]
        candidates = itertools.chain(longer, (f"{path.stem}_{number}" for number in itertools.count(2)))
        names.append(next(name for name in candidates if name.lower() not in taken))
        taken.add(names[-1].lower())
    return [f"{name}.png" for name in names]
