"""What computes a prepared model: for each back end, how its file is written and how that file is run.

On a CPU a back end writes what it makes of a network into an empty folder and reads it from there, so that what is
saved is what runs.
"""

import copy
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map_only

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


class Network(nn.Module):
    """A model that computes in `dtype` and channels last, with float32 outputs."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model = model.to(dtype).to(memory_format=torch.channels_last).requires_grad_(False)
        self.dtype = dtype
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        outputs = self.model(x.to(dtype=self.dtype, memory_format=torch.channels_last))
        return tree_map_only(torch.Tensor, torch.Tensor.float, outputs)


def has_compiler() -> bool:
    """Whether inductor finds a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def write(backend: str, network: Network, example: torch.Tensor, folder: Path) -> ExportedProgram:
    """Compile a network into an empty folder; returns its graph."""
    if backend == "openvino":
        network = Network(copy.deepcopy(network.model), torch.float32)  # OpenVINO rounds by itself
    program = _capture(network, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _WRITERS[backend](program, folder)
    return program


def read(backend: str, dtype: torch.dtype, folder: Path) -> Run:
    """What a back end wrote, ready to run with as many threads as PyTorch has now.

    What it returns holds the model's outputs in order, not always nested as the model nests them.
    """
    return _READERS[backend](folder, dtype)


def _capture(network: Network, example: torch.Tensor) -> ExportedProgram:
    """The network as a graph for any number of images, or, where it cannot be had, for as many as the example has."""
    two = torch.cat([example[:1]] * 2)  # PyTorch takes a batch of one for a constant
    try:
        return torch.export.export(network, (two,), dynamic_shapes=({0: Dim("batch", min=1)},))
    except Exception:  # of any kind; what is wrong with the model itself fails again
        return torch.export.export(network, (example,))


def _write_inductor(program: ExportedProgram, folder: Path) -> None:
    """Ahead of time: no guards in Python, and Linear layers in oneDNN's kernels, also in float32."""
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(folder / "model.pt2"),
        inductor_configs={"freezing": True},  # weights are constants, so they can be packed
    )


def _read_inductor(folder: Path, dtype: torch.dtype) -> Run:
    path = str(folder / "model.pt2")
    try:  # without Python's loader, which looks for a compiler and takes seconds to import
        loader = torch._C._aoti.AOTIModelPackageLoader(path, "model", False, 1, -1)
    except TypeError:  # other arguments, of an older PyTorch
        return torch._inductor.aoti_load_package(path)
    return lambda x: loader.run([x])


def _write_onnx(program: ExportedProgram, folder: Path) -> None:
    free = ({0: "batch"},) if program.range_constraints else None
    path = folder / "model.onnx"
    torch.onnx.export(program, f=path, dynamic_shapes=free, dynamo=True, external_data=False, verbose=False)


def _read_onnx(folder: Path, dtype: torch.dtype) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(output) for output in session.run(None, {name: x.numpy()})]


def _write_openvino(program: ExportedProgram, folder: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(program), folder / "model.xml", compress_to_fp16=False)


def _read_openvino(folder: Path, dtype: torch.dtype) -> Run:
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.compile_model(folder / "model.xml", "CPU", settings)
    return lambda x: [torch.from_numpy(output) for output in compiled(x.numpy()).values()]


_WRITERS = {"inductor": _write_inductor, "onnxruntime": _write_onnx, "openvino": _write_openvino}
_READERS = {"inductor": _read_inductor, "onnxruntime": _read_onnx, "openvino": _read_openvino}
