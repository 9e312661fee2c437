"""Models that are compiled once that pays, as just-in-time compilers do it; the result is kept for the next time."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from .. import __version__
from ..common.errors import CheckpointError
from .prepared import Prepared, fingerprint, load, prepare

COMPILING, LOADING = 40, 2  # seconds, about
GAINS = {torch.float32: 1.3, torch.bfloat16: 2.5, torch.float16: 2.5}  # at least; tools/benchmark.py measures them
KEPT = 8  # files


class FullBatches(nn.Module):
    """A compiled model that is not compiled anew for a last, smaller batch: blank images fill that up."""

    def __init__(self, model: nn.Module, batch_size: int):
        super().__init__()
        self.model = model
        self.batch_size = batch_size

    def forward(self, images: torch.Tensor) -> Any:
        n_images = len(images)
        outputs = self.model(F.pad(images, (0, 0, 0, 0, 0, 0, 0, self.batch_size - n_images)))
        return tree_map_only(torch.Tensor, lambda output: output[:n_images], outputs)


class Tiered(nn.Module):
    """A model that is prepared, see `prepare`, if so many images are left after its second batch that it pays.

    Until then it is the model itself. What was compiled for a CPU is kept in torch.hub's folder, and ready in a second
    or two when the same model comes again.

    Args:
        model: In evaluation mode, on `device`.
        n_images: How many are to come, in batches of one shape; the last may be smaller.
        dtype: What to compute in once it is prepared.
        say: Takes a line on what was compiled.
    """

    def __init__(
        self, model: nn.Module, n_images: int, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]
    ):
        super().__init__()
        self.model = model
        self.device = device
        self.dtype = dtype
        self._left = n_images
        self._batches = 0
        self._say = say
        self._fast: nn.Module | None = None

    def forward(self, images: torch.Tensor) -> Any:
        if self._fast:
            with torch.autocast(self.device.type, enabled=False):
                return self._fast(images)
        start = time.perf_counter()
        outputs = self.model(images)
        self._batches += 1
        self._left -= len(images)
        if self._batches == 2 and self.device.type in ("cpu", "cuda"):  # the first one warms up
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = (time.perf_counter() - start) / len(images) * self._left
            self._fast = self._prepare_if_worth(images, seconds * (1 - 1 / GAINS[self.dtype]))
        return outputs

    def _prepare_if_worth(self, images: torch.Tensor, saved: float) -> nn.Module | None:
        """`saved` are the seconds that would be saved."""
        if saved < LOADING:
            return None
        path = self._place(images)
        if path.exists():
            try:
                prepared = load(path)
                os.utime(path)
                return prepared
            except CheckpointError:  # damaged, or of a machine that shares this folder
                pass
        if saved < COMPILING:
            return None
        start = time.perf_counter()
        prepared = prepare(self.model, dtype=self.dtype, example_input=images)
        dtype = str(self.dtype).removeprefix("torch.")
        line = f"compiled in {time.perf_counter() - start:.0f} s for {self._left} more images, in {dtype}"
        if prepared.about:
            _keep(prepared, path)
            line += f"; kept in {path}"
        if prepared.backend != "eager":
            self._say(line)
        return prepared if prepared.any_batch or not prepared.shape else FullBatches(prepared, len(images))

    def _place(self, images: torch.Tensor) -> Path:
        """The file of this model for images of this size, in this dtype, on this kind of machine."""
        machine = (torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
        facts = (fingerprint(self.model), images.shape[1:], self.dtype, torch.__version__, __version__, machine)
        return _folder() / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}.prepared"


def _keep(prepared: Prepared, path: Path) -> None:
    prepared.save(path)
    for old in sorted(path.parent.glob("*.prepared"), key=os.path.getmtime)[:-KEPT]:
        old.unlink(missing_ok=True)


def _folder() -> Path:
    return Path(torch.hub.get_dir(), "prepared")
