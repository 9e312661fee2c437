"""The work that benchmark.py measures: a model in one of its modes, or products of large matrices."""

import math
import os
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convmlp import deploy
from convmlp.common.errors import RunError, one_line
from convmlp.use import info
from convmlp.use.classifier import open_any

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in deploy.DTYPES["eager"]}
MODES = ("eager", "channels-last", "folded", "compiled", "prepared", "onnxruntime", "openvino")
BASE = ("eager", "float32")

_measured: dict[str, Any] = {}  # what this process measures, from `prepare` to `measure`


@dataclass(frozen=True)
class Variant:
    """What a process measures: a model in a mode, a number format and a batch size, or else matrix products."""

    device: str
    threads: int
    model: str = ""
    mode: str = ""
    dtype: str = "float32"
    batch_size: int = 1
    img_size: int | None = None

    def __str__(self) -> str:
        return f"{self.model} {self.mode} {self.dtype}, batch {self.batch_size}" if self.model else "matrix products"


def be_quiet() -> None:
    """Leave standard output and error to the main process."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def prepare(variant: Variant) -> dict[str, Any]:
    """Make a variant ready in this process; returns what there is to say about it.

    Raises:
        RunError: whatever went wrong, in a line.
    """
    torch.set_num_threads(variant.threads)
    torch.backends.cudnn.benchmark = True
    before, started = peak_memory("cpu"), time.perf_counter()
    try:
        if variant.device.startswith("cuda"):
            torch.cuda.set_device(variant.device)
        run, facts = prepare_inference(variant) if variant.model else prepare_products(variant)
        run()
    except Exception as error:  # of compilers, drivers and models, which raise anything
        kind = "" if isinstance(error, RunError) else f"{type(error).__name__}: "
        raise RunError(kind + one_line(error, 250)) from None
    from torch.utils.benchmark import Timer  # which says on standard error that there is no GPU

    statement = "run()" if variant.device == "cpu" else "run(); torch.accelerator.synchronize()"
    timer = Timer(statement, globals={"run": run, "torch": torch}, num_threads=variant.threads)
    _measured.update(timer=timer, device=variant.device)
    return {**facts, "before_mb": before, "prepared_in_s": time.perf_counter() - started}


def measure(seconds: float) -> tuple[list[float], float | None]:
    """Run what was prepared for so long: how long each call took, in seconds, and the peak memory until now."""
    times = _measured["timer"].blocked_autorange(min_run_time=seconds).times
    torch.cuda.empty_cache()  # for the others, whose turn it is
    return times, peak_memory(_measured["device"])


def peak_memory(device: str) -> float | None:
    """The most MiB that were allocated on a GPU, or that this process ever had."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # getrusage would count the process that started this one, too
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 2**10 if found else None


def prepare_products(variant: Variant) -> tuple[partial[torch.Tensor], dict[str, Any]]:
    """The product of two large square matrices."""
    side = 1024 if variant.device == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=variant.device).to(DTYPES[variant.dtype])
    return partial(torch.mm, a, b, out=torch.empty_like(a)), {"operations": 2 * side**3}


def open_model(variant: Variant) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    """The model of a variant in evaluation mode, a batch of noise, and what an image costs in the base.

    Model and noise are the same in every process.
    """
    torch.manual_seed(0)
    classifier = open_any(variant.model, pretrained=False, device="cpu", img_size=variant.img_size)
    for module in classifier.model.modules():
        # What does nothing as it is initialised: logits of zero would say nothing about a mode
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            if not module.running_mean.any():
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    model, size = classifier.model.to(variant.device), classifier.data_config["input_size"]
    x = torch.randn(variant.batch_size, *size, generator=torch.Generator().manual_seed(1)).to(variant.device)
    is_base = (variant.mode, variant.dtype) == BASE
    return model, x, {"macs": info.measure(model, size).macs, "input_size": list(size)} if is_base else {}


@torch.no_grad()
def prepare_inference(variant: Variant) -> tuple[Any, dict[str, Any]]:
    """A model in one of its modes, and the largest difference of a logit from eager float32, over the largest logit."""
    model, x, facts = open_model(variant)
    model.requires_grad_(False)
    expected = model(x)
    forward = apply_mode(variant.mode, model, x, DTYPES[variant.dtype])
    if isinstance(forward.func, deploy.Prepared):
        facts["backend"] = forward.func.backend
    run = torch.inference_mode()(forward)
    difference = ((run().float() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
    if not math.isfinite(difference):
        raise RunError("its logits are not finite")
    return run, {**facts, "difference": difference}


def apply_mode(mode: str, model: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> partial[torch.Tensor]:
    """The model as a mode runs it, with the batch that it runs on."""
    if mode in ("prepared", "onnxruntime", "openvino"):
        backend = "auto" if mode == "prepared" else mode
        return partial(deploy.prepare(model, dtype=dtype, example_input=x, backend=backend), x)
    if mode == "folded":
        model = deploy.fold_batchnorm(model)
    model, x = model.to(dtype), x.to(dtype)
    if mode in ("channels-last", "folded"):
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return partial(torch.compile(model) if mode == "compiled" else model, x)
