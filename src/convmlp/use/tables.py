"""Tables of what was found on images: for the screen, as JSON and as CSV; and names for drawn copies.

A row is a dict in plain values: "image", its path, perhaps "abstained", and then a list of what was found on it, the
best first; each a dict with index, name, one of probability, score and share (0 to 1), and where they apply box (x1,
y1, x2, y2 in pixels) and mask (COCO's run-length code).
"""

import csv
import itertools
import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.markup import escape
from rich.table import Table

Row = dict[str, Any]
MEASURES = ("probability", "score", "share")


def make_table(rows: Sequence[Row]) -> Table:
    """A line for each thing found."""
    lines = [(row["image"], found) for row in rows for found in _found(row) or [{}]]
    unsure = {row["image"] for row in rows if row.get("abstained")}
    measure = next((key for _, found in lines for key in found if key in MEASURES), _usual_measure(rows))
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


def write_json(file: TextIO, rows: Sequence[Row], unreadable: Sequence[Exception]) -> None:
    """An object of two lists: "predictions", the rows, and "unreadable", messages that name the images."""
    content = {"predictions": list(rows), "unreadable": [str(error) for error in unreadable]}
    json.dump(content, file, indent=1, ensure_ascii=False, allow_nan=False)
    file.write("\n")


def write_csv(file: TextIO, rows: Sequence[Row]) -> None:
    """A line for each thing found: image, rank from 1, index, name, ...; a box as x1, y1, x2, y2; no masks."""
    lines = []
    for row in rows:
        for rank, found in enumerate(_found(row), 1):
            plain = {key: value for key, value in found.items() if key not in ("box", "mask")}
            plain |= dict(zip(("x1", "y1", "x2", "y2"), found.get("box", ()), strict=False))
            answer = {key: row[key] for key in ("abstained",) if key in row}
            lines.append({"image": row["image"], "rank": rank, **plain, **answer})
    measure = _usual_measure(rows)
    sides = ["x1", "y1", "x2", "y2"] if measure == "score" else []
    columns = list(lines[0]) if lines else ["image", "rank", "index", "name", measure, *sides]
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)


def _usual_measure(rows: Sequence[Row]) -> str:
    """What would be measured, where nothing was found."""
    return "score" if any("detections" in row for row in rows) else "probability"


def _found(row: Row) -> list[dict[str, Any]]:
    return list(row.values())[-1]


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
