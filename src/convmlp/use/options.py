"""Options that several verbs have."""

import argparse
from collections.abc import Sequence

from ..common.command import positive_int
from ..common.errors import RunError


def add_machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--img-size", type=positive_int, metavar="PX", help="side of the square the model sees")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto (cuda, else mps, else cpu), or a device")


def add_pretrained(parser: argparse.ArgumentParser) -> None:
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--pretrained", action=switch, default=True, help="published weights; or random ones")


def refuse(options: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """An option that would change nothing is an error."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value is not False:  # 0.0 is a threshold, though it equals False
            raise RunError(f"--{name.replace('_', '-')} {reason}")
