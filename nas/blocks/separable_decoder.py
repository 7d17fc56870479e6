"""Separable residual block of a small image decoder, after SnapGen's tiny decoder.

SnapGen (arXiv 2412.09619, section 3.2) does not publish the block's details; this is the one that Mobile-VTON
(github.com/tmllab/2026_CVPR_Mobile-VTON) builds after it: a single norm, in front of the last pointwise convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check_groups, check_positive

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Widths of the block.

    Attributes:
        in_channels: Channels of `x`.
        out_channels: Channels of the output.
        norm_groups: Groups of the GroupNorm.
        expansion: Width of the middle as a multiple of `out_channels`.
    """

    in_channels: int
    out_channels: int
    norm_groups: int
    expansion: int = 1

    def __post_init__(self) -> None:
        check_positive(
            "separable_decoder",
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            norm_groups=self.norm_groups,
            expansion=self.expansion,
        )
        check_groups("separable_decoder", self.norm_groups, middle=self.out_channels * self.expansion)


class SeparableConv(nn.Module):
    """Depthwise 3x3 with bias, then pointwise 1x1 without; between them GroupNorm and SiLU where `groups` is not 0."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = 0) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1, groups=in_channels)
        self.norm = nn.GroupNorm(groups, in_channels, eps=NORM_EPS) if groups else None
        self.pointwise = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_channels, H, W]` to `[B, out_channels, H, W]`."""
        x = self.depthwise(x)
        return self.pointwise(x if self.norm is None else F.silu(self.norm(x)))


class Block(nn.Module):
    """Two separable convolutions, the second with norm and SiLU inside it, plus the (1x1-projected) input."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        wide, out = settings.in_channels, settings.out_channels
        middle = out * settings.expansion
        self.conv1 = SeparableConv(wide, middle)
        self.conv2 = SeparableConv(middle, out, settings.norm_groups)
        self.conv_shortcut = nn.Conv2d(wide, out, kernel_size=1) if wide != out else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[B, in_channels, H, W]` to `[B, out_channels, H, W]`."""
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + self.conv2(self.conv1(x))
