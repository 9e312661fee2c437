"""The model of a classification run, its starting weights, its teacher, its optimizer and its schedule."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.data import resolve_data_config as resolve_by_timm
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, LogitDistillationTask
from torch import nn

from ..common.errors import CheckpointError, RunError, one_line, plural
from ..timm_models import TimmModel, check_name, create_timm_model, has_fixed_size, load_weights, per_channel
from ..weights import read_checkpoint
from .loaders import DataConfig
from .process import Process
from .settings import Images, Model, Options

_logger = logging.getLogger(__name__)

Task = ClassificationTask | LogitDistillationTask

FUSED_OPTIMIZERS = ("adam", "adamw", "sgd", "momentum", "nesterov")


def build_model(options: Model, images: Images, class_names: Sequence[str], process: Process) -> TimmModel:
    """The model of the options with its starting weights."""
    check_name("--model", options.model)
    settings: dict[str, Any] = {
        "num_classes": len(class_names),
        "in_chans": images.in_chans,
        "drop_rate": options.drop,
        "drop_path_rate": options.drop_path,
        "global_pool": options.gp,
    }
    refuse_own_options("--model-kwargs", options.model_kwargs, settings)
    if has_fixed_size(options.model):
        settings["img_size"] = images.img_size
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
            raise RunError(f"--model {options.model}: {one_line(error)}") from error
    if options.initial_checkpoint:
        path = options.initial_checkpoint
        load_weights(model, read_checkpoint(path), path, options.use_ema, class_names, new_head=True)
    return model


def refuse_own_options(flag: str, arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Make sure that the arguments given by name are not those that have an option of their own."""
    clash = sorted(settings.keys() & arguments)
    if clash:
        raise RunError(f"{flag} {clash[0]}: that has an option of its own")


def first_stages(model: TimmModel, count: int) -> list[nn.Module | nn.Parameter]:
    """The weights and modules of the first stages of a model: timm's coarse groups, which are the `parts` of ConvMLP.

    Raises:
        RunError: there are not so many, or the model does not tell its stages.
    """
    if not count:
        return []
    if not hasattr(model, "group_matcher"):
        raise RunError(f"--freeze {count}: {type(model).__name__} does not tell its stages")
    # In order from the input; what is in no stage, such as the head, comes last
    *stages, _ = group_parameters(model, model.group_matcher(coarse=True), return_values=True).values()
    if count > len(stages):
        raise RunError(f"--freeze {count}: the model has {plural(len(stages), 'stage')}")
    weights = {weight for stage in stages[:count] for weight in stage}
    owned = {module: {*module.parameters()} for module in model.modules()}
    return [*weights, *(module for module, own in owned.items() if own and own <= weights)]


def resolve_data_config(images: Images, model: TimmModel) -> DataConfig:
    """Image size and normalisation, of the options or else the model's; the model is given its normalisation."""
    config = resolve_by_timm(vars(images), model=model)
    for key in ("mean", "std"):
        config[key] = per_channel(config[key], images.in_chans)
    model.pretrained_cfg = {**model.pretrained_cfg, "mean": config["mean"], "std": config["std"]}
    plain: Any = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    data_config: DataConfig = plain
    return data_config


def build_task(
    options: Options, model: nn.Module, criterion: nn.Module, class_names: Sequence[str], process: Process
) -> Task:
    """The model with its loss, and the teacher's if there is one."""
    device = process.device
    if not options.kd_model:
        return ClassificationTask(model, criterion, device=device, verbose=False)
    teacher = _build_teacher(options.kd_model, options, class_names, process)
    return LogitDistillationTask(
        model,
        teacher.to(device),
        criterion,
        distill_loss_weight=options.kd_weight,
        temperature=options.kd_temperature,
        device=device,
        verbose=False,
    ).to(device)


def _build_teacher(name: str, options: Options, class_names: Sequence[str], process: Process) -> TimmModel:
    check_name("--kd-model", name)
    path = options.kd_checkpoint
    classes = timm.get_pretrained_cfg_value(name, "num_classes")
    if not path and classes != len(class_names):
        raise RunError(
            f"--kd-model {name} knows {classes} classes, the data {len(class_names)}: give a --kd-checkpoint of a "
            "teacher of the same classes"
        )
    teacher = build_model(Model(model=name, pretrained=not path), options, class_names, process)
    if path:
        load_weights(teacher, read_checkpoint(path), path, options.use_ema, class_names, new_head=False)
    for key in ("mean", "std"):
        teacher.pretrained_cfg[key] = per_channel(teacher.pretrained_cfg[key], options.in_chans)
    return teacher


def build_optimizer(options: Options, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of the options, fused where PyTorch has it."""
    has_fused = options.opt.lower() in FUSED_OPTIMIZERS and device.type in ("cuda", "cpu")
    fused: dict[str, Any] = {"fused": True} if has_fused else {}
    settings = optimizer_kwargs(options)
    refuse_own_options("--opt-kwargs", options.opt_kwargs, settings)
    try:
        return create_optimizer_v2(model, **fused | settings | options.opt_kwargs)
    except (ValueError, AssertionError, TypeError) as error:
        raise RunError(f"--opt {options.opt}: {error}") from error


def build_schedule(
    options: Options, metric: str, optimizer: torch.optim.Optimizer, updates_per_epoch: int
) -> tuple[Any, int]:
    """timm's learning rate scheduler, None for --sched none, and the epochs with those of the cool-down.

    Its rate changes with each update; that of plateau, which follows the metric, with each epoch.
    """
    warmup = 0 if options.sched == "none" else options.shortened_warmup
    if options.sched != "none" and warmup < options.warmup_epochs:
        _logger.warning(
            f"--warmup-epochs {options.warmup_epochs} is not shorter than --epochs {options.epochs}: the warm-up takes "
            f"{plural(warmup, 'epoch')}"
        )
    settings = scheduler_kwargs(options, decreasing_metric=metric == "loss") | {"warmup_epochs": warmup}
    settings |= {"step_on_epochs": options.sched == "plateau"}
    try:
        return create_scheduler_v2(optimizer, **settings, updates_per_epoch=updates_per_epoch)
    except ValueError as error:
        raise RunError(f"--sched {options.sched}: {error}") from error
