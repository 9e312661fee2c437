"""Figures drawn with matplotlib, without its global state or windows."""

import warnings
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from PIL import ImageFont

from .errors import RunError
from .files import write_atomically


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, its size in inches."""
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; the suffix of the path decides the format."""
    with matplotlib.rc_context({"savefig.facecolor": "white"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in scripts that the font lacks
        write_atomically(path, lambda temporary: figure.savefig(temporary))


def check_format(path: Path) -> None:
    """Make sure that matplotlib knows the suffix of this name, or raise `RunError`."""
    known = new_figure(1, 1).canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in known:
        raise RunError(f"cannot write a figure as {path}: the suffix must be one of {', '.join(sorted(known))}")


def image_font(size: float) -> ImageFont.FreeTypeFont:
    """A font for text in images; it has European letters, Greek and Cyrillic."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


def plain(text: str) -> str:
    """Text for a figure, with its dollar signs escaped: matplotlib would read them as formulas."""
    return text.replace("$", r"\$")
