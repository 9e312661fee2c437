"""Mixed precision without loss scaling, on any device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """Training steps in bfloat16 autocast; mmengine's AmpOptimWrapper, made for float16 on GPUs, refuses CPUs.

    Args:
        **kwargs: Arguments of mmengine's OptimWrapper.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.device_type = get_device()

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast(self.device_type, torch.bfloat16):
            yield
