"""The published models: ConvMLP-S, M and L, and where their weights are."""

import os
from typing import Any

import torch

from .model import VARIANTS, ConvMLP
from .variations import PURE_MLPS, build
from .weights import load_pretrained

__all__ = ["MIRRORS", "VARIANTS", "checkpoint_urls", "convmlp_l", "convmlp_m", "convmlp_s", "variant_of"]

MIRRORS = (
    "https://shi-labs.com/projects/convmlp/checkpoints/",
    "http://ix.cs.uoregon.edu/~alih/conv-mlp/checkpoints/",
)


def variant_of(name: str) -> str | None:
    """The variant that a timm name stands for: 'convmlp_s' of 'convmlp_s_classification.in1k'; None if not ours."""
    variant = name.partition(".")[0].removesuffix("_classification")
    variant = "pure_mlp_s" if variant == "pure_mlp" else variant
    return variant if variant in VARIANTS or variant in PURE_MLPS else None


def checkpoint_urls(variant: str, dataset: str = "imagenet") -> list[str]:
    """Where the published weights of a variant are: imagenet, cifar10, cifar100 or flowers102."""
    return [f"{mirror}{variant}_{dataset}.pth" for mirror in MIRRORS]


def convmlp_s(
    pretrained: bool | str | os.PathLike = False, progress: bool = False, classifier_head: bool = True, **kwargs: Any
) -> ConvMLP:
    """ConvMLP-S: 9.0 M parameters, 2.4 GMACs at 224x224.

    Args:
        pretrained: True for the published ImageNet-1k weights, or the path or URL of a checkpoint. It may differ
            from the model in classes (the head then starts afresh, which is logged), input channels, and head.
        progress: Show a progress bar while downloading.
        classifier_head: False for the bare backbone, see `ConvMLP`.
        **kwargs: Arguments of `ConvMLP`: num_classes, in_chans, drop_path_rate, ... and of `variations.build`.

    Raises:
        CheckpointError: the weights cannot be downloaded, read, or do not fit.
        TypeError: unknown keyword.
    """
    return _create("convmlp_s", pretrained, progress, classifier_head=classifier_head, **kwargs)


def convmlp_m(
    pretrained: bool | str | os.PathLike = False, progress: bool = False, classifier_head: bool = True, **kwargs: Any
) -> ConvMLP:
    """ConvMLP-M: 17.4 M parameters, 3.9 GMACs at 224x224. Arguments as for `convmlp_s`."""
    return _create("convmlp_m", pretrained, progress, classifier_head=classifier_head, **kwargs)


def convmlp_l(
    pretrained: bool | str | os.PathLike = False, progress: bool = False, classifier_head: bool = True, **kwargs: Any
) -> ConvMLP:
    """ConvMLP-L: 42.7 M parameters, 9.9 GMACs at 224x224. Arguments as for `convmlp_s`."""
    return _create("convmlp_l", pretrained, progress, classifier_head=classifier_head, **kwargs)


def _create(variant: str, pretrained: bool | str | os.PathLike, progress: bool, **kwargs: Any) -> ConvMLP:
    if not isinstance(pretrained, (bool, str, os.PathLike)):
        raise TypeError(f"pretrained must be True, False, a path or a URL, got {pretrained!r}")
    settings = {**VARIANTS[variant], **kwargs}
    if pretrained is False:
        return build(**settings)
    device = torch.get_default_device()
    with torch.device("meta"):  # to initialise what the file fills would take longer than to read it
        model = build(**settings)
    load_pretrained(model, checkpoint_urls(variant) if pretrained is True else pretrained, progress)
    return model if device.type == "meta" else model.to(device)  # on meta the weights would be lost again
