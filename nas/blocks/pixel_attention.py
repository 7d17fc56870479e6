"""Self-attention of a VAE's middle: one head over all pixels, with a norm before and a residual around."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check_groups, check_positive

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Widths of the attention.

    Attributes:
        channels: Channels of input and output, and width of the one head.
        norm_groups: Groups of the GroupNorm.
        norm_eps: Its epsilon.
    """

    channels: int
    norm_groups: int
    norm_eps: float = NORM_EPS

    def __post_init__(self) -> None:
        check_positive("pixel_attention", channels=self.channels, norm_groups=self.norm_groups)
        check_groups("pixel_attention", self.norm_groups, channels=self.channels)


class Block(nn.Module):
    """GroupNorm, one-headed attention of every pixel to every pixel, projection, plus the input.

    Names and numerics are those of diffusers' `Attention` in `UNetMidBlock2D`.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        wide = settings.channels
        self.group_norm = nn.GroupNorm(settings.norm_groups, wide, eps=settings.norm_eps)
        self.to_q = nn.Linear(wide, wide)
        self.to_k = nn.Linear(wide, wide)
        self.to_v = nn.Linear(wide, wide)
        self.to_out = nn.ModuleList([nn.Linear(wide, wide)])

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[B, channels, H, W]` to the same shape."""
        batch, channels, height, width = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        query, key, value = (project(tokens)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        mixed = self.to_out[0](F.scaled_dot_product_attention(query, key, value)[:, 0])
        return x + mixed.transpose(1, 2).reshape(batch, channels, height, width)
