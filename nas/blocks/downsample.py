"""Halve height and width with a strided convolution."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nas.blocks import check_positive


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Widths of a downsampler.

    Attributes:
        channels: Channels of the input.
        out_channels: Channels of the output; 0 means as many as the input.
    """

    channels: int
    out_channels: int = 0

    def __post_init__(self) -> None:
        check_positive("downsample", channels=self.channels, out_channels=self.out_channels + 1)


class Block(nn.Module):
    """3x3 convolution of stride 2 with one row and column of zeros around the input."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        out = settings.out_channels or settings.channels
        self.conv = nn.Conv2d(settings.channels, out, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, out, ceil(H / 2), ceil(W / 2)]`."""
        return self.conv(x)
