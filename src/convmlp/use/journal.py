"""A journal of results: rows in a file, as they come, so that an interrupted command can go on."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..common.errors import RunError

Row = dict[str, Any]


class Journal:
    """Rows in the file RESULT.partial, which is removed with the last one; without a result, in a temporary file.

    Its first line holds the settings that led to the rows, so that others are not mixed with them. `done` are the
    images of the rows that an interrupted command left, if it is resumed, and `n_errors` counts the rows with an error.
    """

    def __init__(self, result: Path | None, settings: Mapping[str, Any], resume: bool):
        self.path = result and result.with_name(f"{result.name}.partial")
        self.done: set[str] = set()
        self.n_rows = self.n_errors = 0
        header = json.dumps(settings, sort_keys=True).encode() + b"\n"
        resumed = self.path if resume and self.path and self.path.exists() else None
        self._file = open(self.path, "r+b" if resumed else "w+b") if self.path else tempfile.TemporaryFile()
        if not resumed:
            self._file.write(header)
        elif (found := self._file.readline()) != header:
            begun = found.decode(errors="replace").strip()
            raise RunError(f"{resumed} was begun with {begun}, not with {header.decode().strip()}: leave out --resume")
        self._start = self._file.tell()
        for row in self:
            self.done.add(row["image"])
            self._count(row)

    def __iter__(self) -> Iterator[Row]:
        """The rows, the earliest first. A line that was cut off by a power failure is dropped."""
        self._file.seek(self._start)
        while line := self._file.readline():
            if not line.endswith(b"\n"):
                self._file.seek(-len(line), 1)
                self._file.truncate()
                return
            yield json.loads(line)

    def add(self, row: Row) -> None:
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._count(row)

    def _count(self, row: Row) -> None:
        self.n_rows += 1
        self.n_errors += "error" in row

    def finish(self) -> None:
        """Remove the file: its rows stand in the results."""
        self._file.close()
        if self.path:
            self.path.unlink()
