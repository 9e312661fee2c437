"""Activation maps: where a classifier looks for a class, by Grad-CAM (Selvaraju et al. 2017)."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch

from .errors import RunError


def blend(pixels: np.ndarray, heat_map: np.ndarray) -> np.ndarray:
    """An image, uint8 (h, w, channels), in grey under the colours of a map, (h, w) in 0 to 1: (h, w, 3) in 0 to 1."""
    heat = matplotlib.colormaps["jet"](heat_map)[..., :3]
    return 0.5 * heat + 0.5 * pixels.mean(-1, keepdims=True) / 255


def activation_maps(
    model: Any, batch: torch.Tensor, class_indices: Sequence[int], title: str, least: int = 1
) -> np.ndarray:
    """Grad-CAM of a class for each image of a normalised batch, 0 to 1, as large as the images, (b, h, w).

    It is that of the last feature map of at least so many pixels a side. `model` is one of timm's, in evaluation mode,
    and is called `title` in errors.

    Raises:
        RunError: the model has no such map, or its map is a single pixel.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    info = getattr(model, "feature_info", None)
    if not info:
        raise RunError(f"{title} does not tell its feature maps to timm")
    has_class_token = getattr(model, "num_prefix_tokens", 0) > 0
    # Behind the last block the other tokens no longer matter
    levels = list(info)[:-1] if has_class_token and len(info) > 1 else list(info)
    large = [level for level in levels if min(batch.shape[2:]) // level["reduction"] >= least]
    level = (large or levels)[-1]

    def to_nchw(x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 3:  # tokens, (b, n, c), perhaps with others before those of the image
            side = math.isqrt(x.shape[1])
            x = x[:, x.shape[1] - side * side :].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        maps = x if x.shape[1] == level["num_chs"] else x.permute(0, 3, 1, 2)
        if maps.shape[2:] == (1, 1):
            size = "x".join(map(str, batch.shape[2:]))
            raise RunError(
                f"the last map of {title} is 1x1 at {size} px, so no place can be told; "
                "--img-size PX takes a larger image"
            )
        return maps

    batch = batch.detach().clone().requires_grad_()  # for models with frozen stages
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.filterwarnings("ignore", message=".*full backward hook.*")
        try:
            layer = model.get_submodule(level["module"])
            with GradCAM(model, [layer], reshape_transform=to_nchw) as cam:
                return cam(batch, [ClassifierOutputTarget(index) for index in class_indices])
        except (AttributeError, TypeError) as error:  # several maps, or none that the head looks at
            raise RunError(f"{title} has no single last map that Grad-CAM could look at: {error}") from error
