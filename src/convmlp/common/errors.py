"""Errors the user can fix, and how they are worded."""

import difflib
from collections.abc import Iterable


class RunError(Exception):
    """An error the user can fix. Commands show it as one line, without a traceback."""


class CheckpointError(RunError, RuntimeError):
    """A checkpoint that cannot be found, read, or fitted into the model; the message says which and what to do."""


class Diverged(RunError):
    """The loss, the gradients or the weights of a run are no longer finite."""


class Stopped(Exception):
    """A run was asked to stop, and has saved what it needs to go on."""


def suggest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for a known name that looks like this one, whatever its case, or ''."""
    spellings = {spelling.lower().lstrip("-"): spelling for spelling in known}
    nearest = difflib.get_close_matches(name.lower().lstrip("-"), spellings, n=1, cutoff=0.6)
    return f"; did you mean {spellings[nearest[0]]}?" if nearest else ""


def one_line(error: object, limit: int = 300) -> str:
    """The message of an error on one line, or the name of its type where it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def some(names: Iterable[object], limit: int = 3) -> str:
    """The first of many names: 'a, b, c and 7 more'."""
    texts = [str(name) for name in names]
    shown = ", ".join(texts[:limit])
    return f"{shown} and {len(texts) - limit} more" if len(texts) > limit else shown


def plural(count: int, noun: str) -> str:
    """'1 epoch', '2 epochs', '0 classes'."""
    ending = "" if count == 1 else "es" if noun.endswith(("s", "x", "sh", "tch")) else "s"
    return f"{count} {noun}{ending}"
