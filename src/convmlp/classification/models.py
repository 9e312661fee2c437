"""The model of a classification run, its starting weights, its loss and its optimizer."""

import logging
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import nn

from .. import timm_models  # noqa: F401  (registers our models with timm)
from ..errors import RunError, suggest
from ..model import ConvMLP
from ..zoo import (
    MIRRORS,
    VARIANTS,
    CheckpointError,
    adapt_state_dict,
    download,
    extract_state_dict,
    load_pretrained,
    read_checkpoint,
)
from .loaders import create_mixup
from .process import Process

_logger = logging.getLogger(__name__)

TEACHER = {"initial_checkpoint": None, "drop": 0.0, "drop_path": None, "gp": None, "grad_checkpointing": False}
FUSED_OPTIMIZERS = ("adam", "adamw", "sgd", "momentum", "nesterov")


def create_model(options: Namespace, process: Process, class_names: Sequence[str]) -> nn.Module:
    """The model of the options with its starting weights."""
    _check_name("--model", options.model)
    ours = _is_ours(options.model)
    pretrained = options.pretrained and not options.initial_checkpoint
    settings = {"drop_path_rate": options.drop_path, "global_pool": options.gp}
    if timm.get_pretrained_cfg_value(options.model, "fixed_input_size"):
        settings["img_size"] = options.img_size
    try:
        with process.first_on_machine():
            if pretrained and ours:
                urls = [mirror + _published_file(options.model) for mirror in MIRRORS]
                download(urls, progress=process.primary)
            model = timm.create_model(
                options.model,
                pretrained=pretrained and not ours,
                num_classes=len(class_names),
                in_chans=options.in_chans,
                drop_rate=options.drop,
                **{key: value for key, value in settings.items() if value is not None},
            )
        if options.grad_checkpointing:
            model.set_grad_checkpointing()
    except CheckpointError as error:
        raise RunError(f"{error}\nor start from random weights: --no-pretrained") from error
    except Exception as error:  # of models that are not ours, in a hundred files
        _logger.debug("creating the model failed", exc_info=True)
        raise RunError(f"--model {options.model}: {' '.join(str(error).split())}") from error
    if options.initial_checkpoint:
        path = options.initial_checkpoint
        load_weights(model, read_checkpoint(path), path, options.use_ema, class_names, new_head=True)
    elif pretrained and ours:
        load_pretrained(model, urls)
    return model


def _check_name(option: str, name: str) -> None:
    if not timm.is_model(name):
        raise RunError(f"unknown {option} {name}{suggest(name, timm.list_models())}")
    tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
    if "." in name and name not in tags:
        raise RunError(f"unknown {option} {name}; there is {', '.join(tags) or 'no pretrained ' + name.split('.')[0]}")


def _is_ours(name: str) -> bool:
    return name.split(".")[0].removesuffix("_classification") in VARIANTS


def _published_file(name: str) -> str:
    return timm.get_pretrained_cfg(name).url.rpartition("/")[2]


def load_weights(
    model: nn.Module, checkpoint: Any, path: str, use_ema: bool, class_names: Sequence[str], new_head: bool
) -> None:
    """Load a checkpoint that was read from `path`.

    Where its classes are not `class_names`, in number or by name, the head starts afresh if `new_head`, else it is an
    error. The normalisation that the checkpoint was trained with goes into the model's `pretrained_cfg`.
    """
    state_dict = extract_state_dict(checkpoint, use_ema, name=path)
    about = checkpoint if isinstance(checkpoint, dict) else {}
    for key in ("mean", "std"):
        if (about.get("data_config") or {}).get(key):
            model.pretrained_cfg = {**model.pretrained_cfg, key: about["data_config"][key]}

    classifier = model.pretrained_cfg["classifier"]
    weight = state_dict.get(f"{classifier}.weight")
    if weight is not None and (
        len(weight) != len(class_names) or about.get("class_names", class_names) != list(class_names)
    ):
        message = f"{path} has {len(weight)} classes, the data {len(class_names)}"
        if len(weight) == len(class_names):
            message = f"{path} knows other classes ({', '.join(about['class_names'][:3])}, ...) than the data has"
        if not new_head:
            raise RunError(message)
        _logger.warning(f"{message}: the head starts afresh")
        own = model.state_dict()
        state_dict |= {key: own[key] for key in own if key.startswith(f"{classifier}.")}
    if isinstance(model, ConvMLP):
        state_dict = adapt_state_dict(state_dict, model, name=path)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model: {' '.join(str(error).split())[:400]}") from error


def resolve_data_settings(options: Namespace, model: nn.Module) -> dict[str, Any]:
    """Image size and normalisation, of the options or the model's; plain values, which the model is told."""
    config = resolve_data_config(vars(options), model=model)
    for key in ("mean", "std"):
        config[key] = _per_channel(config[key], options.in_chans)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": config["mean"], "std": config["std"]}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels


class _Float32Loss(nn.Module):
    """A loss of float32 logits: autocast on a CPU would compute it in bfloat16."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(logits.float(), targets)


def create_task(options: Namespace, model: nn.Module, process: Process, class_names: Sequence[str]) -> TrainingTask:
    """The model with its loss, and the teacher's if there is one."""
    device = process.device
    criterion = _Float32Loss(
        create_classification_loss(smoothing=options.smoothing, soft_targets=create_mixup(options) is not None)
    )
    if not options.kd_model:
        return ClassificationTask(model, criterion, device=device, verbose=False)
    _check_name("--kd-model", options.kd_model)
    classes = timm.get_pretrained_cfg_value(options.kd_model, "num_classes")
    if not options.kd_checkpoint and classes != options.num_classes:
        raise RunError(
            f"--kd-model {options.kd_model} knows {classes} classes, the data {options.num_classes}: give a "
            "--kd-checkpoint of a teacher of the same classes"
        )
    teacher = create_model(
        Namespace(**vars(options) | TEACHER | {"model": options.kd_model, "pretrained": not options.kd_checkpoint}),
        process,
        class_names,
    )
    if options.kd_checkpoint:
        path = options.kd_checkpoint
        load_weights(teacher, read_checkpoint(path), path, options.use_ema, class_names, new_head=False)
    for key in ("mean", "std"):
        teacher.pretrained_cfg[key] = _per_channel(teacher.pretrained_cfg[key], options.in_chans)
    return LogitDistillationTask(
        model,
        teacher.to(device),
        criterion,
        distill_loss_weight=options.kd_weight,
        temperature=options.kd_temperature,
        device=device,
        verbose=False,
    ).to(device)


def create_optimizer(options: Namespace, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the options, fused where PyTorch has it."""
    fused = {"fused": True} if options.opt.lower() in FUSED_OPTIMIZERS and device.type in ("cuda", "cpu") else {}
    try:
        return create_optimizer_v2(model, **optimizer_kwargs(options), **fused)
    except (ValueError, AssertionError, TypeError) as error:
        raise RunError(f"--opt {options.opt}: {error}") from error
