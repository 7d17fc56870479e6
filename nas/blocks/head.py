"""Output layer: from the width of the last stage back to latent channels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check_groups, check_positive

NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Widths of the head.

    Attributes:
        in_channels: Channels of the last stage.
        out_channels: Channels of the predicted latent.
        norm_groups: Groups of the GroupNorm.
        norm_eps: Its epsilon; diffusers uses 1e-5 in UNets, 1e-6 in image decoders.
    """

    in_channels: int
    out_channels: int
    norm_groups: int
    norm_eps: float = NORM_EPS

    def __post_init__(self) -> None:
        check_positive(
            "head",
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            norm_groups=self.norm_groups,
        )
        check_groups("head", self.norm_groups, in_channels=self.in_channels)


class Block(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution; diffusers keeps both layers at the root of its network."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.conv_norm_out = nn.GroupNorm(settings.norm_groups, settings.in_channels, eps=settings.norm_eps)
        self.conv_out = nn.Conv2d(settings.in_channels, settings.out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_channels, H, W]` to `[B, out_channels, H, W]`."""
        return self.conv_out(F.silu(self.conv_norm_out(x)))
