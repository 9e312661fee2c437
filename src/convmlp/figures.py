"""Figures of matplotlib, without its global state and windows."""

import warnings
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from .files import write_atomically


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches."""
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; the suffix of the path says in which format."""
    with matplotlib.rc_context({"savefig.facecolor": "white"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in scripts the font lacks
        write_atomically(path, lambda temporary: figure.savefig(temporary))


def plain(text: str) -> str:
    """A text for a figure, where matplotlib would take dollars for formulas."""
    return text.replace("$", r"\$")
