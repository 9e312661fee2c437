"""Models ready for inference: run, saved and loaded."""

import hashlib
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_unflatten, treespec_loads

from ..common.errors import CheckpointError, one_line
from .backends import Run, read
from .files import About, check_runs_here, describe, pack, unpack

_logger = logging.getLogger(__name__)


class Prepared(nn.Module):
    """What `prepare` and `load` return.

    `backend` names what computes images of `shape`, and of other batch sizes where `any_batch`. What else there is is
    left to eager PyTorch; a loaded file has none and raises ValueError. `about` is what `save` writes, or None where
    nothing can be saved.
    """

    def __init__(
        self,
        backend: str,
        *,
        network: nn.Module | None = None,
        run: Run | None = None,
        shape: torch.Size | None = None,
        about: About | None = None,
        folder: "tempfile.TemporaryDirectory[str] | None" = None,
    ):
        super().__init__()
        self.network = network
        self.backend = backend
        self.shape = shape
        self.about = about
        self._run = run
        self._folder = folder  # lives as long as this, and holds what runs
        self._warned = False
        self.eval()

    @property
    def any_batch(self) -> bool:
        return self.about is not None and self.about.any_batch

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> Any:
        """(b, c, h, w), of any floating type -> the model's outputs, in float32."""
        if self._run is None or self.shape is None:
            assert self.network is not None
            return self.network(x)
        if x.shape == self.shape or (self.any_batch and x.shape[1:] == self.shape[1:] and len(x)):
            return self._run(x.float().contiguous())
        if self.network is None:
            batch = "any number of" if self.any_batch else str(self.shape[0])
            raise ValueError(f"this file is for {batch} images of shape {(*self.shape[1:],)}, got {(*x.shape,)}")
        if not self._warned:
            self._warned = True
            _logger.warning(
                "images of shape %s are not those this was compiled for, %s: slower", tuple(x.shape), tuple(self.shape)
            )
        return self.network(x)

    def save(self, path: str | Path) -> None:
        """Write what was compiled to a file, for `load`. What was at `path` is replaced.

        Raises:
            ValueError: nothing was compiled ahead of time: the back end is eager, or the model is on a GPU.
            RunError: the file cannot be written.
        """
        if self._folder is None or self.about is None:
            device = "on a GPU" if self._run else "uncompiled (backend eager)"
            raise ValueError(f"there is nothing to save of a model {device}: save the weights it was made of")
        pack(Path(path), self.about, Path(self._folder.name))

    def train(self, mode: bool = True) -> "Prepared":
        if mode:
            raise RuntimeError("a prepared model is for inference alone: train the model it was made of")
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"backend={self.backend}, shape={self.shape and tuple(self.shape)}"


def load(path: str | Path) -> Prepared:
    """What `Prepared.save` wrote, ready to run within about a second; no compiler is needed.

    The file of the back end inductor holds machine code: who loads it trusts its writer, as with a program. The files
    of onnxruntime and openvino hold none. Nothing is unpickled.

    Raises:
        CheckpointError: no such file, one that is damaged or something else, or one that this machine, this PyTorch
            or what is installed cannot run.
    """
    about, folder = describe(path), tempfile.TemporaryDirectory(prefix="convmlp-")
    check_runs_here(path, about)
    unpack(path, Path(folder.name))
    try:
        return open_folder(about, folder, None)
    except Exception as error:  # of runtimes, which raise anything
        raise CheckpointError(f"{path} cannot be loaded: {one_line(error)}") from error


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model: names, types, shapes and bytes of its parameters and buffers, and how it prints."""
    found = hashlib.sha256(repr(model).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def open_folder(about: About, folder: "tempfile.TemporaryDirectory[str]", network: nn.Module | None) -> Prepared:
    compiled = read(about.backend, getattr(torch, about.dtype), Path(folder.name))
    outputs = treespec_loads(about.outputs)
    return Prepared(
        about.backend,
        network=network,
        run=lambda x: tree_unflatten(tree_leaves(compiled(x)), outputs),
        shape=torch.Size(about.shape),
        about=about,
        folder=folder,
    )
