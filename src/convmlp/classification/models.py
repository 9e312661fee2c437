"""The model of a classification run, its starting weights, its loss and its optimizer."""

import logging
from argparse import Namespace
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.loss import create_classification_loss
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import nn

from .. import timm_models  # noqa: F401  (registers our models with timm)
from ..model import ConvMLP
from ..zoo import (
    CheckpointError,
    adapt_state_dict,
    checkpoint_urls,
    download,
    extract_state_dict,
    load_pretrained,
    read_checkpoint,
)
from .loaders import create_mixup
from .options import RunError, suggest
from .process import Process

_logger = logging.getLogger(__name__)

FUSED_OPTIMIZERS = ("adam", "adamw", "sgd", "momentum", "nesterov")


def create_model(options: Namespace, process: Process) -> nn.Module:
    """The model of the options with its starting weights."""
    if not timm.is_model(options.model):
        raise RunError(f"unknown --model {options.model}{suggest(options.model, timm.list_models())}")
    settings = {"drop_path_rate": options.drop_path, "global_pool": options.gp}
    try:
        model = timm.create_model(
            options.model,
            num_classes=options.num_classes,
            in_chans=options.in_chans,
            drop_rate=options.drop,
            **{key: value for key, value in settings.items() if value is not None},
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise RunError(f"--model {options.model}: {error}") from error
    if options.initial_checkpoint:
        load_weights(model, options.initial_checkpoint, options.use_ema, new_head=True)
    elif options.pretrained and isinstance(model, ConvMLP):
        urls = checkpoint_urls(options.model.split(".")[0].removesuffix("_classification"))
        if process.local_rank == 0:
            download(urls, progress=process.primary)
        process.barrier()
        load_pretrained(model, urls)
    elif options.pretrained:
        from timm.models import load_pretrained as load_timm_pretrained

        load_timm_pretrained(model, num_classes=options.num_classes, in_chans=options.in_chans)
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def load_weights(model: nn.Module, path: str, use_ema: bool, new_head: bool) -> None:
    """Load a checkpoint; a head of other classes starts afresh if `new_head`, else it is an error."""
    state_dict = extract_state_dict(read_checkpoint(path), use_ema, name=path)
    classifier = model.pretrained_cfg["classifier"]
    weight = state_dict.get(f"{classifier}.weight")
    if weight is not None and len(weight) != model.num_classes and not new_head:
        raise RunError(f"{path} has {len(weight)} classes, the data {model.num_classes}")
    if isinstance(model, ConvMLP):
        model.load_state_dict(adapt_state_dict(state_dict, model, name=path))
        return
    if weight is not None and len(weight) != model.num_classes:
        own = model.state_dict()
        state_dict |= {key: own[key] for key in own if key.startswith(f"{classifier}.")}
        _logger.warning(f"{path} has {len(weight)} classes, the data {model.num_classes}: the head starts afresh")
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model: {' '.join(str(error).split())[:400]}") from error


def resolve_data_settings(options: Namespace, model: nn.Module) -> dict[str, Any]:
    """Image size and normalisation, of the options or the model's; plain values."""
    config = resolve_data_config(vars(options), model=model)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": config["mean"], "std": config["std"]}  # for a teacher
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


class _Float32Loss(nn.Module):
    """A loss of float32 logits: autocast on a CPU would compute it in bfloat16."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.loss(logits.float(), targets)


def create_task(options: Namespace, model: nn.Module, device: torch.device) -> TrainingTask:
    criterion = _Float32Loss(
        create_classification_loss(smoothing=options.smoothing, soft_targets=create_mixup(options) is not None)
    )
    if not options.kd_model:
        return ClassificationTask(model, criterion, device=device, verbose=False)
    if not timm.is_model(options.kd_model):
        raise RunError(f"unknown --kd-model {options.kd_model}{suggest(options.kd_model, timm.list_models())}")
    teacher = timm.create_model(
        options.kd_model,
        pretrained=not options.kd_checkpoint,
        num_classes=options.num_classes,
        in_chans=options.in_chans,
    )
    if options.kd_checkpoint:
        load_weights(teacher, options.kd_checkpoint, options.use_ema, new_head=False)
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
    fused = {"fused": True} if options.opt.lower() in FUSED_OPTIMIZERS and device.type in ("cuda", "cpu") else {}
    try:
        return create_optimizer_v2(model, **optimizer_kwargs(options), **fused)
    except (ValueError, AssertionError, TypeError) as error:
        raise RunError(f"--opt {options.opt}: {error}") from error
