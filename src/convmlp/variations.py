"""Variations of a finished ConvMLP: convolutions switched off, down to Pure-MLP, and dilated maps."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .layers import ConvMLPBlock, ConvMLPStage, ConvStage, Downsample
from .model import VARIANTS, ConvMLP, init_weights

PURE_MLP = dict(conv_stage=False, conv_downsample=False, spatial_connect=False)
PURE_MLPS: dict[str, dict[str, Any]] = {
    name.replace("conv", "pure_"): {**settings, **PURE_MLP} for name, settings in VARIANTS.items()
}


class PatchMerging(nn.Module):
    """One linear layer over each square patch: (b, dim, h, w) -> (b, out_dim, h/size, w/size), rounded up.

    Stands in for the tokenizer and for downsampling where convolutions are switched off. Patches do not overlap, so a
    convolution whose stride is its size computes just that; what is missing at the lower right edge counts as zero.
    """

    def __init__(self, dim: int, out_dim: int, size: int):
        super().__init__()
        self.size = size
        self.projection = nn.Conv2d(dim, out_dim, size, stride=size)
        init_weights(self.projection)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[-2:]
        return self.projection(F.pad(x, (0, -w % self.size, 0, -h % self.size)))


class ChannelMLPBlock(nn.Module):
    """What a Conv-MLP block is without its convolution: (b, h, w, dim) -> same. Positions never mix in it."""

    def __init__(self, block: ConvMLPBlock):
        super().__init__()
        self.norm1 = block.norm1
        self.channel_mlp1 = block.channel_mlp1
        self.norm2 = block.norm2
        self.channel_mlp2 = block.channel_mlp2
        self.drop_path = block.drop_path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.channel_mlp1(self.norm1(x)))
        return x + self.drop_path(self.channel_mlp2(self.norm2(x)))


def build(
    conv_stage: bool = True,
    conv_downsample: bool = True,
    spatial_connect: bool = True,
    output_stride: int | None = None,
    **settings: Any,
) -> ConvMLP:
    """A `ConvMLP` of these settings, changed as `ablate` and `dilate` describe.

    Raises:
        ValueError: a value out of range.
        TypeError: an unknown keyword, or a value of another type.
    """
    model = ConvMLP(**settings)
    ablate(model, conv_stage, conv_downsample, spatial_connect)
    if output_stride is not None:
        dilate(model, output_stride)
    return model


def ablate(
    model: ConvMLP, conv_stage: bool = True, conv_downsample: bool = True, spatial_connect: bool = True
) -> ConvMLP:
    """Take convolutions out of a model, in place. Without all three kinds it is the paper's Pure-MLP baseline.

    What stays keeps its weights; what is new is initialised. docs/ablation.md tells why each part is replaced so.

    Args:
        model: Any `ConvMLP`.
        conv_stage: False replaces the tokenizer by a linear layer over 4x4 patches, and the bottlenecks of the
            convolution stage by as many Conv-MLP blocks of the same width.
        conv_downsample: False replaces the strided convolutions by linear layers over 2x2 patches.
        spatial_connect: False leaves out the depthwise convolution of the Conv-MLP blocks, and its norm.

    Raises:
        ValueError: the channel MLPs of the new blocks would be empty.
    """
    example = next(model.parameters())  # of the type and the device of the model
    if not conv_stage and isinstance(model.conv_stages, ConvStage):
        channels, dim = (info["num_chs"] for info in model.feature_info[:2])
        n_blocks, mlp_ratio = len(model.conv_stages.conv_blocks), model.mlp_ratios[0]
        if channels * mlp_ratio < 1:
            raise ValueError(f"widths must not be empty, got {channels=}, {mlp_ratio=}")
        model.tokenizer = PatchMerging(model.in_chans, channels, 4)
        model.conv_stages = ConvMLPStage(channels, dim, n_blocks, mlp_ratio, model.drop_path_rate)
        model.conv_stages.apply(partial(init_weights, weight_init=model.weight_init))
    replaced: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not spatial_connect and isinstance(module, ConvMLPBlock):
            replaced[name] = ChannelMLPBlock(module)
        elif not conv_downsample and (isinstance(module, Downsample) or name == "conv_stages.downsample"):
            conv = module.downsample if isinstance(module, Downsample) else module
            replaced[name] = PatchMerging(conv.in_channels, conv.out_channels, 2)
    for name, module in replaced.items():
        model.set_submodule(name, module)
    return model.to(example).train(model.training)


def dilate(model: ConvMLP, output_stride: int) -> ConvMLP:
    """Keep the later stages at the resolution of `output_stride`, in place, by dilating their convolutions.

    For decoders such as DeepLab's. The weights stay as they are, and the values of the maps too, which become denser.

    Args:
        model: Any `ConvMLP` that was not dilated before.
        output_stride: Stride of the last map: 8, 16, or 32 (no change), for three stages.

    Raises:
        ValueError: another stride, or a model whose downsampling is not convolutional.
    """
    strides = [8 * 2**i for i in range(len(model.stages))]  # of the maps that the stages take
    if not isinstance(output_stride, int) or output_stride not in strides:
        raise ValueError(f"output_stride must be one of {', '.join(map(str, strides))}, got {output_stride!r}")
    if output_stride < strides[-1] and any(isinstance(module, PatchMerging) for module in model.stages.modules()):
        raise ValueError(f"linear layers over patches cannot dilate, got {output_stride=}")
    for stride, stage in zip(strides, model.stages, strict=True):
        for module in stage.modules():
            if isinstance(module, nn.Conv2d) and stride >= output_stride:
                module.stride = (1, 1)
                module.dilation = module.padding = (stride // output_stride,) * 2
    for info in model.feature_info:
        info["reduction"] = min(info["reduction"], output_stride)
    return model
