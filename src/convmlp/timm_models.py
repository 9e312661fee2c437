"""Registers the ConvMLP models with timm: `import convmlp.timm_models`, then `timm.create_model('convmlp_s')`."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torchvision.datasets import Flowers102

from .common.configs import config_folder
from .common.errors import CheckpointError, RunError, one_line, plural, suggest
from .model import ConvMLP
from .variations import PURE_MLPS, build
from .weights import adapt_state_dict, download, extract_state_dict, list_other_types, read_checkpoint, shorten
from .zoo import VARIANTS, checkpoint_urls, variant_of

_logger = logging.getLogger(__name__)

SOURCES = ("local-dir:", "hf-hub:")

# An nn.Module with what timm sets on its models and nn.Module does not declare: pretrained_cfg, num_classes, ...
TimmModel = Any


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "tokenizer.block.0",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2109.04454",
        "paper_name": "ConvMLP: Hierarchical Convolutional MLPs for Vision",
        "origin_url": "https://github.com/SHI-Labs/Convolutional-MLPs",
        **kwargs,
    }


@cache
def _differences(dataset: str) -> dict[str, Any]:
    """What timm's table says otherwise than for ImageNet: the classes, and how images are normalised."""
    if dataset == "imagenet":
        return {}
    config = yaml.safe_load((config_folder() / f"classification/_base_/{dataset}.yml").read_text(encoding="utf-8"))
    names = getattr(Flowers102, "classes", None) if dataset == "flowers102" else None  # from torchvision 0.22 on
    return dict(
        num_classes=config["num_classes"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop_pct=1.0,
        label_names=names,
    )


_TAGS = {"imagenet": "in1k", **{name: f"in1k_ft_{name}" for name in ("cifar10", "cifar100", "flowers102")}}

# By the address that timm's tables have, which is that of the first mirror: what `checkpoint_urls` takes
_PUBLISHED = {checkpoint_urls(variant, dataset)[0]: (variant, dataset) for variant in VARIANTS for dataset in _TAGS}

default_cfgs = generate_default_cfgs(
    {
        **{
            f"{variant}.{_TAGS[dataset]}": _cfg(url=url, **_differences(dataset))
            for url, (variant, dataset) in _PUBLISHED.items()
        },
        **{f"{variant}_classification.in1k": _cfg(url=checkpoint_urls(variant)[0]) for variant in VARIANTS},
        **{variant: _cfg(first_conv="tokenizer.projection") for variant in (*PURE_MLPS, "pure_mlp")},
    }
)


def _fit(state_dict: dict[str, torch.Tensor], model: TimmModel) -> dict[str, torch.Tensor]:
    """Check the file against the model before timm's loader does, which would leave a mismatch at random values.

    timm also drops the head wherever its table, rather than the file, has another number of classes than the model.
    So the table is told what the file holds, and a checkpoint of one's own classes loads whole.
    """
    state_dict = extract_state_dict(state_dict)
    adapted = adapt_state_dict(state_dict, model, name=model.pretrained_cfg.get("file") or "the checkpoint")
    first_conv = f"{model.pretrained_cfg['first_conv']}.weight"
    adapted[first_conv] = state_dict[first_conv]  # input channels are timm's to adapt
    if "head.weight" in state_dict:  # timm's loader goes on with this very dict
        model.pretrained_cfg["num_classes"] = len(state_dict["head.weight"])
    return adapted


def _create(
    name: str,
    pretrained: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> ConvMLP:
    settings = {**{**VARIANTS, **PURE_MLPS}[str(variant_of(name))], "final_norm": True, **kwargs}
    overlay = {**(settings.pop("pretrained_cfg_overlay", None) or {})}
    if not settings.get("conv_stage", True):
        overlay["first_conv"] = "tokenizer.projection"
    cfg = resolve_pretrained_cfg(name, settings.get("pretrained_cfg"), overlay)
    if pretrained and cfg.url in _PUBLISHED and not (cfg.file or cfg.state_dict or cfg.hf_hub_id):
        folder = Path(settings["cache_dir"]) if settings.get("cache_dir") else None
        path = download(checkpoint_urls(*_PUBLISHED[cfg.url]), progress, folder=folder)  # from any of the mirrors
        read_checkpoint(path)  # timm would not notice flipped bits
        overlay["file"] = str(path)
    with nullcontext() if device is None else torch.device(device):
        model = build_model_with_cfg(
            build,
            name,
            pretrained,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=_fit,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
            **settings,
        )
    return model.to(dtype=dtype)


def _register(name: str, description: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> ConvMLP:
        return _create(name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = description
    globals()[name] = register_model(create)


for _variant in VARIANTS:
    _title = f"ConvMLP-{_variant[-1].upper()}"
    _register(_variant, f"{_title}.")
    _register(f"{_variant}_classification", f"{_title} under the name of the reference's recipes.")
    _baseline = f"The Pure-MLP baseline of {_title}; there are no published weights."
    _register(_variant.replace("conv", "pure_"), _baseline)
_register("pure_mlp", "The same as pure_mlp_s.")


def has_fixed_size(name: str) -> bool:
    """Whether a timm model is built for one image size."""
    cfg = timm.get_pretrained_cfg(name) if not name.startswith(SOURCES) else None
    return bool(cfg and cfg.fixed_input_size)


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """As many values as channels, if need be their mean."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def layer_names(name: str) -> tuple[str, str]:
    """The names of a timm model's head and first convolution; of several heads the first."""
    cfg = timm.get_pretrained_cfg(name) if not name.startswith(SOURCES) else None
    layers = (cfg.classifier or "", cfg.first_conv or "") if cfg else ("head", "")
    head, first_conv = (layer if isinstance(layer, str) else layer[0] for layer in layers)
    return head, first_conv


def create_timm_model(
    name: str, pretrained: bool = False, progress: bool = False, option: str = "--model", **settings: Any
) -> TimmModel:
    """timm's create_model with one-line errors.

    Raises:
        RunError: an unknown name, or settings that the model does not take.
        CheckpointError: the published weights cannot be had.
    """
    check_name(option, name)
    if pretrained and not name.startswith(SOURCES) and not timm.is_model_pretrained(name):
        raise RunError(f"{option} {name}: there are no published weights; pass a checkpoint of your own")
    if variant_of(name):
        settings["progress"] = progress
    try:
        return timm.create_model(name, pretrained=pretrained, **settings)
    except CheckpointError:
        raise
    except Exception as error:  # of models that are not ours, in a hundred files
        _logger.debug("creating the model failed", exc_info=True)
        raise RunError(f"{option} {name}: {one_line(error)}") from error


def check_name(option: str, name: str) -> None:
    """Make sure that timm knows a model, or offer the nearest one it knows."""
    if name.startswith(SOURCES):
        return
    if not timm.is_model(name):
        raise RunError(f"unknown {option} {name}{suggest(name, timm.list_models())}")
    architecture, dot, _ = name.partition(".")
    tags = timm.list_pretrained(f"{architecture}.*")
    if dot and name not in tags:
        raise RunError(f"unknown {option} {name}; there is {', '.join(tags) or 'no pretrained ' + architecture}")


def check_source(name: str, path: str) -> None:
    """Make sure that a checkpoint alone does not make anything be fetched from elsewhere."""
    if name.startswith(SOURCES):
        raise RunError(f"{path} says that its model is {name}, which lies elsewhere: --model {name} allows that")


def load_weights(
    model: TimmModel,
    checkpoint: Any,
    path: str,
    use_ema: bool = True,
    class_names: Sequence[str] | None = None,
    new_head: bool = False,
) -> None:
    """Load a checkpoint that was read from `path`; its normalisation goes into the model's `pretrained_cfg`.

    Args:
        model: Any model of timm.
        checkpoint: A state_dict, or a training checkpoint.
        path: For messages.
        use_ema: Prefer the averaged weights where there are some.
        class_names: Those of the data, if they matter.
        new_head: Where the classes of the checkpoint differ, in number or by name, start the head afresh.

    Raises:
        RunError: the classes differ, without `new_head`.
        CheckpointError: the weights do not fit.
    """
    state_dict = extract_state_dict(checkpoint, use_ema, name=path)
    about = checkpoint if isinstance(checkpoint, Mapping) else {}
    model.pretrained_cfg = {**model.pretrained_cfg, **_normalisation(about)}
    classifier = model.pretrained_cfg["classifier"]
    difference = _other_classes(state_dict.get(f"{classifier}.weight"), about.get("class_names"), class_names)
    if difference and not new_head:
        raise RunError(f"{path} {difference}")
    if difference:
        _logger.warning(f"{path} {difference}: the head starts afresh")
        own = model.state_dict()
        state_dict |= {key: own[key] for key in own if key.startswith(f"{classifier}.")}
    if isinstance(model, ConvMLP):
        state_dict = adapt_state_dict(state_dict, model, name=path)
    if other_types := list_other_types(state_dict, model.state_dict()):
        raise CheckpointError(f"{path} does not fit the model: {shorten(other_types)}")
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model: {one_line(error, 400)}") from error


def _normalisation(about: Mapping[str, Any]) -> dict[str, Any]:
    """The mean and std of a training checkpoint, as far as they are numbers."""
    config = about.get("data_config")
    values = {key: config.get(key) for key in ("mean", "std")} if isinstance(config, Mapping) else {}
    return {
        key: value
        for key, value in values.items()
        if value and isinstance(value, (list, tuple)) and all(isinstance(number, (int, float)) for number in value)
    }


def _other_classes(weight: torch.Tensor | None, names: Any, wanted: Sequence[str] | None) -> str:
    """How the classes of a head differ from the wanted ones, in words, or ''."""
    if wanted is None or weight is None or weight.ndim == 0:
        return ""
    if len(weight) != len(wanted):
        return f"has {plural(len(weight), 'class')}, the data {len(wanted)}"
    if isinstance(names, list) and names != list(wanted):
        return f"knows other classes ({', '.join(map(str, names[:3]))}, ...) than the data has"
    return ""
