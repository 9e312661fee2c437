"""Output of commands: messages, tables, and results on the screen or in a file."""

import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from .files import write_atomically


def say(message: str) -> None:
    """Print a message to standard error; standard output is for results."""
    print(message, file=sys.stderr)


def write_result(place: str | None, write: Callable[[TextIO], None]) -> None:
    """Let `write` fill a file, or the screen if `place` is -, or do nothing if it is None."""
    if place == "-":
        write(sys.stdout)
    elif place:

        def fill(temporary: Path) -> None:
            with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
                write(file)

        write_atomically(Path(place), fill)
        say(f"written: {place}")


def show_table(table: Any, title: str = "", whole: bool = False) -> None:
    """Print a rich table, at least as wide as its content; `whole`: in one piece even in a narrow terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() and not whole else 400, highlight=False)
    console.width = max(console.width, console.measure(table).minimum)
    with console.capture() as text:  # rich itself would exit if the pipe is closed
        console.print(*filter(None, [title, table]), sep="\n")
    sys.stdout.write(text.get())


@contextmanager
def quiet() -> Iterator[None]:
    """Without what other libraries print, log and warn of, where what comes of it is checked."""
    before = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
