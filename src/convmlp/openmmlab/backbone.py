"""ConvMLP as a backbone for mmdet and mmseg."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS

from ..backbones import Freezable, check_choice, variant_settings
from ..common.errors import CheckpointError
from ..model import ConvMLP
from ..variations import dilate
from ..weights import adapt_state_dict, extract_state_dict, find_checkpoint
from ..zoo import checkpoint_urls
from .checkpoints import read_run_checkpoint

PUBLISHED = "imagenet"


@MODELS.register_module()
class ConvMLPBackbone(Freezable, ConvMLP, BaseModule):
    """Images to maps: (b, in_chans, h, w) -> tuple of (b, dim, h/s, w/s), strides s of 4, 8, 16 and 32 by default.

    The maps are those of the reference's detection and segmentation backbones: the outputs of the tokenizer, the
    convolution stage, and the first and the last Conv-MLP stage; 64, 128, 256 and 512 channels wide for S and M, 96,
    192, 384 and 768 for L. Parameter names are those of its checkpoints.

    Args:
        arch: 'convmlp_s', 'convmlp_m' or 'convmlp_l'.
        out_indices: Which of the four maps, in increasing order. What lies deeper than the last one is neither
            computed nor trained.
        frozen_stages: Parts from the input that are not trained: -1 none, 0 the tokenizer, 1 also the convolution
            stage, 2 to 4 also the first to third Conv-MLP stage.
        norm_eval: Keep BatchNorm's statistics as they are in training.
        with_cp: Recompute the Conv-MLP blocks in the backward pass to save memory.
        drop_path_rate: Largest stochastic depth rate of a stage.
        in_chans: Channels of the input image.
        output_stride: Largest stride of a map, 8, 16 or 32; see `dilate`. 8 is the `d8` of mmseg's configs.
        weight_init: How random weights start, 'per_group' or 'reference'; see `ConvMLP`.
        init_cfg: None for random weights, or dict(type='Pretrained', checkpoint=...): 'imagenet' for the published
            weights, or a path or URL. `prefix='backbone.'` takes the backbone out of a detector's checkpoint.

    Raises:
        ValueError: an unknown variant, level or stage, or another kind of init_cfg.
        CheckpointError: from `init_weights`, if any tensor of the backbone cannot be loaded.
    """

    def __init__(
        self,
        arch: str = "convmlp_s",
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_path_rate: float = 0.1,
        in_chans: int = 3,
        output_stride: int = 32,
        weight_init: str = "per_group",
        init_cfg: dict[str, Any] | None = None,
    ):
        settings = variant_settings(arch)
        if init_cfg is not None and (not isinstance(init_cfg, dict) or init_cfg.get("type") != "Pretrained"):
            raise ValueError(f"init_cfg must be None or dict(type='Pretrained', checkpoint=...), got {init_cfg=}")
        super().__init__(
            **settings,
            classifier_head=False,
            drop_path_rate=drop_path_rate,
            in_chans=in_chans,
            weight_init=weight_init,
        )
        dilate(self, output_stride)
        check_choice(self, out_indices, frozen_stages)
        parts = self.parts()
        self.freeze(parts.values(), frozen_stages, norm_eval)
        self.set_grad_checkpointing(with_cp)
        self.out_indices = tuple(out_indices)
        deepest = list(parts).index(self.feature_info[self.out_indices[-1]]["module"])
        for unused in list(parts.values())[deepest + 1 :]:
            unused.requires_grad_(False)
        self.arch = arch
        self.init_cfg = copy.deepcopy(init_cfg)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]  # as necks want it
        maps: Any = self.forward_intermediates(x, self.out_indices, stop_early=True, intermediates_only=True)
        return tuple(maps)

    def init_weights(self) -> None:
        """Load what `init_cfg` names; without one the weights stay as the constructor drew them."""
        if self.init_cfg is None:
            print_log(f"no init_cfg: {self.arch} starts from random weights", logger="current")
        else:
            settings = {key: value for key, value in self.init_cfg.items() if key != "type"}
            self._load(**settings)
        self._is_init = True

    def _load(self, checkpoint: str, prefix: str = "", map_location: Any = None) -> None:
        source = checkpoint_urls(self.arch) if checkpoint == PUBLISHED else checkpoint
        if is_main_process():
            find_checkpoint(source)
        barrier()  # the others find what the first has downloaded
        path = find_checkpoint(source)
        weights = extract_state_dict(read_run_checkpoint(path), name=str(path))
        if prefix:
            prefix = f"{prefix.removesuffix('.')}."
            weights = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
            if not weights:
                raise CheckpointError(f"{path} has no tensor whose name starts with {prefix}")
        elif any(key.startswith("backbone.") for key in weights):
            raise CheckpointError(f"{path} is a whole detector or segmentor: add prefix='backbone.' to init_cfg")
        weights = adapt_state_dict(weights, self, name=str(path))
        self.load_state_dict(weights)
        print_log(f"{self.arch}: all {len(weights)} tensors loaded from {path}", logger="current")
