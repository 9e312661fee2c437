"""Mistakes that the user of a command can mend."""

import difflib
from collections.abc import Iterable


class RunError(Exception):
    """Something the user can mend. Shown as one line, without a traceback."""


def suggest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest known name, whatever its case, or nothing."""
    spellings = {spelling.lower(): spelling for spelling in known}
    nearest = difflib.get_close_matches(name.lower(), spellings, n=1, cutoff=0.5)
    return f"; did you mean {spellings[nearest[0]]}?" if nearest else ""
