"""Recipes for one's own images: the settings that fit the data at hand, where nobody has set them."""

import copy
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import fields, replace
from statistics import median
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

from ..common.devices import autocast, resolve_amp_dtype
from ..common.errors import RunError, one_line, plural
from ..timm_models import create_timm_model, has_fixed_size
from .groups import flag_of
from .loaders import DataConfig
from .options import parse_options
from .process import Process
from .settings import Augmentation, Optimizer, Options, Schedule
from .sources import Source

_logger = logging.getLogger(__name__)

SIDES = (32, 48, 64, 96, 128, 160, 192, 224)  # pixels that a model may see
SAMPLE = 200  # images whose sizes are looked at
UPDATES_PER_EPOCH = 16  # at least, so that few images make small batches
LARGEST_BATCH = {"cpu": 64, "mps": 64, "cuda": 256}  # of all processes; larger ones are no faster


class Recipe(NamedTuple):
    """A way of training that adapts to the data; docs/training.md tells what its numbers were measured on."""

    effort: float  # the epochs are this over the square root of the number of images
    most_epochs: int
    lr: float  # for a batch of 64; the rate grows with the square root of the batch. 0: there are no steps
    settings: dict[str, Any]


# What a probe, which augments nothing and has no steps, cannot use
NOT_PROBED = {each.name for group in (Schedule, Optimizer, Augmentation) for each in fields(group)}
NOT_PROBED |= {"balanced_sampling", "freeze", "drop", "drop_path", "grad_checkpointing", "skip_nonfinite"}
NOT_PROBED -= {"batch_size", "validation_batch_size"}

LIGHT: dict[str, Any] = {"scale": [0.7, 1.0], "color_jitter": 0.2}  # augmentation
RECIPES = {
    "finetune": Recipe(800, 50, 3e-4, {**LIGHT, "pretrained": True, "layer_decay": 0.8}),
    "probe": Recipe(0, 1, 0, {"pretrained": True}),
    "scratch": Recipe(1600, 100, 1e-3, {**LIGHT, "pretrained": False, "mixup": 0.2}),
}


def apply_recipe(
    options: Options, argv: list[str], source: Any, process: Process, kept: dict[str, Any] | None
) -> Options:
    """The options of a call with what --recipe makes of the training images in place of the defaults.

    A run that goes on has the settings that it kept.

    Raises:
        RunError: no image can be read, or an option does not go with a probe.
    """
    if kept:
        if options.recipe == "probe" != kept.get("recipe"):
            raise RunError("--recipe probe begins a run; --initial-checkpoint FILE lets it take the weights of another")
        return replace(parse_options(argv, base=kept), resume=options.resume, overwrite=options.overwrite)
    name, side = process.on_primary(lambda: (_choose_recipe(options, argv), _median_side(source)))
    settings = _first_settings(name, options, len(source), side, process)
    settings |= _later_settings(name, parse_options(argv, base=settings), process)
    chosen = parse_options(argv, base=settings)
    unused = NOT_PROBED if name == "probe" else set()
    undisturbed = parse_options([], base=settings)
    for key in sorted(unused):
        if getattr(chosen, key) != getattr(undisturbed, key):
            raise RunError(f"{flag_of(key)} does not go with --recipe probe, which fits the head in one go")
    values = {key: getattr(chosen, key) for key in settings if key not in unused}
    shown = (f"{key} {value:.2g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())
    _logger.info(
        f"recipe {name} for {plural(len(source), 'training image')} of {side} px (the median side):\n"
        f"  {', '.join(shown)}\n  each is an option: --epochs N, --img-size PX, ..."
    )
    return replace(chosen, resume=options.resume, overwrite=options.overwrite)


def _choose_recipe(options: Options, argv: Sequence[str]) -> str:
    """What `auto` stands for: finetune, or scratch where there are no weights to start from."""
    if options.recipe != "auto":
        return str(options.recipe)
    if "--no-pretrained" in argv:
        return "scratch"
    if options.initial_checkpoint:
        return "finetune"
    try:
        create_timm_model(options.model, pretrained=True)
    except RunError as error:
        _logger.warning(
            f"the published weights of {options.model} cannot be had: training from scratch, which takes more images "
            f"and more time; --initial-checkpoint FILE starts from weights of yours\n  ({one_line(error, 150)})"
        )
        return "scratch"
    return "finetune"


def _median_side(source: Source) -> int:
    """The median of the shorter sides of some images, in pixels."""
    sides = []
    for index in range(0, len(source), max(1, len(source) // SAMPLE)):
        try:
            sides.append(min(source.load(index)[0].size))
        except Exception:  # of image decoders; training names what it cannot read
            continue
    if not sides:
        raise RunError(f"not one of the training images could be read, such as {source.name(0)}")
    return int(median(sides))


def _first_settings(name: str, options: Options, n_images: int, side: int, process: Process) -> dict[str, Any]:
    recipe = RECIPES[name]
    fitting = 2 ** int(math.log2(max(1, n_images / UPDATES_PER_EPOCH)))
    batch_size = max(8, min(LARGEST_BATCH[process.device.type], fitting))
    settings = {
        "epochs": min(recipe.most_epochs, max(5, round(recipe.effort / math.sqrt(n_images)))),
        "batch_size": max(2, batch_size // process.world_size),
        "img_size": next((size for size in SIDES if size >= side), SIDES[-1]),
        "warmup_epochs": 0,
        **recipe.settings,
    }
    others = {"mixup"} if options.multi_label else set()
    others |= {"img_size"} if has_fixed_size(options.model) else set()
    return {key: value for key, value in settings.items() if key not in others}


def _later_settings(name: str, options: Options, process: Process) -> dict[str, Any]:
    """What follows from the first settings, those of the user among them."""
    images = options.batch_size * options.grad_accum_steps * process.world_size
    lr = RECIPES[name].lr * math.sqrt(images / 64)
    later: dict[str, Any] = {"warmup_epochs": min(options.epochs - 1, max(1, options.epochs // 10))}
    later |= {"lr": lr, "min_lr": lr / 100} if lr else {}
    if options.img_size and options.img_size < 96:
        later["crop_pct"] = 1.0  # small images have no margin to cut off
    return later


def fit_into_memory(options: Options, model: nn.Module, data_config: DataConfig, process: Process) -> Options:
    """The options with the batch halved until a training step fits, on every process, and as many images an update.

    Raises:
        RunError: not even two images fit, or an odd number of images does not.
    """
    batch_size = options.batch_size
    while not all(process.gather(_fits(batch_size, options, model, data_config, process.device))):
        if batch_size < 4 or batch_size % 2:  # half of it would make other updates
            raise RunError(
                f"the memory of {process.device} is too small for {batch_size} images of "
                f"{data_config['input_size'][-1]} px: --img-size PX, --batch-size N, or --grad-checkpointing"
            )
        batch_size //= 2
    if batch_size == options.batch_size:
        return options
    steps = options.grad_accum_steps * options.batch_size // batch_size
    _logger.info(
        f"batches of {options.batch_size} do not fit into the memory of {process.device}: --batch-size {batch_size} "
        f"--grad-accum-steps {steps} makes the same updates"
    )
    return replace(options, batch_size=batch_size, grad_accum_steps=steps)


def _fits(batch_size: int, options: Options, model: nn.Module, data_config: DataConfig, device: torch.device) -> bool:
    """Whether a step with this batch can be computed beside what AdamW keeps for each weight."""
    amp = resolve_amp_dtype(options.amp_dtype, device) if options.amp else None
    try:
        if device.type == "cpu" and batch_size * _bytes_per_image(model, data_config, amp) > _free_bytes():
            return False  # to try it would make the system end some process, perhaps this one
        _try_step(copy.deepcopy(model).train(), torch.zeros(batch_size, *data_config["input_size"], device=device), amp)
    except RuntimeError as error:  # PyTorch has a class of its own for GPUs only
        if not isinstance(error, torch.OutOfMemoryError) and "allocate" not in str(error):
            raise
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def _bytes_per_image(model: nn.Module, data_config: DataConfig, amp_dtype: torch.dtype | None) -> float:
    """What a training step keeps for the gradients of each image, and once more for what it computes in passing."""
    images, kept = 2, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    trial = copy.deepcopy(model).train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _try_step(trial, torch.zeros(images, *data_config["input_size"]), amp_dtype)
    for weight in trial.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    return 2 * sum(kept.values()) / images


def _free_bytes() -> float:
    """The share of this process in the memory that this machine has left."""
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _try_step(model: nn.Module, images: torch.Tensor, amp_dtype: torch.dtype | None) -> None:
    moments = [torch.empty_like(weight) for weight in model.parameters() for _ in range(2)]  # noqa: F841
    with autocast(images.device, amp_dtype):
        loss = model(images).float().sum()
    loss.backward()
