"""Input convolution: latent channels to the width of the first stage."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from nas.blocks import check_positive


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Widths of the stem.

    Attributes:
        in_channels: Channels of the noisy latent.
        out_channels: Channels of the first stage.
    """

    in_channels: int
    out_channels: int

    def __post_init__(self) -> None:
        check_positive("stem", in_channels=self.in_channels, out_channels=self.out_channels)


class Block(nn.Conv2d):
    """3x3 convolution with bias; its parameters are `weight` and `bias`, as in diffusers' conv_in."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.in_channels, settings.out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[B, in_channels, H, W]` to `[B, out_channels, H, W]`."""
        return super().forward(x)
