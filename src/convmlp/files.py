"""Writing files so that nobody ever finds half of one."""

import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from .errors import RunError

_logger = logging.getLogger(__name__)

LOCK = ".lock"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place; a failure leaves `path` as it was.

    A link stays, and what it points to is replaced. What is no file, such as a pipe, is written into.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        write(path)
        return
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
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


def lock_folder(folder: Path) -> TextIO:
    """Keep other runs out of a folder until the returned file is closed, or this process ends in whatever way.

    The file names the process that holds the folder. It stays there, which means nothing.

    Raises:
        RunError: another process holds the folder.
    """
    make_folder(folder)
    file = open(folder / LOCK, "a+")
    if os.name != "posix":
        return file
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # POSIX leaves open which
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RunError(f"{folder} is in use by {holder}; two runs cannot write into one folder") from error
    except OSError as error:
        _logger.warning(f"{folder} cannot be locked ({error.strerror}): make sure that no other run writes there")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}{_launch()}")
    file.flush()
    return file


def was_restarted(folder: Path) -> bool:
    """Whether torchrun started this process again (--max-restarts) after an attempt that had locked this folder."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return restarts > 0 and (folder / LOCK).exists() and (folder / LOCK).read_text().endswith(_launch())


def _launch() -> str:
    identity = os.environ.get("TORCHELASTIC_RUN_ID")
    return f", torchrun {identity}" if identity else ""


def remove_leftovers(folder: Path) -> None:
    """Remove what `write_atomically` left in a folder when it was killed. Nobody else may be writing there."""
    for path in folder.glob(".*.part*"):
        path.unlink(missing_ok=True)
