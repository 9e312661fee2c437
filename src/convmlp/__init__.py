"""ConvMLP: Hierarchical Convolutional MLPs for Vision, as a library."""

from .model import ConvMLP
from .zoo import convmlp_l, convmlp_m, convmlp_s

__version__ = "0.1.0"

__all__ = ["ConvMLP", "convmlp_l", "convmlp_m", "convmlp_s"]
