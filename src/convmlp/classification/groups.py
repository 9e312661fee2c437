"""Groups of options: the types that an option may have, its range, and how it is stated."""

import argparse
import ast
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import yaml

from ..common.errors import RunError

# Types of options


def number_or_auto(text: str) -> int | None:
    """A whole number, or None for auto."""
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or auto, got {text[:80]}") from None


def numbers(text: str) -> list[float]:
    """One or more numbers, separated by commas (or blanks, see `options.join_lists`)."""
    return [float(part) for part in text.split(",")]


def keywords(text: str) -> dict[str, Any]:
    """KEY=VALUE pairs, separated by commas (or blanks: `options.join_lists`); values as in Python or YAML."""
    pairs = [part.partition("=") for part in re.split(r",(?=\w+=)", text)]
    if not all(key.isidentifier() and value for key, _, value in pairs):
        raise argparse.ArgumentTypeError(f"it takes KEY=VALUE, got {text}")
    return {key: _value(text) for key, _, text in pairs}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise argparse.ArgumentTypeError(f"{text[:80]} is not a value") from None


# Ranges of options


class Range(NamedTuple):
    """What holds of every value of an option, and how an error says it."""

    holds: Callable[[Any], bool]
    rule: str


POSITIVE = Range(lambda x: x > 0, "must be positive")
NOT_NEGATIVE = Range(lambda x: x >= 0, "must not be negative")
FRACTION = Range(lambda x: 0 <= x <= 1, "must be between 0 and 1")
SHARE = Range(lambda x: 0 < x < 1, "must be above 0 and below 1")
BELOW_ONE = Range(lambda x: 0 <= x < 1, "must be at least 0 and below 1")
POSITIVE_EACH = Range(lambda x: min(x) > 0, "must be positive")
AREAS = Range(lambda x: 0 < x[0] <= x[1] <= 1, "must be a smaller and a larger part of 1")
RATIOS = Range(lambda x: 0 < x[0] <= x[1], "must be a smaller and a larger number")


def option(
    default: Any, help: str = "", metavar: str = "", range: Range | None = None, flags: str = "", **argument: Any
) -> Any:
    """A field of a group. `flags` are further names; `argument` goes to argparse, which knows the rest by the type."""
    argument |= {"metavar": metavar} if metavar else {}
    metadata = {"help": help, "range": range, "flags": flags.split(), "argument": argument}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def flag_of(name: str) -> str:
    """How the command line spells an option."""
    return f"--{name.replace('_', '-')}"


def require(condition: object, message: str) -> None:
    """Raise a `RunError` unless the condition holds."""
    if not condition:
        raise RunError(message)


@dataclass(frozen=True)
class Group:
    """Options that belong together, each checked when it is made; the docstring is their title in the help."""

    def __post_init__(self) -> None:
        for each in fields(self):
            name, value, range = flag_of(each.name), getattr(self, each.name), each.metadata["range"]
            items = value if isinstance(value, list) else [value]
            require(all(math.isfinite(x) for x in items if isinstance(x, float)), f"{name} must be finite, got {value}")
            require(value is None or not range or range.holds(value), f"{name} {range and range.rule}, got {value}")
