"""Variations of ConvMLP: Pure-MLP, the paper's baseline without convolutions."""

from .model import VARIANTS

PURE_MLP = dict(conv_stage=False, conv_downsample=False, spatial_connect=False)
PURE_MLPS = {name.replace("conv", "pure_"): {**settings, **PURE_MLP} for name, settings in VARIANTS.items()}
