"""Models made ready for inference."""

import logging
import platform
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only, treespec_dumps

from ..common.errors import one_line
from ..common.packages import missing, pip_line
from .backends import DTYPES, PACKAGES, Network, has_compiler, write
from .files import About, this_machine
from .folding import fold_batchnorm
from .prepared import Prepared, fingerprint, open_folder

_logger = logging.getLogger(__name__)


def prepare(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    example_input: torch.Tensor | None = None,
    calibration: Iterable[torch.Tensor] | None = None,
    backend: str = "auto",
) -> Prepared:
    """A fast copy of a model for inference, called as the model is: (b, c, h, w) in, the model's outputs in float32.

    BatchNorm is folded, weights are of `dtype`, maps lie channels last. Given an example, the copy is compiled for
    its shape, on a CPU with any number of images; this takes some ten seconds, and `Prepared.save` keeps the result.
    Images of other shapes run as well, uncompiled. docs/performance.md has measurements.

    Args:
        model: Any model of one image batch; it stays as it is. The copy lives on its device.
        dtype: What to compute in. float32 differs from the model by rounding, below 1e-5 of the largest output;
            bfloat16 and float16 by about 1e-2 and 2e-3 of it. int8 is for x86 CPUs and takes an example, the back
            end inductor and torchao; layers stay float32 until the outputs for the calibration images differ by at
            most `int8.TOLERANCE` of their norm. `about` names them.
        example_input: Images of the shape that is to be fast.
        calibration: For int8: batches of images such as the model will see, of the shape of the example but for
            their number, some hundreds of images in all.
        backend: 'eager' (PyTorch as it is), 'inductor' (compiled by PyTorch: ahead of time on a CPU, which takes a
            C++ compiler; with CUDA graphs on a GPU), 'onnxruntime' or 'openvino' (on a CPU, where installed).
            'auto' takes inductor where an example is given and it works, else eager; the attribute `backend` of
            what is returned tells which.

    Raises:
        ValueError: an unknown back end, one that cannot do `dtype`, that the device does not have or that needs an
            example, or an example or calibration that are no image batches.
        RuntimeError: a back end named explicitly, or int8, that is not installed or fails.
    """
    if dtype == torch.int8 and backend == "auto":
        backend = "inductor"
    device = _check_request(model, dtype, example_input, backend)
    batches = _check_calibration(dtype, example_input, calibration)
    network = Network(fold_batchnorm(model), torch.float32 if dtype == torch.int8 else dtype)
    if backend == "eager" or example_input is None or (backend == "auto" and not _can_compile(device)):
        return Prepared("eager", network=network)
    # a new tensor: one made in inference mode would fail in the compiler
    example = torch.empty(example_input.shape, device=device).copy_(example_input)
    try:
        if device.type == "cuda":
            return _with_cuda_graphs(network, example)
        sha256 = fingerprint(model)
        return _compile(network, example, "inductor" if backend == "auto" else backend, sha256, batches)
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
    if dtype == torch.int8:
        _check_int8(device)
    return device


def _check_int8(device: torch.device) -> None:
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        raise ValueError(f"int8 is for x86 CPUs, got a model on {device} of {platform.machine()}")
    if absent := missing("torchao"):
        raise RuntimeError(f"int8 needs a missing package: {pip_line(*absent)}")
    if not has_compiler():
        raise RuntimeError("int8 needs a C++ compiler (g++, clang++ or $CXX)")


def _check_calibration(
    dtype: torch.dtype, example: torch.Tensor | None, calibration: Iterable[torch.Tensor] | None
) -> list[torch.Tensor]:
    """The batches to calibrate on, in float32; raises ValueError for what cannot be one."""
    if dtype != torch.int8 or example is None:
        if calibration is not None:
            raise ValueError(f"calibration is for int8, got it with {dtype}")
        return []
    if calibration is None:
        raise ValueError("int8 is calibrated on images: got no calibration")
    batches = [*calibration]
    if not batches:
        raise ValueError("int8 is calibrated on images: got an empty calibration")
    for batch in batches:
        if not isinstance(batch, torch.Tensor) or batch.shape[1:] != example.shape[1:] or not len(batch):
            got = f"{(*batch.shape,)}" if isinstance(batch, torch.Tensor) else type(batch).__name__
            raise ValueError(f"a calibration batch is (b, {', '.join(map(str, example.shape[1:]))}), got {got}")
    return [torch.empty(batch.shape).copy_(batch) for batch in batches]


def _can_compile(device: torch.device) -> bool:
    """Whether inductor is worth a try on a device; that a compiler is missing is logged."""
    if device.type == "cpu" and not has_compiler():
        _logger.warning("not compiled, so slower than could be: there is no C++ compiler (g++, clang++ or $CXX)")
        return False
    return device.type in ("cpu", "cuda")


@torch.no_grad()
def _with_cuda_graphs(network: Network, example: torch.Tensor) -> Prepared:
    compiled = torch.compile(network, mode="reduce-overhead", dynamic=False)

    def run(x: torch.Tensor) -> Any:
        # CUDA graphs write the outputs of the next call to the same place
        return tree_map_only(torch.Tensor, torch.Tensor.clone, compiled(x))

    run(example)  # what fails must fail here
    return Prepared("inductor", network=network, run=run, shape=example.shape)


@torch.no_grad()
def _compile(
    network: Network, example: torch.Tensor, backend: str, sha256: str, calibration: list[torch.Tensor]
) -> Prepared:
    folder = tempfile.TemporaryDirectory(prefix="convmlp-")
    about = About(backend, str(network.dtype).removeprefix("torch."), [*example.shape], sha256=sha256)
    compiled: nn.Module = network
    if calibration:
        from . import int8

        compiled, float_layers = int8.quantise(network, calibration)
        about = replace(about, dtype="int8", float_layers=[name.removeprefix("model.") for name in float_layers])
    program = write(backend, compiled, example, Path(folder.name))
    about = replace(
        about,
        any_batch=bool(program.range_constraints),
        outputs=treespec_dumps(program.call_spec.out_spec),
        needs=this_machine() if backend == "inductor" else {},
    )
    prepared = open_folder(about, folder, network)
    prepared(example)  # what fails must fail here
    if calibration:
        difference = int8.difference(prepared, calibration, [network(x) for x in calibration])
        if difference > int8.TOLERANCE:  # though what was quantised did not before it was compiled
            raise ValueError(f"int8 changes the outputs by {difference:.1%}")
        prepared.about = replace(about, difference=difference)
        _logger.info("int8: outputs differ by %.1f %%; float stay: %s", 100 * difference, about.float_layers or "none")
    return prepared
