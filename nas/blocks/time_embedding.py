"""Sinusoidal features of the timestep and the two-layer network behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check, check_positive

_MAX_PERIOD = 10_000.0
_GUIDANCE_SCALE = 1000.0  # what w is multiplied by before its features are taken


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Widths of the time embedding.

    Attributes:
        frequency_width: Number of sinusoidal features (even); diffusers uses the first stage's width.
        time_width: Width of the embedding given to the residual blocks.
        guidance_width: Width of the embedding of the guidance scale that a consistency model takes; 0 for none.
    """

    frequency_width: int
    time_width: int
    guidance_width: int = 0

    def __post_init__(self) -> None:
        check_positive("time_embedding", frequency_width=self.frequency_width, time_width=self.time_width)
        even = self.frequency_width % 2 == 0
        check(even, "time_embedding", "frequency_width", self.frequency_width, "even")
        check(self.guidance_width >= 0, "time_embedding", "guidance_width", self.guidance_width, "0 or above")


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


def guidance_features(w: Tensor, width: int) -> Tensor:
    """Sine then cosine features of a guidance scale, in float32, as latent consistency models take it.

    Args:
        w: `[B]`, guidance in the convention of LCM: 0 is none, w = k - 1 of the usual scale k.
        width: Number of features, even and at least 4.

    Returns:
        `[B, width]`: `sin(1000 w f_j)` then `cos(1000 w f_j)` with `f_j = 10000^(-j / (width / 2 - 1))`
        (Luo et al. 2023, LCM; other order and other spacing than `sinusoid`, as published).
    """
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=w.device)
    frequency = torch.exp(index * (-math.log(_MAX_PERIOD) / (half - 1)))
    angle = _GUIDANCE_SCALE * w.to(torch.float32)[:, None] * frequency[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Block(nn.Module):
    """`timestep` `[B]` to `temb` `[B, time_width]`: sinusoid, linear, SiLU, linear.

    With a guidance width, a linear map of `guidance` `[B, guidance_width]`, without bias, is added to the sinusoid
    (Luo et al. 2023, LCM; `cond_proj` of diffusers).
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.frequency_width = settings.frequency_width
        self.guidance_width = settings.guidance_width
        if settings.guidance_width:
            self.cond_proj = nn.Linear(settings.guidance_width, settings.frequency_width, bias=False)
        self.linear_1 = nn.Linear(settings.frequency_width, settings.time_width)
        self.linear_2 = nn.Linear(settings.time_width, settings.time_width)

    def forward(self, timestep: Tensor, guidance: Tensor | None = None) -> Tensor:
        """Return the embedding `[B, time_width]` in the precision of the weights."""
        features = sinusoid(timestep, self.frequency_width).to(self.linear_1.weight.dtype)
        if self.guidance_width:
            features = features + self.cond_proj(guidance)
        return self.linear_2(F.silu(self.linear_1(features)))
