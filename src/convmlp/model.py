"""ConvMLP: a hierarchical backbone of convolutions and channel MLPs (Li et al. 2021, arXiv 2109.04454)."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .layers import ConvMLPStage, ConvStage, Tokenizer

POOLINGS = ("avg", "max", "avgmax", "")
WEIGHT_INITS = ("per_group", "reference")


class ConvMLP(nn.Module):
    """Images to logits: (b, in_chans, h, w) -> (b, num_classes). Any size from 32x32 up, also odd ones.

    Args:
        blocks: Conv-MLP blocks in each stage.
        dims: Width of each stage; the convolution stage widens to the first.
        mlp_ratios: Hidden width of each stage's channel MLPs over its width.
        channels: Width of the tokenizer and the convolution stage.
        n_conv_blocks: Residual bottlenecks in the convolution stage.
        classifier_head: False leaves out the final norm and the head; forward then returns the last map,
            channels last as in the reference: (b, h/32, w/32, dims[-1]).
        num_classes: 0 leaves out the head; forward then returns the pooled features, (b, dims[-1]).
        in_chans: Channels of the input image.
        drop_rate: Dropout before the head, in training.
        drop_path_rate: Largest stochastic depth rate of a stage; every stage ramps up to it from 0.
        global_pool: 'avg', 'max', 'avgmax' (their mean), or '' with num_classes=0 for the unpooled map.
        final_norm: LayerNorm after the last stage. By default it comes and goes with the head, as in the
            reference; True keeps it without one, as timm's users expect of num_classes=0.
        weight_init: 'per_group' starts the depthwise convolutions so that signal and gradient keep their scale;
            'reference' starts them sqrt(dim) times smaller, as the paper's code does. See docs/initialisation.md.

    Raises:
        ValueError: sequences of unequal length, a value out of range, an unknown pooling or initialisation.
        TypeError: a value of another type than above.
        RuntimeError: in forward, PyTorch's own, an input of other channels than `in_chans`.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        dims: Sequence[int],
        mlp_ratios: Sequence[float],
        channels: int = 64,
        n_conv_blocks: int = 3,
        classifier_head: bool = True,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        global_pool: str = "avg",
        final_norm: bool | None = None,
        weight_init: str = "per_group",
    ):
        super().__init__()
        blocks, dims, mlp_ratios = tuple(blocks), tuple(dims), tuple(mlp_ratios)
        if not len(blocks) == len(dims) == len(mlp_ratios) > 0:
            raise ValueError(f"each stage needs one entry in each, got {blocks=}, {dims=}, {mlp_ratios=}")
        if channels < 2 or channels % 2:
            raise ValueError(f"the width of the tokenizer must be even, got {channels=}")
        hidden_dims = [dim * mlp_ratio for dim, mlp_ratio in zip(dims, mlp_ratios, strict=True)]
        if not all(1 <= width < math.inf for width in (*dims, *hidden_dims)):
            raise ValueError(f"widths must be at least 1, got {dims=}, {mlp_ratios=}")
        if min(*blocks, n_conv_blocks, num_classes, in_chans - 1) < 0:
            raise ValueError(f"a count is out of range, got {blocks=}, {n_conv_blocks=}, {num_classes=}, {in_chans=}")
        if not (0 <= drop_rate < 1 and 0 <= drop_path_rate < 1):
            raise ValueError(f"rates must be at least 0 and below 1, got {drop_rate=}, {drop_path_rate=}")
        if weight_init not in WEIGHT_INITS:
            raise ValueError(f"weight_init must be one of {', '.join(map(repr, WEIGHT_INITS))}, got {weight_init=}")
        if not classifier_head:
            num_classes = 0
        self.in_chans = in_chans
        self.mlp_ratios = mlp_ratios
        self.drop_path_rate = drop_path_rate
        self.weight_init = weight_init
        self.num_features = self.head_hidden_size = dims[-1]
        self.classifier_head = classifier_head
        self.feature_info = _feature_info(channels, dims)

        self.tokenizer: nn.Module = Tokenizer(in_chans, channels)
        self.conv_stages: nn.Module = ConvStage(channels, dims[0], n_conv_blocks)
        self.stages = nn.ModuleList(
            ConvMLPStage(dim, out_dim, n_blocks, mlp_ratio, drop_path_rate)
            for dim, out_dim, n_blocks, mlp_ratio in zip(dims, [*dims[1:], None], blocks, mlp_ratios, strict=True)
        )
        has_norm = num_classes > 0 if final_norm is None else final_norm
        self.norm = nn.LayerNorm(dims[-1]) if has_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(partial(init_weights, weight_init=weight_init))
        self._set_head(num_classes, global_pool)

    def _set_head(self, num_classes: int, global_pool: str) -> None:
        if global_pool not in POOLINGS:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, POOLINGS))}, got {global_pool!r}")
        if num_classes < 0:
            raise ValueError(f"got {num_classes=}")
        if num_classes and not global_pool:
            raise ValueError(f"a head needs pooled features, got {num_classes=} with global_pool=''")
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.apply(init_weights)

    def parts(self) -> dict[str, nn.Module]:
        """What an image runs through before norm and head, in order, by name: tokenizer, conv_stages, stages.0, ..."""
        stages = {f"stages.{i}": stage for i, stage in enumerate(self.stages)}
        return {"tokenizer": self.tokenizer, "conv_stages": self.conv_stages, **stages}

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(b, in_chans, h, w) -> (b, dims[-1], h/32, w/32), after the final norm if there is one."""
        x = self.tokenizer(x)
        x = self.conv_stages(x)
        for stage in self.stages:
            x = stage(x)
        return self._normalize(x)

    def _normalize(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool and classify: (b, dims[-1], h, w) -> (b, num_classes), or (b, dims[-1]) with `pre_logits`."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        elif self.global_pool == "max":
            x = x.amax((2, 3))
        elif self.global_pool == "avgmax":
            x = 0.5 * (x.mean((2, 3)) + x.amax((2, 3)))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        if not self.classifier_head:
            return x.permute(0, 2, 3, 1)
        return self.forward_head(x)

    # timm's protocol for features, heads and training

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The final features with the maps of `feature_info` on the way, in timm's manner.

        Args:
            x: (b, in_chans, h, w).
            indices: Which levels, in increasing order of depth: None all, an int the last so many, else a sequence.
            norm: Apply the final norm to the last level; the others have none.
            stop_early: Compute nothing beyond the deepest level asked for.
            output_fmt: 'NCHW' or 'NHWC', for the intermediates.
            intermediates_only: Return the list alone.

        Returns:
            (features, maps): features as `forward_features` gives them (with `stop_early`, the deepest map asked for).
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        wanted = self._levels(indices)
        names = [info["module"] for info in self.feature_info]
        deepest = names[max(wanted)]
        maps = []
        for name, module in self.parts().items():
            x = module(x)
            if name in names and names.index(name) in wanted:
                out = self._normalize(x) if norm and name == names[-1] else x
                maps.append(out if output_fmt == "NCHW" else out.permute(0, 2, 3, 1))
            if stop_early and name == deepest:
                break
        if intermediates_only:
            return maps
        return (x if stop_early and deepest != names[-1] else self._normalize(x)), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what lies deeper than the levels asked for, and return those levels counted from the start."""
        wanted = self._levels(indices)
        deepest = self.feature_info[max(wanted)]
        kind, _, last_stage = deepest["module"].partition(".")
        pruned = max(wanted) < len(self.feature_info) - 1
        if pruned:
            self.stages = self.stages[: int(last_stage) + 1 if kind == "stages" else 0]
            if kind == "tokenizer":
                self.conv_stages = nn.Identity()
            self.feature_info = self.feature_info[: max(wanted) + 1]
            self.num_features = self.head_hidden_size = deepest["num_chs"]
        if pruned or prune_norm:
            self.norm = nn.Identity()
        if pruned or prune_head:
            self._set_head(0, "")
        return wanted

    def _levels(self, indices: int | Sequence[int] | None) -> list[int]:
        n = len(self.feature_info)
        if indices is None:
            indices = n
        if isinstance(indices, int):
            if not 0 < indices <= n:
                raise ValueError(f"there are {n} levels, got {indices=}")
            return list(range(n - indices, n))
        if not indices or not all(-n <= i < n for i in indices):
            raise ValueError(f"levels run from 0 to {n - 1}, got {indices=}")
        return [i % n for i in indices]

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one on the same device, or remove it (0). A norm that is there stays."""
        example = next(self.parameters())
        self._set_head(num_classes, self.global_pool if global_pool is None else global_pool)
        self.classifier_head = True
        if num_classes and isinstance(self.norm, nn.Identity):
            self.norm = nn.LayerNorm(self.num_features)
        self.norm.to(example)
        self.head.to(example)
        self.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the Conv-MLP blocks in the backward pass to save memory.

        The tokenizer and the convolution stage are left alone: recomputing a BatchNorm would update its running
        statistics twice.
        """
        for stage in self.parts().values():
            if isinstance(stage, ConvMLPStage):
                stage.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups, from input to output, for layer-wise learning rate decay."""
        if coarse:
            return dict(stem=r"^tokenizer", conv_stages=r"^conv_stages", blocks=r"^stages\.(\d+)")
        return dict(
            stem=r"^tokenizer",
            conv_stages=[(r"^conv_stages\.(?:conv_)?blocks\.(\d+)", None), (r"^conv_stages\.downsample", (999,))],
            blocks=[(r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^stages\.(\d+)\.downsample", (999,))],
        )

    def no_weight_decay(self) -> set[str]:
        """Names that take no weight decay beyond timm's rule (biases and norms): none."""
        return set()


def _feature_info(channels: int, dims: Sequence[int]) -> list[dict[str, Any]]:
    """The last map of each width: four levels, strides 4 to 32, for the paper's three stages."""
    modules = ["tokenizer", "conv_stages", *(f"stages.{i}" for i in range(len(dims) - 1))]
    modules[-1] = f"stages.{len(dims) - 1}"  # it does not downsample: its map replaces the one that it starts from
    return [
        dict(num_chs=width, reduction=4 * 2**i, module=module)
        for i, (width, module) in enumerate(zip([channels, *dims], modules, strict=True))
    ]


def init_weights(module: nn.Module, weight_init: str = "reference") -> None:
    """The initialisation of a layer, see `ConvMLP`; convolution biases keep PyTorch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        # Fan out over all groups is dim times too large for a depthwise convolution, whose fan in is its true fan out
        depthwise = module.groups > 1 and weight_init != "reference"
        nn.init.kaiming_normal_(module.weight, mode="fan_in" if depthwise else "fan_out", nonlinearity="relu")


# The paper's variants
# fmt: off
VARIANTS: dict[str, dict[str, Any]] = {
    "convmlp_s": dict(blocks=(2, 4, 2), dims=(128, 256, 512), mlp_ratios=(2, 2, 2), channels=64, n_conv_blocks=2),
    "convmlp_m": dict(blocks=(3, 6, 3), dims=(128, 256, 512), mlp_ratios=(3, 3, 3), channels=64, n_conv_blocks=3),
    "convmlp_l": dict(blocks=(4, 8, 3), dims=(192, 384, 768), mlp_ratios=(3, 3, 3), channels=96, n_conv_blocks=3),
}
# fmt: on
