"""Double height and width by repeating pixels, then a separable convolution."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check_positive


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Width of the upsampler.

    Attributes:
        channels: Channels of input and output.
    """

    channels: int

    def __post_init__(self) -> None:
        check_positive("separable_upsample", channels=self.channels)


class Block(nn.Module):
    """Nearest-neighbour upsampling by 2, then depthwise 3x3 with bias and pointwise 1x1 without."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        wide = settings.channels
        self.depthwise = nn.Conv2d(wide, wide, kernel_size=3, padding=1, groups=wide)
        self.pointwise = nn.Conv2d(wide, wide, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to `[B, C, 2 H, 2 W]`."""
        return self.pointwise(self.depthwise(F.interpolate(x, scale_factor=2.0, mode="nearest")))
