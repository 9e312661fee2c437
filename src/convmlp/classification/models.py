"""The model of a classification run, its starting weights, its loss and its optimizer."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.task import ClassificationTask, LogitDistillationTask
from torch import nn

from ..common.errors import CheckpointError, RunError
from ..timm_models import TimmModel, check_name, create_timm_model, has_fixed_size, load_weights, per_channel
from ..weights import read_checkpoint
from .loaders import create_mixup
from .process import Process

TEACHER: dict[str, Any] = {"initial_checkpoint": None, "drop": 0.0, "drop_path": None, "gp": None}
TEACHER |= {"grad_checkpointing": False, "model_kwargs": {}}
Task = ClassificationTask | LogitDistillationTask

FUSED_OPTIMIZERS = ("adam", "adamw", "sgd", "momentum", "nesterov")


def create_model(options: Namespace, process: Process, class_names: Sequence[str]) -> TimmModel:
    """The model of the options with its starting weights."""
    check_name("--model", options.model)
    settings: dict[str, Any] = {
        "num_classes": len(class_names),
        "in_chans": options.in_chans,
        "drop_rate": options.drop,
        "drop_path_rate": options.drop_path,
        "global_pool": options.gp,
    }
    clash = sorted(settings.keys() & options.model_kwargs)
    if clash:
        raise RunError(f"--model-kwargs {clash[0]}: that has an option of its own")
    if has_fixed_size(options.model):
        settings["img_size"] = options.img_size
    settings = {key: value for key, value in settings.items() if value is not None} | options.model_kwargs
    pretrained = options.pretrained and not options.initial_checkpoint
    try:
        with process.first_on_machine():
            model = create_timm_model(options.model, pretrained, progress=process.primary, **settings)
    except CheckpointError as error:
        raise RunError(f"{error}\nor start from random weights: --no-pretrained") from error
    if options.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except Exception as error:  # of models that are not ours
            raise RunError(f"--model {options.model}: {' '.join(str(error).split())}") from error
    if options.initial_checkpoint:
        path = options.initial_checkpoint
        load_weights(model, read_checkpoint(path), path, options.use_ema, class_names, new_head=True)
    return model


def resolve_data_settings(options: Namespace, model: TimmModel) -> dict[str, Any]:
    """Image size and normalisation, of the options or the model's; plain values, which the model is told."""
    config = resolve_data_config(vars(options), model=model)
    for key in ("mean", "std"):
        config[key] = per_channel(config[key], options.in_chans)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": config["mean"], "std": config["std"]}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


class _Float32Loss(nn.Module):
    """A loss of float32 logits: autocast on a CPU would compute it in bfloat16."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(logits.float(), targets)


def create_task(options: Namespace, model: nn.Module, process: Process, class_names: Sequence[str]) -> Task:
    """The model with its loss, and the teacher's if there is one."""
    device = process.device
    criterion = _Float32Loss(
        create_classification_loss(smoothing=options.smoothing, soft_targets=create_mixup(options) is not None)
    )
    if not options.kd_model:
        return ClassificationTask(model, criterion, device=device, verbose=False)
    check_name("--kd-model", options.kd_model)
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
        teacher.pretrained_cfg[key] = per_channel(teacher.pretrained_cfg[key], options.in_chans)
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
    has_fused = options.opt.lower() in FUSED_OPTIMIZERS and device.type in ("cuda", "cpu")
    fused: dict[str, Any] = {"fused": True} if has_fused else {}
    try:
        return create_optimizer_v2(model, **optimizer_kwargs(options), **fused)
    except (ValueError, AssertionError, TypeError) as error:
        raise RunError(f"--opt {options.opt}: {error}") from error
