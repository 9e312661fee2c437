"""ConvMLP in mmdet 3 and mmseg 1: `custom_imports = dict(imports=['convmlp.openmmlab'])` in a config.

Importing registers `ConvMLPBackbone` and `AutocastOptimWrapper` with mmengine, for both libraries, and lets mmcv.ops be
imported without compiled operators (see `ops`).
"""

from . import ops
from .backbone import ConvMLPBackbone
from .optim import AutocastOptimWrapper

__all__ = ["AutocastOptimWrapper", "ConvMLPBackbone"]

ops.install()
