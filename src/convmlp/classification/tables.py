"""Tables of images, as CSV or Parquet: which image has which label, and perhaps which split it is in."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..common.errors import RunError, one_line, plural, some
from ..common.files import write_atomically
from ..common.packages import need
from .folders import Item, real_path

# What people call the columns, in small letters, without blanks and underscores
COLUMNS = {
    "path": ("path", "file", "filename", "filepath", "image", "imagepath"),
    "label": ("label", "class", "target", "category"),
    "split": ("split",),
}


def read_table(path: Path, multi_label: bool = False) -> list[Item]:
    """The rows of a table, with paths relative to its folder made whole, and the split as the table calls it.

    A row that is there twice counts once.

    Raises:
        RunError: it cannot be read, lacks a column, or has a row without a path or label, or one image with two labels
            or in two splits.
    """
    try:
        titles, rows = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    except (OSError, ValueError, csv.Error) as error:  # also of pyarrow, and what is not UTF-8
        raise RunError(f"cannot read {path}: {getattr(error, 'strerror', None) or one_line(error)}") from error
    plain = {title.strip().lower().replace("_", "").replace(" ", ""): title for title in titles}
    columns = {key: next((plain[n] for n in names if n in plain), None) for key, names in COLUMNS.items()}
    for key in ("path", "label"):
        if columns[key] is None:
            raise RunError(
                f"{path} has no column {key} ({', '.join(COLUMNS[key])}); its columns are {some(titles, 8) or 'none'}"
            )
    if not all(isinstance(row[str(columns["path"])], str | None) for row in rows):
        raise RunError(f"{path}: the column {columns['path']} does not hold paths of image files")
    items = [Item(*(_text(row.get(columns[key])) for key in COLUMNS)) for row in rows]  # type: ignore[arg-type]
    _check_cells(path, items, [key for key in COLUMNS if columns[key] and not (multi_label and key == "label")])
    items = [item._replace(path=str(path.parent / item.path)) for item in items]
    known: dict[str, Item] = {}
    for item in items:
        first = known.setdefault(real_path(item.path), item)
        for key in ("label", "split"):
            one, other = getattr(first, key), getattr(item, key)
            if one != other:
                raise RunError(f"{path}: {item.path} is there twice, with the {key}s {one} and {other}")
    return list(known.values())


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell).strip()


def _check_cells(path: Path, items: list[Item], columns: list[str]) -> None:
    """Make sure that no cell of these columns is empty."""
    if not items:
        raise RunError(f"{path} has no rows")
    for key in columns:
        rows = [number for number, item in enumerate(items, 1) if not getattr(item, key)]
        if rows:
            raise RunError(f"{path}: {plural(len(rows), 'image')} without a {key}, the first in row {rows[0]}")


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Titles and rows; commas, semicolons or tabs separate the cells."""
    text = path.read_text(encoding="utf-8-sig")
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter)
    return list(reader.fieldnames or []), list(reader)


def _read_parquet(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    need(str(path), "pyarrow")
    from pyarrow import parquet

    table = parquet.read_table(path)
    return table.column_names, table.to_pylist()


def check_files(items: list[Item], origin: Path) -> None:
    """Make sure that the images of a table are there, and are files."""
    for what, is_so in (("is a folder", Path.is_dir), ("is not there", lambda path: not path.exists())):
        wrong = [item.path for item in items if is_so(Path(item.path))]
        if wrong:
            count = "" if len(wrong) == 1 else f" ({len(wrong)} such)"
            raise RunError(f"{origin}: the image {wrong[0]} {what}{count}; paths are relative to the table's folder")


def write_table(path: Path, titles: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A CSV file."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([titles, *rows])

    write_atomically(path, write)
