"""One convolution with what surrounds it in TAESD's decoder; 1x1 for a VAE's post_quant_conv."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check, check_positive

BEFORE = ("none", "clamp", "upsample")
AFTER = ("none", "relu", "image")
_MOST = 3.0  # latents are pressed into -3 .. 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A convolution.

    Attributes:
        in_channels: Channels of `x`.
        out_channels: Channels of the output.
        kernel: 1 or 3; the size of the image is kept.
        bias: Whether it has one.
        before: "clamp" presses the latent into -3 .. 3 by 3 tanh(x / 3); "upsample" doubles height and width by
            repeating pixels.
        after: "relu", or "image", which maps 0 .. 1 to -1 .. 1.
    """

    in_channels: int
    out_channels: int
    kernel: int = 3
    bias: bool = True
    before: str = "none"
    after: str = "none"

    def __post_init__(self) -> None:
        check_positive("conv", in_channels=self.in_channels, out_channels=self.out_channels)
        check(self.kernel in (1, 3), "conv", "kernel", self.kernel, "1 or 3")
        check(self.before in BEFORE, "conv", "before", self.before, f"one of {', '.join(BEFORE)}")
        check(self.after in AFTER, "conv", "after", self.after, f"one of {', '.join(AFTER)}")


class Block(nn.Conv2d):
    """Convolution; its parameters are `weight` and `bias`, as in diffusers' DecoderTiny and post_quant_conv."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(
            settings.in_channels,
            settings.out_channels,
            kernel_size=settings.kernel,
            padding=settings.kernel // 2,
            bias=settings.bias,
        )
        self.before, self.after = settings.before, settings.after

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[B, in_channels, H, W]` to `[B, out_channels, H, W]`, or `[B, out_channels, 2 H, 2 W]`."""
        if self.before == "clamp":
            x = torch.tanh(x / _MOST) * _MOST
        elif self.before == "upsample":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = super().forward(x)
        if self.after == "relu":
            return F.relu(x)
        return x * 2 - 1 if self.after == "image" else x
