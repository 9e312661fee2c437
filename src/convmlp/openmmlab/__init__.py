"""ConvMLP in mmdet 3 and mmseg 1: `custom_imports = dict(imports=['convmlp.openmmlab'])` in a config.

Importing registers `ConvMLPBackbone` and what the runs of this project use with mmengine, for both libraries, and lets
mmcv.ops be imported without compiled operators (see `ops`).
"""

import logging

from . import ops
from .backbone import ConvMLPBackbone
from .drawing import DrawPredictions
from .machine import AutocastOptimWrapper

__all__ = ["AutocastOptimWrapper", "ConvMLPBackbone", "DrawPredictions"]

ops.install()
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # mmdet imports torchao, if it is there, which warns
