"""What ConvMLP backbones of detectors and segmentors share: which of their parts are trained."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .common.errors import suggest
from .model import VARIANTS, ConvMLP


def variant_settings(arch: str) -> dict[str, Any]:
    """The arguments of `ConvMLP` for a variant; raises `ValueError` if it is unknown."""
    if arch not in VARIANTS:
        raise ValueError(f"arch must be one of {', '.join(VARIANTS)}, got {arch!r}{suggest(str(arch), VARIANTS)}")
    return VARIANTS[arch]


def check_choice(model: ConvMLP, out_indices: Sequence[int], frozen_stages: int) -> None:
    """Make sure that a model has these maps, in increasing order, and these parts, or raise `ValueError`."""
    levels, parts = len(model.feature_info), len(model.parts())
    if not out_indices or list(out_indices) != sorted({*out_indices} & {*range(levels)}):
        raise ValueError(f"out_indices must be increasing numbers from 0 to {levels - 1}, got {out_indices=}")
    if frozen_stages not in range(-1, parts):
        raise ValueError(f"frozen_stages must be between -1 and {parts - 1}, got {frozen_stages=}")


def hold(parts: Iterable[nn.Module | nn.Parameter]) -> None:
    """Leave parts of a model untrained: without gradients, dropout, or a change to BatchNorm's statistics."""
    for part in parts:
        part.requires_grad_(False)
        if isinstance(part, nn.Module):
            part.eval()


class Freezable(nn.Module):
    """Mixin of a backbone whose first parts, or whose statistics of BatchNorm, stay as they are in training."""

    def freeze(self, parts: Iterable[nn.Module], frozen_stages: int, norm_eval: bool) -> None:
        """Say what is not trained.

        Args:
            parts: Those of the ConvMLP, from the input.
            frozen_stages: -1 freezes none, 0 the first part, 1 also the second, and so on.
            norm_eval: Keep BatchNorm's statistics as they are.
        """
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self._parts = list(parts)
        hold(self._parts[: frozen_stages + 1])
        self.train(self.training)  # a new model may be trained without a call of this

    def train(self, mode: bool = True) -> "Freezable":
        super().train(mode)
        if mode:
            hold(self._parts[: self.frozen_stages + 1])
            for module in (module for part in self._parts for module in part.modules()):
                if self.norm_eval and isinstance(module, _BatchNorm):
                    module.eval()
        return self
