"""What commands write: messages, tables, and results on the screen or in a file."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from .files import write_atomically


def say(message: str) -> None:
    """A message beside the results, which have standard output for themselves."""
    print(message, file=sys.stderr)


def write_result(place: str | None, write: Callable[[TextIO], None]) -> None:
    """Let `write` fill a file, or the screen where `place` is -, or do nothing where it is None."""
    if place == "-":
        write(sys.stdout)
    elif place:

        def fill(temporary: Path) -> None:
            with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
                write(file)

        write_atomically(Path(place), fill)
        say(f"written: {place}")


def show_table(table: Any, title: str = "", whole: bool = False) -> None:
    """Print a table of rich, never narrower than its content needs; `whole`: in a narrow terminal, too."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() and not whole else 400, highlight=False)
    console.width = max(console.width, console.measure(table).minimum)
    with console.capture() as text:  # rich itself would end the program where nobody reads on
        console.print(*filter(None, [title, table]), sep="\n")
    sys.stdout.write(text.get())
