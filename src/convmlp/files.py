"""Writing files so that nobody ever finds half of one."""

import os
from collections.abc import Callable
from pathlib import Path

from .errors import RunError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place; a failure leaves `path` as it was.

    A link stays, and what it points to is replaced. What is no file, such as a pipe, is written into.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        return write(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def check_writable(path: Path) -> None:
    """Make sure, before long work, that a file can be written at `path`; its folder is made if need be.

    Raises:
        RunError: it cannot.
    """
    if path.is_dir():
        raise RunError(f"cannot write {path}: it is a folder")
    if not path.exists() or path.is_file():
        make_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Create a folder for output, or say that it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"cannot write into the output folder {folder}: {error.strerror}") from error
