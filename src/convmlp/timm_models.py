"""Registers the ConvMLP models with timm: `import convmlp.timm_models`, then `timm.create_model('convmlp_s')`."""

from contextlib import nullcontext
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torchvision.datasets import Flowers102

from .model import ConvMLP
from .zoo import PURE_MLPS, VARIANTS, adapt_state_dict, checkpoint_urls, extract_state_dict

__all__: list[str] = []

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
