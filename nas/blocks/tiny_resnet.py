"""Residual block of TAESD: three 3x3 convolutions with ReLU between them, and no norm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check_positive


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Widths of the block.

    Attributes:
        in_channels: Channels of `x`.
        out_channels: Channels of the output.
    """

    in_channels: int
    out_channels: int

    def __post_init__(self) -> None:
        check_positive("tiny_resnet", in_channels=self.in_channels, out_channels=self.out_channels)


class Block(nn.Module):
    """ReLU of three convolutions plus the (1x1-projected) input.

    Names and numerics are those of diffusers' `AutoencoderTinyBlock` with ReLU.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        wide, out = settings.in_channels, settings.out_channels
        self.conv = nn.Sequential(
            nn.Conv2d(wide, out, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(out, out, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(out, out, kernel_size=3, padding=1),
        )
        self.skip = nn.Conv2d(wide, out, kernel_size=1, bias=False) if wide != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[B, in_channels, H, W]` to `[B, out_channels, H, W]`."""
        return F.relu(self.conv(x) + self.skip(x))
