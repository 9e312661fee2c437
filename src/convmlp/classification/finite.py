"""Finite numbers: where the loss, the gradients or the state of a run hold NaN or infinity."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..common.errors import some
from .checkpoints import named_tensors
from .loaders import Loader

NONFINITE = "nonfinite.txt"


class Number(NamedTuple):
    """A scalar tensor that has to be finite, and the batch that it belongs to."""

    name: str
    batch: int
    value: torch.Tensor


class FiniteCheck:
    """Collects numbers and looks at them together, because a look at one makes the processor wait for the GPU."""

    def __init__(self, folder: Path, loader: Loader, rank: int):
        self.folder = folder
        self.loader = loader
        self.rank = rank
        self._numbers: list[Number] = []

    def add(self, name: str, batch: int, value: torch.Tensor) -> None:
        self._numbers.append(Number(name, batch, value))

    def first_bad(self) -> Number | None:
        """The first of the numbers so far that is not finite; they are forgotten."""
        numbers, self._numbers = self._numbers, []
        if not numbers:
            return None
        finite = torch.isfinite(torch.stack([number.value.float() for number in numbers])).tolist()
        return None if all(finite) else numbers[finite.index(False)]

    def describe(self, bad: Number, epoch: int) -> str:
        """What to say of a number that is not finite; nonfinite.txt then names all images of its batch."""
        what = f"{bad.name} is {bad.value.item()}"
        names = self.loader.names(epoch, bad.batch)
        title = f"epoch {epoch}, batch {bad.batch}, process {self.rank}: {what}"
        with open(self.folder / NONFINITE, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n  ".join([title, *names]) + "\n")
        images = f" (process {self.rank}: {some(names)}; all in {NONFINITE})" if names else ""
        return f"{what} at batch {bad.batch} of epoch {epoch}{images}"


def find_nonfinite(state: Any, name: str) -> str | None:
    """The name of the first tensor in a nested state that holds NaN or infinity."""
    return next((name for name, tensor in named_tensors(state, name) if not torch.isfinite(tensor).all()), None)
