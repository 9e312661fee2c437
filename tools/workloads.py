"""The work that benchmark.py measures: inference, training steps, matrix products, loading of images."""

import argparse
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peers import IMG_SIZE
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.transforms import RandomResizedCrop

from convmlp import deploy
from convmlp.classification.loaders import count_workers, make_loader
from convmlp.classification.options import parse_options
from convmlp.classification.process import Process
from convmlp.classification.sources import open_source
from convmlp.common.classes import SPLITS
from convmlp.common.devices import autocast
from convmlp.common.errors import RunError, plural
from convmlp.use import info
from convmlp.use.classifier import open_any

BASE = ("eager", "float32")
LEARNING_RATE, WEIGHT_DECAY, EMA_DECAY = 5e-4, 0.05, 0.99996  # of the paper's recipe
LOADING = "-c convmlp_s_imagenet --batch-size 32"  # the published augmentation
SHORTEST_EPOCH = 200  # batches; at the start of an epoch the loading processes have nothing to do

Run = Callable[[], Any]
Measure = Callable[[float], list[float]]  # works for so many seconds, and tells how long each call took


@dataclass(frozen=True)
class Variant:
    """What a process measures: a model in a mode, a number format and a batch size, or another task without a model.

    The tasks are 'inference', 'training', 'products' (of matrices) and 'loading'.
    """

    task: str
    device: str
    threads: int
    model: str = ""
    mode: str = ""
    dtype: str = "float32"
    batch_size: int = 1
    img_size: int | None = None
    data: str = ""
    workers: int | None = None

    def __str__(self) -> str:
        return f"{self.model or self.task} {self.mode} {self.dtype}, batch {self.batch_size}"


def prepare(variant: Variant) -> tuple[Measure, dict[str, Any]]:
    """What measures a variant in this process, and what there is to say about it."""
    torch.set_num_threads(variant.threads)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    if variant.task == "loading":
        return prepare_loading(variant)
    if variant.device.startswith("cuda"):
        torch.cuda.set_device(variant.device)
    tasks = {"inference": prepare_inference, "training": prepare_training, "products": prepare_products}
    run, facts = tasks[variant.task](variant)
    run()
    from torch.utils.benchmark import Timer  # which says on standard error that there is no GPU

    statement = "run()" if variant.device == "cpu" else "run(); torch.accelerator.synchronize()"
    timer = Timer(statement, globals={"run": run, "torch": torch}, num_threads=variant.threads)

    def measure(seconds: float) -> list[float]:
        times = timer.blocked_autorange(min_run_time=seconds).times
        torch.cuda.empty_cache()  # for the others, whose turn it is
        return times

    return measure, facts


def peak_memory(device: str) -> float | None:
    """The most MiB that were allocated on a GPU, or that this process ever had."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # getrusage would count the process that started this one, too
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 2**10 if found else None


def prepare_products(variant: Variant) -> tuple[Run, dict[str, Any]]:
    """The product of two large square matrices."""
    side = 1024 if variant.device == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=variant.device).to(getattr(torch, variant.dtype))
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
def prepare_inference(variant: Variant) -> tuple[Run, dict[str, Any]]:
    """A model in one of its modes, and the largest difference of a logit from eager float32, over the largest logit."""
    model, x, facts = open_model(variant)
    model.requires_grad_(False)
    expected = model(x)
    forward = apply_mode(variant.mode, model, x, getattr(torch, variant.dtype))
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
    if mode == "amp":
        return partial(autocast(x.device, dtype)(model), x)
    if mode == "folded":
        model = deploy.fold_batchnorm(model)
    model, x = model.to(dtype), x.to(dtype)
    if mode in ("channels-last", "folded"):
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return partial(torch.compile(model) if mode == "compiled" else model, x)


def prepare_training(variant: Variant) -> tuple[Run, dict[str, Any]]:
    """A step of training: loss, gradients, AdamW and the moving average of the weights.

    'eager' is the way of 2021, which also looks at the loss after each step; 'channels-last', 'fused' (AdamW and
    average) and 'compiled' each add to the one before.
    """
    model, x, facts = open_model(variant)
    mode, dtype = variant.mode, getattr(torch, variant.dtype)
    model.train()
    is_fused = mode in ("fused", "compiled")
    if mode != "eager":
        model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    fastest: dict[str, Any] = {"fused": True} if is_fused else {"foreach": True}
    optimizer = create_optimizer_v2(model, "adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, **fastest)
    average = ModelEmaV3(model, decay=EMA_DECAY, foreach=is_fused)
    scaler = torch.amp.GradScaler(x.device.type, enabled=dtype == torch.float16)
    with torch.no_grad():
        targets = torch.rand_like(model(x)).softmax(1)
    loss_of = SoftTargetCrossEntropy()
    network = torch.compile(model) if mode == "compiled" else model

    def step() -> None:
        with autocast(x.device, None if dtype == torch.float32 else dtype):
            logits = network(x)
        loss = loss_of(logits.float(), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update(model)
        if not is_fused:
            loss.item()

    return step, facts


def loading_variants(device: str, options: argparse.Namespace, temporary: Path) -> list[Variant]:
    """Loading by the process itself, on one core, and by loading processes."""
    if not options.data:  # JPEG files as large as is usual in ImageNet, pieces of two photographs
        folder = temporary / "train" / "photographs"
        folder.mkdir(parents=True)
        torch.manual_seed(0)  # the same pieces in every run
        photographs, crop = load_sample_images().images, RandomResizedCrop((400, 500), (0.56, 1))
        for number in range(64):
            crop(Image.fromarray(photographs[number % 2])).save(folder / f"{number:02}.jpg", quality=95)
    common = {"img_size": options.img_size or IMG_SIZE, "data": options.data or str(temporary)}
    return [Variant("loading", device, 1, **common, workers=workers) for workers in (0, options.workers)]


def prepare_loading(variant: Variant) -> tuple[Measure, dict[str, Any]]:
    """Batches for training, from the files to normalised tensors on the device, without a model.

    The loading processes start for a turn and end with it: they would go on loading in the turns of others.
    """
    folder, split = Path(variant.data).absolute(), "train"
    if not any((folder / f"{name}{suffix}").exists() for name in SPLITS["train"] for suffix in ("", ".tar")):
        folder, split = folder.parent, folder.name  # its folders are the classes
    words = [] if variant.workers is None else ["--workers", str(variant.workers)]
    options = parse_options([*LOADING.split(), *words, "--train-split", split, str(folder)])
    source: Any = open_source(options, train=True)
    images, workers = len(source), count_workers(options)
    source.data.samples *= -(-SHORTEST_EPOCH * options.batch_size // images)
    size = [3, variant.img_size, variant.img_size]
    data_config: Any = {"input_size": size, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    process = Process(torch.device(variant.device))

    def batches() -> Iterator[None]:
        loader = make_loader(source, options, data_config, process, len(source.class_names), train=True)
        while True:
            loader.start(0)
            for _ in loader:
                if process.device.type == "cuda":
                    torch.cuda.synchronize()
                yield

    def measure(seconds: float) -> list[float]:
        """The mean time of a batch: they come in bursts, as many as there are loading processes."""
        waiting = batches()
        for _ in range(1 + 2 * workers):  # what was loaded ahead while the processes started
            next(waiting)
        count, start, now = 0, time.perf_counter(), 0.0
        while now < seconds or count < max(2, workers):
            next(waiting)
            count += 1
            now = time.perf_counter() - start
        waiting.close()
        return [now / count]

    names = {"model": "loading", "mode": plural(workers, "worker") if workers else "one core"}
    return measure, {**names, "images": images, "input_size": size, "batch_size": options.batch_size}
