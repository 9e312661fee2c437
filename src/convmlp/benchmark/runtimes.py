"""What the workers of the benchmark measure with onnxruntime and OpenVINO, without PyTorch in their memory."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from .worker import Calls


def _read_batch(spec: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    with np.load(Path(spec["folder"]) / "batch.npz") as batch:
        return batch["x"], batch["logits"]


def _difference(logits: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of a logit, over the largest logit."""
    smallest = np.finfo(np.float32).tiny
    difference = float(abs(logits.astype(np.float32) - expected).max() / max(abs(expected).max(), smallest))
    if not math.isfinite(difference):
        raise ValueError("its logits are not finite")
    return difference


def build_onnxruntime(spec: dict[str, Any]) -> Calls:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = spec["threads"]
    options.log_severity_level = 3
    path = str(Path(spec["folder"]) / "model.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x, expected = _read_batch(spec)

    def run() -> np.ndarray:
        return session.run(None, {"input": x})[0]

    about = {"version": onnxruntime.__version__, "difference": _difference(run(), expected)}
    return Calls(run, about)


def build_openvino(spec: dict[str, Any]) -> Calls:
    import openvino

    hint, capability = {"float32": ("f32", "FP32"), "bfloat16": ("bf16", "BF16"), "float16": ("f16", "FP16")}[
        spec["dtype"]
    ]
    core = openvino.Core()
    if capability not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError(f"OpenVINO does not have {spec['dtype']} on this CPU")
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": spec["threads"],
    }
    compiled = core.compile_model(str(Path(spec["folder"]) / "model.onnx"), "CPU", settings)
    request = compiled.create_infer_request()
    x, expected = _read_batch(spec)

    def run() -> np.ndarray:
        return request.infer({0: x}, share_inputs=True, share_outputs=True)[0]

    about = {"version": openvino.__version__, "difference": _difference(run(), expected)}
    return Calls(run, about)
