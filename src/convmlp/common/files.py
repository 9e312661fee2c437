"""Files that are written whole or not at all, and folders that belong to one run."""

import contextlib
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import RunError

LOCK, HOLDER = ".lock", ".holder"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place; a failure leaves `path` as it was.

    Follows symlinks; writes directly into what is not a regular file, such as a pipe.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        write(path)
        return
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        with contextlib.suppress(PermissionError):  # Windows opens no folders
            _flush(path.parent)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: Path) -> None:
    """Make sure, before long work, that a file can be written at `path`, or raise `RunError`; creates its folder."""
    if path.is_dir():
        raise RunError(f"cannot write {path}: it is a folder")
    if not path.exists() or path.is_file():
        make_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Create a folder for output, or raise `RunError` if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"cannot write to the output folder {folder}: {error.strerror}") from error


def lock_folder(folder: Path) -> AbstractContextManager[object]:
    """Keep other runs out of a folder until the returned context is left, or this process ends in any way.

    A file beside the lock names the process that holds it. Both files are left behind; only the lock counts.

    Raises:
        RunError: another process holds the folder.
    """
    make_folder(folder)
    try:
        lock = FileLock(folder / LOCK).acquire(blocking=False)
    except Timeout as error:
        holder = _read_holder(folder) or "another process"
        raise RunError(f"{folder} is in use by {holder}; two runs cannot write into one folder") from error
    except OSError as error:
        raise RunError(f"cannot lock {folder}: {error.strerror or error}") from error
    holder = f"process {os.getpid()} on {socket.gethostname()}{_launch()}"
    write_atomically(folder / HOLDER, lambda temporary: temporary.write_text(holder))
    return lock


def was_restarted(folder: Path) -> bool:
    """Whether torchrun started this process again (--max-restarts) after an attempt that had locked this folder."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return restarts > 0 and (folder / HOLDER).is_file() and _read_holder(folder).endswith(_launch())


def _read_holder(folder: Path) -> str:
    path = folder / HOLDER
    return path.read_text().strip() if path.is_file() else ""


def _launch() -> str:
    identity = os.environ.get("TORCHELASTIC_RUN_ID")
    return f", torchrun {identity}" if identity else ""


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed `write_atomically` left in a folder. Nobody else may be writing there."""
    for path in folder.glob(".*.part*"):
        path.unlink(missing_ok=True)
