"""Models ready for inference: made, saved and loaded."""

import hashlib
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten, treespec_dumps, treespec_loads

from ..common.errors import CheckpointError, one_line
from ..common.packages import missing, pip_line
from .backends import DTYPES, PACKAGES, Network, Run, has_compiler, read, write
from .files import About, check_runs_here, describe, pack, this_machine, unpack
from .folding import fold_batchnorm

_logger = logging.getLogger(__name__)


def prepare(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    example_input: torch.Tensor | None = None,
    backend: str = "auto",
) -> "Prepared":
    """A fast copy of a model for inference, called as the model is: (b, c, h, w) in, the model's outputs in float32.

    BatchNorm is folded, weights are of `dtype`, maps lie channels last. Given an example, the copy is compiled for
    its shape, on a CPU with any number of images; this takes some ten seconds, and `Prepared.save` keeps the result.
    Images of other shapes run as well, uncompiled. docs/performance.md has measurements.

    Args:
        model: Any model of one image batch; it stays as it is. The copy lives on its device.
        dtype: What to compute in. float32 differs from the model by rounding, below 1e-5 of the largest output;
            bfloat16 and float16 by about 1e-2 and 2e-3 of it.
        example_input: Images of the shape that is to be fast.
        backend: 'eager' (PyTorch as it is), 'inductor' (compiled by PyTorch: ahead of time on a CPU, which takes a
            C++ compiler; with CUDA graphs on a GPU), 'onnxruntime' or 'openvino' (on a CPU, where installed).
            'auto' takes inductor where an example is given and it works, else eager; the attribute `backend` of
            what is returned tells which.

    Raises:
        ValueError: an unknown back end, one that cannot do `dtype`, that the device does not have or that needs an
            example, or an example that is not an image batch.
        RuntimeError: a back end named explicitly that is not installed or fails.
    """
    device = _check_request(model, dtype, example_input, backend)
    network = Network(fold_batchnorm(model), dtype)
    if backend == "eager" or example_input is None or (backend == "auto" and not _can_compile(device)):
        return Prepared("eager", network=network)
    # a new tensor: one made in inference mode would fail in the compiler
    example = torch.empty(example_input.shape, device=device).copy_(example_input)
    try:
        if device.type == "cuda":
            return _with_cuda_graphs(network, example)
        return _compile(network, example, "inductor" if backend == "auto" else backend, fingerprint(model))
    except Exception as error:  # of compilers, which raise anything
        if backend != "auto":
            raise RuntimeError(f"the back end {backend} fails on this model: {one_line(error)}") from error
        _logger.warning("not compiled, so slower than could be: %s", one_line(error))
        return Prepared("eager", network=network)


def _check_request(
    model: nn.Module, dtype: torch.dtype, example_input: torch.Tensor | None, backend: str
) -> torch.device:
    """Raise what `prepare` promises for what it cannot do; returns the device of the model."""
    if backend not in ("auto", *DTYPES):
        raise ValueError(f"backend must be one of auto, {', '.join(DTYPES)}, got {backend!r}")
    if dtype not in DTYPES["eager" if backend == "auto" else backend]:
        raise ValueError(f"the back end {backend} cannot compute in {dtype}")
    if backend not in ("auto", "eager") and example_input is None:
        raise ValueError(f"the back end {backend} compiles for a shape: got no example_input")
    if example_input is not None and (example_input.dim() != 4 or 0 in example_input.shape):
        raise ValueError(f"an image batch is (b, c, h, w), got an example_input of shape {tuple(example_input.shape)}")
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    if backend in ("onnxruntime", "openvino") and device.type != "cpu":
        raise ValueError(f"the back end {backend} is for models on a CPU here, got one on {device}")
    if absent := missing(*PACKAGES.get(backend, ())):
        raise RuntimeError(f"the back end {backend} needs a missing package: {pip_line(*absent)}")
    return device


def _can_compile(device: torch.device) -> bool:
    """Whether inductor is worth a try on a device; that a compiler is missing is logged."""
    if device.type == "cpu" and not has_compiler():
        _logger.warning("not compiled, so slower than could be: there is no C++ compiler (g++, clang++ or $CXX)")
        return False
    return device.type in ("cpu", "cuda")


@torch.no_grad()
def _with_cuda_graphs(network: Network, example: torch.Tensor) -> "Prepared":
    compiled = torch.compile(network, mode="reduce-overhead", dynamic=False)

    def run(x: torch.Tensor) -> Any:
        # CUDA graphs write the outputs of the next call to the same place
        return tree_map_only(torch.Tensor, torch.Tensor.clone, compiled(x))

    run(example)  # what fails must fail here
    return Prepared("inductor", network=network, run=run, shape=example.shape)


@torch.no_grad()
def _compile(network: Network, example: torch.Tensor, backend: str, sha256: str) -> "Prepared":
    folder = tempfile.TemporaryDirectory(prefix="convmlp-")
    program = write(backend, network, example, Path(folder.name))
    about = About(
        backend=backend,
        dtype=str(network.dtype).removeprefix("torch."),
        shape=[*example.shape],
        any_batch=bool(program.range_constraints),
        outputs=treespec_dumps(program.call_spec.out_spec),
        sha256=sha256,
        needs=this_machine() if backend == "inductor" else {},
    )
    prepared = _open(about, folder, network)
    prepared(example)  # what fails must fail here
    return prepared


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
        return _open(about, folder, None)
    except Exception as error:  # of runtimes, which raise anything
        raise CheckpointError(f"{path} cannot be loaded: {one_line(error)}") from error


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model: names, types, shapes and bytes of its parameters and buffers, and how it prints."""
    found = hashlib.sha256(repr(model).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _open(about: About, folder: "tempfile.TemporaryDirectory[str]", network: nn.Module | None) -> Prepared:
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
