"""What the workers of the benchmark measure with PyTorch."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

from .. import deploy
from ..common.devices import autocast
from ..use.classifier import open_any
from ..use.info import measure as measure_cost
from .variants import BASE_LINE
from .worker import Calls

MATRIX_SIDES = {"cpu": 2048, "cuda": 8192, "mps": 4096}
SMALL_SIDE = 256
LEARNING_RATE, WEIGHT_DECAY, EMA_DECAY = 5e-4, 0.05, 0.99996  # of the paper's recipe
GPU_QUEUE = 0.05  # seconds of work that a GPU is given before it is waited for

Run = Callable[[], torch.Tensor]


def _run_on_mps(run: Callable[[], Any]) -> None:
    run()
    torch.mps.synchronize()


class DeviceCalls(Calls):
    """Calls on a device: timed by its own events on CUDA."""

    def __init__(self, run: Callable[[], Any], device: torch.device, about: dict[str, Any] | None = None):
        self.device = device
        super().__init__(run if device.type != "mps" else partial(_run_on_mps, run), about)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)

    def measure(self, seconds: float) -> list[float]:
        if self.device.type != "cuda":
            return super().measure(seconds)
        times: list[float] = []
        self.run()
        queued = 2
        while sum(times) < seconds or not times:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(queued + 1)]
            events[0].record()
            for event in events[1:]:
                self.run()
                event.record()
            torch.cuda.synchronize(self.device)
            times += [start.elapsed_time(end) / 1000 for start, end in pairwise(events)]
            queued = max(2, min(1000, int(GPU_QUEUE * len(times) / sum(times))))
        torch.cuda.empty_cache()  # for the others, whose turn it is
        return times

    def peak_memory(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def _set_up(spec: dict[str, Any]) -> torch.device:
    device = torch.device(spec["device"])
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.cuda.set_device(device)
    return device


def build_matmul(spec: dict[str, Any]) -> Calls:
    """The product of two large square matrices; smaller ones where a product would take longer than a second."""
    device = _set_up(spec)

    def product(side: int) -> Run:
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, spec["dtype"])) for _ in range(2))
        return partial(torch.mm, a, b, out=torch.empty_like(a))

    side = MATRIX_SIDES[device.type]
    seconds = min(DeviceCalls(product(SMALL_SIDE), device).measure(0))
    while side > SMALL_SIDE and seconds * (side / SMALL_SIDE) ** 3 > 1:
        side //= 2
    return DeviceCalls(product(side), device, {"side": side, "operations": 2 * side**3})


def open_network(spec: dict[str, Any], device: torch.device) -> tuple[nn.Module, torch.Tensor]:
    """The model of a variant in evaluation mode, and a batch of noise; both are the same in every process."""
    _set_up(spec)
    classifier = open_any(spec["model"], pretrained=False, device="cpu", img_size=spec["img_size"])
    for module in classifier.model.modules():
        # what does nothing as it is initialised: logits of zero would tell nothing about a mode
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            if not module.running_mean.any():
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(spec["batch_size"], *classifier.data_config["input_size"], generator=generator)
    return classifier.model.to(device), x.to(device)


def _cost(model: nn.Module, x: torch.Tensor, spec: dict[str, Any]) -> dict[str, Any]:
    """What the base line says for all: the size of a picture, and what it costs."""
    if (spec["mode"], spec["dtype"]) != BASE_LINE:
        return {}
    _, c, h, w = x.shape
    cost = measure_cost(model, (c, h, w))
    return {"macs": cost.macs, "parameters": cost.parameters, "input_size": [c, h, w]}


@torch.no_grad()
def build_inference(spec: dict[str, Any]) -> Calls:
    """A model in one of the modes that are PyTorch's."""
    device = torch.device(spec["device"])
    model, x = open_network(spec, device)
    model.requires_grad_(False)
    expected = model(x)
    about = _cost(model, x, spec)
    run = INFERENCE_MODES[spec["mode"]](model, x, getattr(torch, spec["dtype"]), about)
    del model

    def run_quietly() -> torch.Tensor:
        with torch.inference_mode():
            return run()

    about["difference"] = _difference(run_quietly().float(), expected)
    return DeviceCalls(run_quietly, device, about)


def _difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of a logit, over the largest logit."""
    smallest = torch.finfo(torch.float32).tiny
    difference = ((logits - expected).abs().max() / expected.abs().max().clamp(min=smallest)).item()
    if not math.isfinite(difference):
        raise ValueError("its logits are not finite")
    return difference


def _eager(model: nn.Module, x: torch.Tensor, dtype: torch.dtype, about: dict[str, Any]) -> Run:
    return partial(model.to(dtype), x.to(dtype))


def _amp(model: nn.Module, x: torch.Tensor, dtype: torch.dtype, about: dict[str, Any]) -> Run:
    def run() -> torch.Tensor:
        with autocast(x.device, dtype):
            return model(x)

    return run


def _channels_last(model: nn.Module, x: torch.Tensor, dtype: torch.dtype, about: dict[str, Any]) -> Run:
    layout = torch.channels_last
    return partial(model.to(dtype).to(memory_format=layout), x.to(dtype).contiguous(memory_format=layout))


def _folded(model: nn.Module, x: torch.Tensor, dtype: torch.dtype, about: dict[str, Any]) -> Run:
    return _channels_last(deploy.fold_batchnorm(model), x, dtype, about)


def _compiled(model: nn.Module, x: torch.Tensor, dtype: torch.dtype, about: dict[str, Any]) -> Run:
    return partial(torch.compile(model.to(dtype)), x.to(dtype))


def _prepared(model: nn.Module, x: torch.Tensor, dtype: torch.dtype, about: dict[str, Any]) -> Run:
    prepared = deploy.prepare(model, dtype=dtype, example_input=x)
    about["backend"] = prepared.backend
    return partial(prepared, x)


INFERENCE_MODES: dict[str, Callable[[nn.Module, torch.Tensor, torch.dtype, dict[str, Any]], Run]] = {
    "eager": _eager,
    "amp": _amp,
    "channels-last": _channels_last,
    "folded": _folded,
    "compiled": _compiled,
    "prepared": _prepared,
}


def build_training(spec: dict[str, Any]) -> Calls:
    """A step of training: loss, gradients, AdamW and the moving average of the weights.

    'eager' is the way of 2021, which also looks at the loss after each step; 'channels-last', 'fused' (AdamW and
    average) and 'compiled' each add to the one before.
    """
    device = torch.device(spec["device"])
    model, x = open_network(spec, device)
    mode, dtype = spec["mode"], getattr(torch, spec["dtype"])
    about = _cost(model, x, spec)
    model.train()
    is_fused = mode in ("fused", "compiled")
    if mode != "eager":
        model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    fastest: dict[str, Any] = {"fused": True} if is_fused else {"foreach": True}
    optimizer = create_optimizer_v2(model, "adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, **fastest)
    average = ModelEmaV3(model, decay=EMA_DECAY, foreach=is_fused)
    amp_dtype = None if dtype == torch.float32 else dtype
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    with torch.no_grad():
        targets = torch.rand_like(model(x)).softmax(1)
    loss_of = SoftTargetCrossEntropy()
    network = torch.compile(model) if mode == "compiled" else model

    def step() -> None:
        with autocast(device, amp_dtype):
            logits = network(x)
        loss = loss_of(logits.float(), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update(model)
        if not is_fused:
            loss.item()

    return DeviceCalls(step, device, about)


class _Written:
    """What an ONNX file is made by: there is nothing to measure."""

    def __init__(self, about: dict[str, Any]):
        self.about = about


@torch.no_grad()
def build_onnx_file(spec: dict[str, Any]) -> _Written:
    """Write a model for the runtimes: model.onnx, and x and logits in batch.npz, into the folder of the spec."""
    model, x = open_network(spec, torch.device("cpu"))
    model.requires_grad_(False)
    expected = model(x)
    folder, dtype = Path(spec["folder"]), getattr(torch, spec["dtype"])
    exported = torch.export.export(model.to(dtype), (x.to(dtype),))
    torch.onnx.export(
        exported,
        f=folder / "model.onnx",
        input_names=["input"],
        output_names=["logits"],
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    np.savez(folder / "batch.npz", x=x.to(dtype).numpy(), logits=expected.numpy())
    return _Written({})
