"""Building blocks of ConvMLP (Li et al. 2021, arXiv 2109.04454, section 3).

Shapes: b batch, h and w spatial, c or dim channels. Stages take and give maps as (b, c, h, w); the Conv-MLP blocks
inside work channels last, (b, h, w, dim). Attribute names are those of the published checkpoints.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def conv_bn_relu(in_dim: int, out_dim: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution without bias, "same" padding, BatchNorm, ReLU: (b, in_dim, h, w) -> (b, out_dim, h/s, w/s)."""
    return [
        nn.Conv2d(in_dim, out_dim, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_dim),
        nn.ReLU(inplace=True),
    ]


class DropPath(nn.Module):
    """Stochastic depth: in training, drops whole samples of a residual branch and rescales the others."""

    def __init__(self, drop_prob: float):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep_prob).div_(keep_prob)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3g}"


class Tokenizer(nn.Module):
    """Convolutional tokenizer, output stride 4: (b, in_chans, h, w) -> (b, dim, h/4, w/4)."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.block = nn.Sequential(
            *conv_bn_relu(in_chans, dim // 2, 3, stride=2),
            *conv_bn_relu(dim // 2, dim // 2, 3),
            *conv_bn_relu(dim // 2, dim, 3),
            nn.MaxPool2d(3, stride=2, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


class ConvStage(nn.Module):
    """Residual bottlenecks, then downsampling: (b, dim, h, w) -> (b, out_dim, h/2, w/2)."""

    def __init__(self, dim: int, out_dim: int, n_blocks: int):
        super().__init__()
        self.conv_blocks = nn.ModuleList(
            nn.Sequential(
                *conv_bn_relu(dim, out_dim, 1),
                *conv_bn_relu(out_dim, out_dim, 3),
                *conv_bn_relu(out_dim, dim, 1),
            )
            for _ in range(n_blocks)
        )
        self.downsample = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.conv_blocks:
            x = x + block(x)
        return self.downsample(x)


class ChannelMLP(nn.Module):
    """Linear, GELU, Linear over channels: (..., dim) -> same."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class ConvMLPBlock(nn.Module):
    """Channel MLP, depthwise 3x3 convolution, channel MLP: (b, h, w, dim) -> same.

    The convolution ("connect") has no residual of its own: it is the one place where positions mix.
    """

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        hidden_dim = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.channel_mlp1 = ChannelMLP(dim, hidden_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.connect = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.connect_norm = nn.LayerNorm(dim)
        self.channel_mlp2 = ChannelMLP(dim, hidden_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.channel_mlp1(self.norm1(x)))
        x = self.connect(self.connect_norm(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path(self.channel_mlp2(self.norm2(x)))


class Downsample(nn.Module):
    """3x3 convolution with bias: (b, dim, h, w) -> (b, out_dim, h/2, w/2)."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.downsample = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.downsample(x)


class ConvMLPStage(nn.Module):
    """Conv-MLP blocks, then downsampling unless `out_dim` is None: (b, dim, h, w) -> (b, out_dim, h/2, w/2).

    Stochastic depth rises linearly from 0 to `drop_path_rate` over the blocks of this stage: the reference restarts
    its ramp in every stage.
    """

    def __init__(self, dim: int, out_dim: int | None, n_blocks: int, mlp_ratio: float, drop_path_rate: float):
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(
            ConvMLPBlock(dim, mlp_ratio, drop_path_rate * i / max(n_blocks - 1, 1)) for i in range(n_blocks)
        )
        self.downsample_mlp = nn.Identity() if out_dim is None else Downsample(dim, out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 2, 3, 1).contiguous()  # free for a channels_last input; otherwise one copy a stage
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.downsample_mlp(x.permute(0, 3, 1, 2))
