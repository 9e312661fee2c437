"""Models made ready for inference: `prepare` for speed, `fold_batchnorm` alone for what goes to a file."""

import copy
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import tree_map_only

from .common.errors import one_line
from .common.packages import missing, pip_line

_logger = logging.getLogger(__name__)

Run = Callable[[torch.Tensor], Any]

# What each back end can compute in
DTYPES = {
    "eager": (torch.float32, torch.bfloat16, torch.float16),
    "inductor": (torch.float32, torch.bfloat16, torch.float16),
    "onnxruntime": (torch.float32,),
    "openvino": (torch.float32, torch.bfloat16),
}

# What each back end needs besides PyTorch
PACKAGES = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",)}


def prepare(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    example_input: torch.Tensor | None = None,
    backend: str = "auto",
) -> "Prepared":
    """A fast copy of a model for inference, called as the model is: (b, c, h, w) in, the model's outputs in float32.

    BatchNorm is folded, weights are of `dtype`, maps lie channels last. Given an example, the copy is compiled for
    its shape, which takes some ten seconds; images of other shapes run as well, uncompiled. docs/performance.md has
    measurements.

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
    network = _Network(fold_batchnorm(model), dtype)
    if backend == "eager" or example_input is None or (backend == "auto" and not _can_compile(device)):
        return Prepared(network, "eager")
    # a new tensor: one made in inference mode would fail in the compiler
    example = torch.empty(example_input.shape, device=device).copy_(example_input)
    try:
        return Prepared(network, *_compile(network, example, "inductor" if backend == "auto" else backend))
    except Exception as error:  # of compilers, which raise anything
        if backend != "auto":
            raise RuntimeError(f"the back end {backend} fails on this model: {one_line(error)}") from error
        _logger.warning("not compiled, so slower than could be: %s", one_line(error))
        return Prepared(network, "eager")


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


class Prepared(nn.Module):
    """What `prepare` returns. `backend` names what computes images of `shape`; others are left to eager PyTorch."""

    def __init__(self, network: nn.Module, backend: str, run: Run | None = None, shape: torch.Size | None = None):
        super().__init__()
        self.network = network
        self.backend = backend
        self.shape = shape
        self._run = run
        self._warned = False
        self.eval()

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> Any:
        """(b, c, h, w), of any floating type -> the model's outputs, in float32."""
        if self._run is None or self.shape is None:
            return self.network(x)
        if x.shape == self.shape:
            return self._run(x.float().contiguous())
        if not self._warned:
            self._warned = True
            _logger.warning(
                "images of shape %s are not those this was compiled for, %s: slower", tuple(x.shape), tuple(self.shape)
            )
        return self.network(x)

    def train(self, mode: bool = True) -> "Prepared":
        if mode:
            raise RuntimeError("a prepared model is for inference alone: train the model it was made of")
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"backend={self.backend}, shape={self.shape and tuple(self.shape)}"


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, with each BatchNorm that follows a convolution folded into that convolution.

    Folded are neighbours in an `nn.Sequential`, which are all that ConvMLP has; the BatchNorm becomes an identity, so
    that indices stay. Logits differ from those of the model by rounding, below 1e-5 of the largest in float32.
    """
    model = copy.deepcopy(model).eval()
    for sequential in [*model.modules()]:
        if not isinstance(sequential, nn.Sequential) or type(sequential).forward is not nn.Sequential.forward:
            continue
        for i, (conv, norm) in enumerate(pairwise(sequential)):
            # nobody knows what else a subclass does: timm's have an activation, or standardise their weights
            if type(conv) is nn.Conv2d and type(norm) is nn.BatchNorm2d and norm.track_running_stats:
                sequential[i], sequential[i + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity().eval()
    return model


class _Network(nn.Module):
    """A model that computes in `dtype` and channels last, with float32 outputs."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = model.to(dtype).to(memory_format=torch.channels_last).requires_grad_(False)
        self.dtype = dtype
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        outputs = self.model(x.to(dtype=self.dtype, memory_format=torch.channels_last))
        return tree_map_only(torch.Tensor, torch.Tensor.float, outputs)


def _can_compile(device: torch.device) -> bool:
    """Whether inductor is worth a try on a device; that a compiler is missing is logged."""
    if device.type == "cpu" and not any(
        shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")
    ):
        _logger.warning("not compiled, so slower than could be: there is no C++ compiler (g++, clang++ or $CXX)")
        return False
    return device.type in ("cpu", "cuda")


@torch.no_grad()
def _compile(network: _Network, example: torch.Tensor, backend: str) -> tuple[str, Run, torch.Size]:
    run = {"inductor": _inductor, "onnxruntime": _onnxruntime, "openvino": _openvino}[backend](network, example)
    run(example)  # what fails must fail here
    return backend, run, example.shape


def _inductor(network: _Network, example: torch.Tensor) -> Run:
    """On a CPU ahead of time: no guards in Python, and Linear layers in oneDNN's kernels, also in float32."""
    if example.device.type == "cuda":
        compiled = torch.compile(network, mode="reduce-overhead", dynamic=False)
        # CUDA graphs write the outputs of the next call to the same place
        return lambda x: tree_map_only(torch.Tensor, torch.Tensor.clone, compiled(x))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = torch._inductor.aoti_compile_and_package(
            torch.export.export(network, (example,)),
            package_path=str(Path(folder, "model.pt2")),
            inductor_configs={"freezing": True},  # weights are constants, so they can be packed
        )
        return torch._inductor.aoti_load_package(package)


def _onnxruntime(network: _Network, example: torch.Tensor) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        torch.onnx.export(network, (example,), path, dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: _to_tensors(session.run(None, {name: x.numpy()}))


def _openvino(network: _Network, example: torch.Tensor) -> Run:
    import openvino

    plain = _Network(copy.deepcopy(network.model), torch.float32)  # OpenVINO rounds by itself
    compiled = openvino.compile_model(
        openvino.convert_model(torch.export.export(plain, (example,))),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "bf16" if network.dtype == torch.bfloat16 else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    return lambda x: _to_tensors(compiled(x.numpy()).values())


def _to_tensors(outputs: Iterable[Any]) -> Any:
    """What a back end in NumPy gives, as the model gives it: one output alone, several in a list."""
    tensors = [torch.from_numpy(output) for output in outputs]
    return tensors[0] if len(tensors) == 1 else tensors
