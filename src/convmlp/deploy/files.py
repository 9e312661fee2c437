"""The file of a prepared model: a zip archive of what the back end wrote and of what there is to say about it."""

import json
import platform
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.errors import CheckpointError, one_line, some
from ..common.files import check_writable, write_atomically
from ..common.packages import missing, pip_line
from .backends import PACKAGES

ABOUT = "about.json"


@dataclass(frozen=True)
class About:
    """What a saved file says of itself.

    Args:
        backend: What computes.
        dtype: What it computes in, such as 'float32'.
        shape: Of the example, (b, c, h, w).
        any_batch: Whether it takes any number of images, or those of `shape` alone.
        outputs: How the model nests its outputs, as PyTorch's TreeSpec in JSON.
        sha256: The `fingerprint` of the model.
        needs: Of machine code: the system, processor and PyTorch that it was made for.
    """

    backend: str
    dtype: str
    shape: list[int]
    any_batch: bool
    outputs: str
    sha256: str
    needs: dict[str, Any]


def pack(path: Path, about: About, folder: Path) -> None:
    """Write what a back end left in a folder to a file."""

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w") as archive:
            archive.writestr(ABOUT, json.dumps(asdict(about)))
            for file in sorted(folder.iterdir()):
                archive.write(file, file.name)

    check_writable(path)
    write_atomically(path, write)


def describe(path: str | Path) -> About:
    """What a file of `Prepared.save` was made of and for. Nothing in it is run.

    Raises:
        CheckpointError: there is no such file, or it is something else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return About(**json.loads(archive.read(ABOUT)))
    except FileNotFoundError:
        raise CheckpointError(f"no such file: {path}") from None
    except Exception as error:  # a damaged archive raises anything
        raise CheckpointError(f"{path} is no file of Prepared.save, or damaged: {one_line(error)}") from error


def unpack(path: str | Path, folder: Path) -> None:
    """Put what a back end wrote into a folder; raises CheckpointError if any of it has changed."""
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)  # which compares the checksums
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {one_line(error)}") from error


def check_runs_here(path: str | Path, about: About) -> None:
    """Raise CheckpointError if this machine, PyTorch or what is installed cannot run a file."""
    if absent := missing(*PACKAGES.get(about.backend, ())[:1]):  # the others are for writing
        raise CheckpointError(f"{path} needs a missing package: {pip_line(*absent)}")
    for key, here in this_machine().items():
        made_for = about.needs.get(key, here)
        if isinstance(here, list) and (absent := sorted({*made_for} - {*here})):
            raise CheckpointError(f"{path} is for a processor with {some(absent)}: prepare the model on this machine")
        if isinstance(here, str) and made_for != here:
            raise CheckpointError(f"{path} is for {key} {made_for}, here is {here}: prepare the model on this machine")


def this_machine() -> dict[str, str | list[str]]:
    """What machine code depends on; a list holds what a processor can do."""
    can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "PyTorch": torch.__version__.partition("+")[0],  # without its build
        "system": platform.system(),
        "processor": platform.machine(),
        "instructions": sorted(name for name, has in can.items() if has is True)
        or [torch.backends.cpu.get_cpu_capability()],
    }
