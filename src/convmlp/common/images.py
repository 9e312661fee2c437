"""Images from files: which ones a path names, and any kind of them as plain RGB or grey."""

import glob
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

from .errors import RunError

# The largest ratio of the sides: with a short side of 256 px an image takes 26 MB at this limit, and would take 3.5 GB
# at 30000x2
LONGEST = 100

# Pixels: names drawn into a smaller image would cover it, and a larger one is not enlarged beyond
SMALLEST_DRAWN, LARGEST_DRAWN = 384, 4096

# About odd EXIF entries, and images that are merely large; catch_warnings is not for threads
warnings.filterwarnings("ignore", module=r"PIL\.")

EXTENSIONS = ".jpg .jpeg .jpe .jfif .png .bmp .ppm .pgm .pbm .tif .tiff .webp .gif .jp2 .avif".split()


class UnreadableImage(RunError):
    """A file that is not an image, or a damaged one; the message names it."""


def find_images(place: str | Path) -> list[Path]:
    """The file, the images in the folder and its subfolders, or what a pattern such as 'photos/*.jpg' matches.

    Raises:
        RunError: there is no such file, or no image in the folder.
    """
    if not str(place):
        raise RunError("the path of an image, a folder or a pattern is empty")
    path = Path(place)
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        found = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not found:
            raise RunError(f"no images in the folder {place} ({', '.join(EXTENSIONS[:5])}, ...)")
        return found
    if path.is_file():
        return [path]
    found = [p for p in map(Path, sorted(glob.glob(str(place), recursive=True))) if p.is_file()]
    if not found:
        raise RunError(f"no such image, folder or pattern: {place}")
    return found


def read_image(path: str | Path, mode: str = "RGB") -> Image.Image:
    """An image in any format that Pillow reads, turned upright by its EXIF tag; the first frame of an animation.

    Raises:
        UnreadableImage: it is missing, not an image, damaged, EPS, too large to be trusted, or too long.
    """
    try:
        return to_mode(open_image(path, upright=True), mode)
    except Exception as error:  # also from modes that Pillow cannot convert
        raise UnreadableImage(f"{path}: {error}") from error


def open_image(file: str | Path | IO[bytes], upright: bool = False, draft: int = 0) -> Image.Image:
    """An image as it is in a file, or turned by its EXIF tag; the first frame of an animation.

    With `draft` a JPEG may be decoded at a fraction of its size, with sides of at least so many pixels; that is quick.

    Raises:
        UnreadableImage: for the same reasons as `read_image`; the message is only the reason.
    """
    try:
        with Image.open(file) as image:
            if image.format == "EPS":
                raise UnreadableImage("EPS is not read, because it is a program for Ghostscript")
            if draft:
                image.draft("RGB", (draft, draft))
            image.load()
            return ImageOps.exif_transpose(image) if upright else image
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their formats provoke
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image" if _has_content(file) else "an empty file"
        raise UnreadableImage(reason) from error


def _has_content(file: str | Path | IO[bytes]) -> bool:
    if isinstance(file, (str, Path)):
        return Path(file).stat().st_size > 0
    return file.seek(0, os.SEEK_END) > 0


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """An image as RGB or L: 16 bits are scaled to 8, transparent areas become white.

    Floating-point values and long integers are taken to range up to 1, 255 or 65535, the first that is enough.

    Raises:
        UnreadableImage: one side is more than `LONGEST` times the other; no resized copy of it would fit in memory.
    """
    if max(image.size) > LONGEST * min(image.size):
        size = f"{image.width}x{image.height} px"
        raise UnreadableImage(f"{size}, one side is more than {LONGEST} times the other")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    elif image.mode in ("I", "F"):  # Pillow would clip these instead of scaling them
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        if values.max() > 255:
            values = values // 256
        elif image.mode == "F" and values.max() <= 1:
            values = values * 255
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return image.convert(mode)


def to_image(tensor: Any, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised image tensor, (c, h, w), back to uint8 (h, w, c)."""
    image = tensor.detach().float().cpu().numpy().transpose(1, 2, 0)
    return np.clip(np.round((image * np.asarray(std) + np.asarray(mean)) * 255), 0, 255).astype(np.uint8)


def enlargement(width: int, height: int) -> int:
    """How many times as large an image is drawn, so that names do not cover it; a large or long one stays as it is."""
    return min(math.ceil(SMALLEST_DRAWN / min(width, height)), max(1, LARGEST_DRAWN // max(width, height)))
