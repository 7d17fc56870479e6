"""Separable residual block: each 3x3 convolution becomes a depthwise 3x3 and a pointwise 1x1.

With `expansion` 2 the middle of the block is twice as wide as its output; this is the block of
SnapGen's design ladder (step 2b) and of diffusers' DreamLite. With 1 it is step 2a of the ladder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check_groups, check_positive

NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Widths of a separable residual block.

    Attributes:
        in_channels: Channels of `x` plus those of `skip` where there is one.
        out_channels: Channels of the output.
        time_width: Width of `temb`.
        norm_groups: Groups of both GroupNorms.
        expansion: Width of the middle as a multiple of `out_channels`.
        norm_eps: Epsilon of both GroupNorms.
    """

    in_channels: int
    out_channels: int
    time_width: int
    norm_groups: int
    expansion: int
    norm_eps: float = NORM_EPS

    def __post_init__(self) -> None:
        check_positive(
            "separable",
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            time_width=self.time_width,
            norm_groups=self.norm_groups,
            expansion=self.expansion,
        )
        check_groups(
            "separable",
            self.norm_groups,
            in_channels=self.in_channels,
            middle=self.out_channels * self.expansion,
        )


class SeparableConv(nn.Module):
    """Depthwise 3x3 then pointwise 1x1, both without bias and with nothing between them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1, groups=in_channels, bias=False)
        self.pointwise = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_channels, H, W]` to `[B, out_channels, H, W]`."""
        return self.pointwise(self.depthwise(x))


class Block(nn.Module):
    """Residual block of two separable convolutions around a middle of `expansion * out_channels`.

    With expansion 2, names and numerics are those of diffusers' `ResnetBlock2DDreamLite`.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        wide, out = settings.in_channels, settings.out_channels
        middle = out * settings.expansion
        self.norm1 = nn.GroupNorm(settings.norm_groups, wide, eps=settings.norm_eps)
        self.conv1 = SeparableConv(wide, middle)
        self.time_emb_proj = nn.Linear(settings.time_width, middle)
        self.norm2 = nn.GroupNorm(settings.norm_groups, middle, eps=settings.norm_eps)
        self.conv2 = SeparableConv(middle, out)
        self.conv_shortcut = nn.Conv2d(wide, out, kernel_size=1) if wide != out else None

    def forward(self, x: Tensor, temb: Tensor, skip: Tensor | None = None) -> Tensor:
        """Map `x` (with `skip` after it on channels) to `[B, out_channels, H, W]`."""
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + hidden
