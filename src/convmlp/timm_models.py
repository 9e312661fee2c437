"""Registers the ConvMLP models with timm: `import convmlp.timm_models`, then `timm.create_model('convmlp_s')`."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torchvision.datasets import Flowers102

from .common.errors import CheckpointError, RunError, suggest
from .model import ConvMLP
from .variations import PURE_MLPS
from .weights import adapt_state_dict, download, extract_state_dict, list_other_types, load_pretrained, shorten
from .zoo import MIRRORS, VARIANTS, checkpoint_urls

_logger = logging.getLogger(__name__)

SOURCES = ("local-dir:", "hf-hub:")

# An nn.Module with what timm sets on its models and nn.Module does not declare: pretrained_cfg, num_classes, ...
TimmModel = Any

# Settings of the fine-tuned checkpoints that differ from ImageNet's. torchvision knows the names of these classes from
# 0.22 on, and those of CIFAR only with its files.
_FINE_TUNED: dict[str, dict[str, Any]] = {
    "cifar10": dict(num_classes=10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "cifar100": dict(num_classes=100, mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)),
    "flowers102": dict(
        num_classes=102,
        mean=(0.4353, 0.3773, 0.2872),
        std=(0.2966, 0.2455, 0.2698),
        label_names=getattr(Flowers102, "classes", None),
    ),
}


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


def _published(variant: str, dataset: str = "imagenet", **kwargs: Any) -> dict[str, Any]:
    return _cfg(url=checkpoint_urls(variant, dataset)[0], **kwargs)


default_cfgs = generate_default_cfgs(
    {
        **{f"{v}.in1k": _published(v) for v in VARIANTS},
        **{
            f"{v}.in1k_ft_{dataset}": _published(v, dataset, crop_pct=1.0, **settings)
            for v in VARIANTS
            for dataset, settings in _FINE_TUNED.items()
        },
        **{f"{v}_classification.in1k": _published(v) for v in VARIANTS},
        **{v: _cfg(first_conv="tokenizer.projection") for v in (*PURE_MLPS, "pure_mlp")},
    }
)


def _fit(state_dict: dict[str, torch.Tensor], model: TimmModel) -> dict[str, torch.Tensor]:
    """Check the file against the model before timm's loader does, which would leave a mismatch at random values.

    timm also drops the head wherever its table, rather than the file, has another number of classes than the model.
    So the table is told what the file holds, and a checkpoint of one's own classes loads whole.
    """
    state_dict = extract_state_dict(state_dict)
    adapted = adapt_state_dict(state_dict, model)
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
    **kwargs: Any,
) -> ConvMLP:
    known = {**VARIANTS, **PURE_MLPS, "pure_mlp": PURE_MLPS["pure_mlp_s"]}
    settings = {**known[name.removesuffix("_classification")], "final_norm": True, **kwargs}
    if not settings.get("conv_stage", True):
        overlay = settings.get("pretrained_cfg_overlay") or {}
        settings["pretrained_cfg_overlay"] = {**overlay, "first_conv": "tokenizer.projection"}
    with nullcontext() if device is None else torch.device(device):
        model = build_model_with_cfg(
            ConvMLP,
            name,
            pretrained,
            pretrained_filter_fn=_fit,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
            **settings,
        )
    return model.to(dtype=dtype)


@register_model
def convmlp_s(pretrained: bool = False, **kwargs: Any) -> ConvMLP:
    """ConvMLP-S."""
    return _create("convmlp_s", pretrained, **kwargs)


@register_model
def convmlp_m(pretrained: bool = False, **kwargs: Any) -> ConvMLP:
    """ConvMLP-M."""
    return _create("convmlp_m", pretrained, **kwargs)


@register_model
def convmlp_l(pretrained: bool = False, **kwargs: Any) -> ConvMLP:
    """ConvMLP-L."""
    return _create("convmlp_l", pretrained, **kwargs)


@register_model
def convmlp_s_classification(pretrained: bool = False, **kwargs: Any) -> ConvMLP:
    """ConvMLP-S under the name of the reference's recipes."""
    return _create("convmlp_s_classification", pretrained, **kwargs)


@register_model
def convmlp_m_classification(pretrained: bool = False, **kwargs: Any) -> ConvMLP:
    """ConvMLP-M under the name of the reference's recipes."""
    return _create("convmlp_m_classification", pretrained, **kwargs)


@register_model
def convmlp_l_classification(pretrained: bool = False, **kwargs: Any) -> ConvMLP:
    """ConvMLP-L under the name of the reference's recipes."""
    return _create("convmlp_l_classification", pretrained, **kwargs)


@register_model
def pure_mlp(pretrained: bool = False, **kwargs: Any) -> ConvMLP:
    """The same as pure_mlp_s."""
    return _create("pure_mlp", pretrained, **kwargs)


@register_model
def pure_mlp_s(pretrained: bool = False, **kwargs: Any) -> ConvMLP:
    """The Pure-MLP baseline of ConvMLP-S; there are no published weights."""
    return _create("pure_mlp_s", pretrained, **kwargs)


@register_model
def pure_mlp_m(pretrained: bool = False, **kwargs: Any) -> ConvMLP:
    """The Pure-MLP baseline of ConvMLP-M; there are no published weights."""
    return _create("pure_mlp_m", pretrained, **kwargs)


@register_model
def pure_mlp_l(pretrained: bool = False, **kwargs: Any) -> ConvMLP:
    """The Pure-MLP baseline of ConvMLP-L; there are no published weights."""
    return _create("pure_mlp_l", pretrained, **kwargs)


# Any model of timm, by its name


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
    """timm's create_model with one-line errors; our published weights come from any of their mirrors.

    Raises:
        RunError: an unknown name, or settings that the model does not take.
        CheckpointError: the published weights cannot be had.
    """
    check_name(option, name)
    urls = [mirror + published_file(name) for mirror in MIRRORS] if pretrained and is_ours(name) else []
    if pretrained and not urls and not name.startswith(SOURCES) and not timm.is_model_pretrained(name):
        raise RunError(f"{option} {name}: there are no published weights of it, only a checkpoint of your own can do")
    if urls:
        download(urls, progress)
    try:
        model: TimmModel = timm.create_model(name, pretrained=pretrained and not urls, **settings)
    except CheckpointError:
        raise
    except Exception as error:  # of models that are not ours, in a hundred files
        _logger.debug("creating the model failed", exc_info=True)
        raise RunError(f"{option} {name}: {' '.join(str(error).split())[:300]}") from error
    if urls:
        load_pretrained(model, urls)
    return model


def check_name(option: str, name: str) -> None:
    """Make sure that timm knows a model, or offer the nearest one it knows."""
    if name.startswith(SOURCES):
        return
    if not timm.is_model(name):
        raise RunError(f"unknown {option} {name}{suggest(name, timm.list_models())}")
    tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
    if "." in name and name not in tags:
        raise RunError(f"unknown {option} {name}; there is {', '.join(tags) or 'no pretrained ' + name.split('.')[0]}")


def check_source(name: str, path: str) -> None:
    """A checkpoint alone does not make anything be fetched from elsewhere."""
    if name.startswith(SOURCES):
        raise RunError(f"{path} says that its model is {name}, which lies elsewhere: --model {name} allows that")


def is_ours(name: str) -> bool:
    """Whether a timm name is of a published ConvMLP."""
    return name.split(".")[0].removesuffix("_classification") in VARIANTS


def published_file(name: str) -> str:
    """The file name of a ConvMLP's published weights."""
    url = timm.get_pretrained_cfg_value(name, "url")
    assert isinstance(url, str)  # all of ours have one
    return url.rpartition("/")[2]


def load_weights(
    model: TimmModel,
    checkpoint: Any,
    path: str,
    use_ema: bool = True,
    class_names: Sequence[str] | None = None,
    new_head: bool = False,
) -> None:
    """Load a checkpoint that was read from `path`.

    Where its classes are not `class_names`, in number or by name, the head starts afresh if `new_head`, else it is an
    error. The normalisation that the checkpoint was trained with goes into the model's `pretrained_cfg`.
    """
    state_dict = extract_state_dict(checkpoint, use_ema, name=path)
    about: Any = checkpoint if isinstance(checkpoint, dict) else {}
    config, names = about.get("data_config"), about.get("class_names")
    for key in ("mean", "std"):
        values = config.get(key) if isinstance(config, Mapping) else None
        if values and isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values):
            model.pretrained_cfg = {**model.pretrained_cfg, key: values}

    classifier = model.pretrained_cfg["classifier"]
    weight = state_dict.get(f"{classifier}.weight")
    if (
        class_names is not None
        and weight is not None
        and weight.ndim > 0
        and (len(weight) != len(class_names) or (isinstance(names, list) and names != list(class_names)))
    ):
        message = f"{path} has {len(weight)} classes, the data {len(class_names)}"
        if len(weight) == len(class_names):
            message = f"{path} knows other classes ({', '.join(map(str, names[:3]))}, ...) than the data has"
        if not new_head:
            raise RunError(message)
        _logger.warning(f"{message}: the head starts afresh")
        own = model.state_dict()
        state_dict |= {key: own[key] for key in own if key.startswith(f"{classifier}.")}
    if isinstance(model, ConvMLP):
        state_dict = adapt_state_dict(state_dict, model, name=path)
    other_types = list_other_types(state_dict, model.state_dict())
    if other_types:
        raise CheckpointError(f"{path} does not fit the model: {shorten(other_types)}")
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model: {' '.join(str(error).split())[:400]}") from error
