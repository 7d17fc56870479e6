"""Double height and width by repeating pixels, then a convolution."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check_positive


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Widths of an upsampler.

    Attributes:
        channels: Channels of the input.
        out_channels: Channels of the output; 0 means as many as the input.
    """

    channels: int
    out_channels: int = 0

    def __post_init__(self) -> None:
        check_positive("upsample", channels=self.channels, out_channels=self.out_channels + 1)


class Block(nn.Module):
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        out = settings.out_channels or settings.channels
        self.conv = nn.Conv2d(settings.channels, out, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, out, 2 H, 2 W]`."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
