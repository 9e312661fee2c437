"""Mistakes that the user of a command can mend."""

import difflib
import os
import sys
import time
from collections.abc import Iterable


class RunError(Exception):
    """Something the user can mend. Shown as one line, without a traceback."""


class CheckpointError(RunError, RuntimeError):
    """A checkpoint that cannot be had, read, or fitted into the model; the message says which and what to do."""


def suggest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest known name, whatever its case, or nothing."""
    spellings = {spelling.lower(): spelling for spelling in known}
    nearest = difflib.get_close_matches(name.lower(), spellings, n=1, cutoff=0.5)
    return f"; did you mean {spellings[nearest[0]]}?" if nearest else ""


def complain(script: str, message: str) -> None:
    """Show what ends a script. Of several processes with the same message the first one speaks."""
    rank = int(os.environ.get("RANK", 0))
    if rank:  # the end of the first process ends the others in this time
        time.sleep(5)
        message = f"process {rank}: {message}"
    print(f"{script}: {message}", file=sys.stderr)
