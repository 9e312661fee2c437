"""What `convmlp benchmark` compares: models, modes, number formats, batch sizes; and what of it a machine can do."""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch

from ..common.devices import choose_device, count_cores, resolve_amp_dtype
from ..common.errors import RunError, suggest
from ..timm_models import check_name
from ..use.classifier import LARGEST, open_any
from ..use.info import OURS, PUBLISHED

INFERENCE, TRAINING = "inference", "training"
BASE_LINE = ("eager", "float32")
DTYPES = ("float32", "bfloat16", "float16")

# In inference each for itself; in training each adds to the one before
MODES = {
    INFERENCE: ("eager", "amp", "channels-last", "folded", "compiled", "prepared", "onnxruntime", "openvino"),
    TRAINING: ("eager", "channels-last", "fused", "compiled"),
}
BATCH_SIZES = {  # of a CPU or not
    (INFERENCE, True): (1, 8),
    (INFERENCE, False): (1, 128),
    (TRAINING, True): (16,),
    (TRAINING, False): (128,),
}
PACKAGES = {
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}

# Top-1 in per cent on ImageNet-1k at 224 px, by timm's names. Sources: results/results-imagenet.csv of
# huggingface/pytorch-image-models at 0173a139a2c6; for resnet50.a1 and both ConvNeXt, which are there at 288 px, the
# comparison tables in the model cards of timm's ResNets and of convnextv2_atto.fcmae_ft_in1k
PEERS_PUBLISHED = {
    "mixer_b16_224.goog_in21k_ft_in1k": 76.60,
    "resnet50.a1_in1k": 80.38,
    "resnet50.tv_in1k": 76.13,
    "poolformer_s12.sail_in1k": 77.23,
    "poolformer_s24.sail_in1k": 80.30,
    "resmlp_12_224.fb_in1k": 76.65,
    "resmlp_24_224.fb_in1k": 79.37,
    "convnext_atto.d2_in1k": 75.66,
    "convnext_femto.d1_in1k": 77.45,
    "efficientnet_b0.ra_in1k": 77.69,
}
# Of the two ResNet-50 the one that was trained as long as the others
PEERS = tuple(name.partition(".")[0] for name in PEERS_PUBLISHED if name != "resnet50.tv_in1k")
PUBLISHED_SIZE = 224


@dataclass(frozen=True)
class Variant:
    """A model in one mode and number format, with so many images at once."""

    task: str
    model: str
    mode: str
    dtype: str
    batch_size: int


@dataclass(frozen=True)
class Plan:
    """What to measure: groups of variants that take turns, the base line of each first, and what was left out, why."""

    task: str
    device: str
    threads: int
    img_size: int | None
    rounds: int
    seconds: float
    groups: list[list[Variant]]
    left_out: list[str] = field(default_factory=list)

    @property
    def variants(self) -> list[Variant]:
        return [variant for group in self.groups for variant in group]

    @property
    def dtypes(self) -> list[str]:
        return [dtype for dtype in DTYPES if any(variant.dtype == dtype for variant in self.variants)]

    def settings(self) -> dict[str, Any]:
        """For a worker: what all variants have in common."""
        return {"device": self.device, "threads": self.threads, "img_size": self.img_size}

    def spec(self, variant: Variant) -> dict[str, Any]:
        return {**self.settings(), **asdict(variant)}


def make_plan(
    models: Sequence[str],
    task: str = INFERENCE,
    *,
    modes: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    batch_sizes: Sequence[int] | None = None,
    img_size: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    rounds: int = 5,
    seconds: float = 1.0,
) -> Plan:
    """What to measure, after making sure that it can be.

    Args:
        models: timm names, or checkpoints.
        task: 'inference' or 'training'.
        modes: Of `MODES`; by default all that this machine can do.
        dtypes: Of `DTYPES`; by default float32, bfloat16 where the device has it, on CUDA also float16.
        batch_sizes: By default 1 and 8 on a CPU, 1 and 128 on a GPU; in training 16 and 128.
        img_size: Pixels; by default each model's own.
        device: 'auto', 'cuda', 'mps', 'cpu', ...
        threads: By default what PyTorch takes.
        rounds: Turns that each variant takes.
        seconds: Length of a turn.

    Raises:
        RunError: a name that is not known, or something that this machine cannot do.
    """
    chosen = choose_device(device)
    on_cpu = chosen.type == "cpu"
    if threads and threads > count_cores():
        raise RunError(f"--threads {threads} is more than this machine has: {count_cores()}")
    if img_size is not None and not 32 <= img_size <= LARGEST:
        raise RunError(f"--img-size lies between 32 and {LARGEST}, got {img_size}")
    _check_known("--modes", modes or (), MODES[task])
    _check_known("--dtypes", dtypes or (), DTYPES)
    for model in dict.fromkeys(models):
        _check_model(model, img_size)
    for mode in modes or ():
        _check_packages(mode)
    if chosen.type == "cuda" and "bfloat16" in (dtypes or ()) and not torch.cuda.is_bf16_supported():
        raise RunError(f"--dtypes bfloat16: {torch.cuda.get_device_name(chosen)} does not have it")

    wanted = [
        (mode, dtype)
        for mode in modes or _offered_modes(task, chosen)
        for dtype in dtypes or _offered_dtypes(task, chosen)
    ]
    reasons = {pair: _unfit(task, *pair, chosen) for pair in dict.fromkeys(wanted)}
    left_out = _explain(reasons)
    fit = dict.fromkeys([BASE_LINE, *(pair for pair, reason in reasons.items() if not reason)])
    if modes is None and on_cpu and task == INFERENCE:
        left_out += [f"{mode}: pip install {' '.join(missing)}" for mode in PACKAGES if (missing := _missing(mode))]
    if not any(reason is None for reason in reasons.values()):
        raise RunError(f"nothing is left to compare: {'; '.join(left_out)}")
    groups = [
        [Variant(task, model, mode, dtype, batch_size) for mode, dtype in fit]
        for model in dict.fromkeys(models)
        for batch_size in dict.fromkeys(batch_sizes or BATCH_SIZES[task, on_cpu])
    ]
    threads = threads or torch.get_num_threads()
    return Plan(task, str(chosen), threads, img_size, rounds, seconds, groups, left_out)


def _check_known(option: str, names: Iterable[str], known: Sequence[str]) -> None:
    joined = ", ".join(known)
    for name in names:
        if name not in known:
            raise RunError(f"unknown {option} {name}{suggest(name, known) or f'; there are {joined}'}")


def _check_model(model: str, img_size: int | None) -> None:
    if timm.is_model(model.partition(".")[0]) and not Path(model).exists():
        check_name("--model", model)
    else:
        open_any(model, pretrained=False, device="cpu", img_size=img_size)


def _missing(mode: str) -> list[str]:
    return [package for package in PACKAGES.get(mode, ()) if importlib.util.find_spec(package) is None]


def _check_packages(mode: str) -> None:
    missing = _missing(mode)
    if missing:
        raise RunError(f"--modes {mode} needs a missing package: pip install {' '.join(missing)}")


def _offered_modes(task: str, device: torch.device) -> list[str]:
    modes = [mode for mode in MODES[task] if not _missing(mode)]
    if device.type != "cpu":
        return [mode for mode in modes if mode not in PACKAGES]
    return [mode for mode in modes if mode != "amp"]  # which is the reference's way on a GPU


def _offered_dtypes(task: str, device: torch.device) -> list[str]:
    if device.type == "cuda":
        return [dtype for dtype in DTYPES if dtype != "bfloat16" or torch.cuda.is_bf16_supported()]
    native = resolve_amp_dtype("auto", device)
    return ["float32", *(["bfloat16"] if native == torch.bfloat16 else [])]


def _explain(reasons: Mapping[tuple[str, str], str | None]) -> list[str]:
    """A line for each reason that leaves out a mode and number format."""
    pairs: dict[str, list[str]] = {}
    for (mode, dtype), reason in reasons.items():
        if reason:
            pairs.setdefault(reason, []).append(f"{mode} {dtype}")
    return [f"{', '.join(names)}: {reason}" for reason, names in pairs.items()]


def _unfit(task: str, mode: str, dtype: str, device: torch.device) -> str | None:
    """Why a mode does not go together with a number format or a device."""
    if mode in PACKAGES and device.type != "cpu":
        return f"it is measured on CPUs alone, not on {device.type}"
    if mode == "amp" and dtype == "float32":
        return "mixed precision is of 16 bits"
    if mode == "onnxruntime" and dtype == "bfloat16":
        return "it has no convolutions in bfloat16"
    if task == TRAINING and dtype == "float16" and device.type != "cuda":
        return "PyTorch scales gradients for it on CUDA alone"
    return None


def is_ours(model: str) -> bool:
    return _family(model) in OURS


def _family(model: str) -> str:
    return model.removesuffix(".in1k").removesuffix("_classification")


def published_top1(model: str) -> float | None:
    """The published accuracy of a model, in per cent on ImageNet-1k at 224 px; of a name without tag, timm's choice."""
    if _family(model) in PUBLISHED:
        return PUBLISHED[_family(model)]["ImageNet"]
    cfg = timm.get_pretrained_cfg(model) if timm.is_model(model.partition(".")[0]) else None
    return PEERS_PUBLISHED.get(f"{cfg.architecture}.{cfg.tag}") if cfg else None
