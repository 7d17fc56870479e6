"""Full residual block: two 3x3 convolutions with the time embedding added between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check, check_groups, check_positive

NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Widths of a residual block.

    Attributes:
        in_channels: Channels of `x` plus those of `skip` where there is one.
        out_channels: Channels of the output.
        time_width: Width of `temb`; 0 where the network knows no time (an image decoder).
        norm_groups: Groups of both GroupNorms.
        norm_eps: Epsilon of both; diffusers uses 1e-5 in UNets, 1e-6 in image decoders.
    """

    in_channels: int
    out_channels: int
    time_width: int
    norm_groups: int
    norm_eps: float = NORM_EPS

    def __post_init__(self) -> None:
        check_positive(
            "resnet",
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            time_width=self.time_width + 1,
            norm_groups=self.norm_groups,
        )
        check_groups(
            "resnet",
            self.norm_groups,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
        )


class Block(nn.Module):
    """GroupNorm, SiLU, conv, plus time, GroupNorm, SiLU, conv, plus the (1x1-projected) input.

    Names and numerics are those of diffusers' `ResnetBlock2D`.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        wide, out = settings.in_channels, settings.out_channels
        self.norm1 = nn.GroupNorm(settings.norm_groups, wide, eps=settings.norm_eps)
        self.conv1 = nn.Conv2d(wide, out, kernel_size=3, padding=1)
        self.time_emb_proj = nn.Linear(settings.time_width, out) if settings.time_width else None
        self.norm2 = nn.GroupNorm(settings.norm_groups, out, eps=settings.norm_eps)
        self.conv2 = nn.Conv2d(out, out, kernel_size=3, padding=1)
        self.conv_shortcut = nn.Conv2d(wide, out, kernel_size=1) if wide != out else None

    def forward(self, x: Tensor, temb: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """Map `x` (with `skip` after it on channels) to `[B, out_channels, H, W]`."""
        check(temb is not None or self.time_emb_proj is None, "resnet", "temb", temb, "given: time_width is not 0")
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        hidden = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and temb is not None:
            hidden = hidden + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return shortcut + hidden
