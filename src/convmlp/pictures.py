"""Pictures from files: which ones a path names, and every kind of them as plain RGB or grey."""

import glob
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from .errors import RunError

EXTENSIONS = ".jpg .jpeg .jpe .jfif .png .bmp .ppm .pgm .pbm .tif .tiff .webp .gif .jp2 .avif".split()


class UnreadablePicture(RunError):
    """A file that is no picture, or a damaged one; the message names it."""


def find_pictures(place: str | Path) -> list[Path]:
    """The file, the pictures in the folder and its subfolders, or what a pattern such as 'photos/*.jpg' matches.

    Raises:
        RunError: there is no such file, or no picture in the folder.
    """
    if not str(place):
        raise RunError("no picture, folder or pattern was named, only an empty text")
    path = Path(place)
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        found = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if not found:
            raise RunError(f"no pictures in the folder {place} ({', '.join(EXTENSIONS[:5])}, ...)")
        return found
    if path.is_file():
        return [path]
    found = [p for p in map(Path, sorted(glob.glob(str(place), recursive=True))) if p.is_file()]
    if not found:
        raise RunError(f"no such picture, folder or pattern: {place}")
    return found


def read_picture(path: str | Path, mode: str = "RGB") -> Image.Image:
    """A picture of any format that Pillow reads, upright by its EXIF tag; of an animation the first frame.

    Raises:
        UnreadablePicture: it is missing, no picture, damaged, or too large to be an honest one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF entries, and of pictures that are merely large
            with Image.open(path) as image:
                image.load()
                return to_mode(ImageOps.exif_transpose(image), mode)
    except Image.DecompressionBombError as error:
        raise UnreadablePicture(f"{path}: {error}") from error
    except Exception as error:  # Pillow's plugins raise whatever their formats provoke
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not a picture" if Path(path).stat().st_size else "an empty file"
        raise UnreadablePicture(f"{path}: {reason}") from error


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """An image as RGB or L: 16 bits are scaled to 8, what is transparent becomes white.

    Floating point values and long integers count up to 1, 255 or 65535, the first that is enough.
    """
    if image.mode.startswith(("I", "F")):  # which Pillow would clip instead of scale
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        if image.mode.startswith("I;16") or values.max() > 255:
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
