"""Sinusoidal features of the timestep and the two-layer network behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check, check_positive

_MAX_PERIOD = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Widths of the time embedding.

    Attributes:
        frequency_width: Number of sinusoidal features (even); diffusers uses the first stage's width.
        time_width: Width of the embedding given to the residual blocks.
    """

    frequency_width: int
    time_width: int

    def __post_init__(self) -> None:
        check_positive("time_embedding", frequency_width=self.frequency_width, time_width=self.time_width)
        even = self.frequency_width % 2 == 0
        check(even, "time_embedding", "frequency_width", self.frequency_width, "even")


def sinusoid(timestep: Tensor, width: int) -> Tensor:
    """Cosine then sine features of a timestep, in float32.

    Args:
        timestep: `[B]`, any real numbers (diffusion networks are used to 0..1000).
        width: Number of features, even.

    Returns:
        `[B, width]`: `cos(t * w_i)` then `sin(t * w_i)` with `w_i = 10000^(-i / (width / 2))`
        (Ho et al. 2020, section 4; the cosine-first order is that of Stable Diffusion).
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=timestep.device)
    frequency = torch.exp(index * (-math.log(_MAX_PERIOD) / half))
    angle = timestep.to(torch.float32)[:, None] * frequency[None, :]
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Block(nn.Module):
    """`timestep` `[B]` to `temb` `[B, time_width]`: sinusoid, linear, SiLU, linear."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.frequency_width = settings.frequency_width
        self.linear_1 = nn.Linear(settings.frequency_width, settings.time_width)
        self.linear_2 = nn.Linear(settings.time_width, settings.time_width)

    def forward(self, timestep: Tensor) -> Tensor:
        """Return the embedding `[B, time_width]` in the precision of the weights."""
        features = sinusoid(timestep, self.frequency_width).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(features)))
