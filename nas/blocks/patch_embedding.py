"""Patches of the latent as tokens, with two-dimensional sine and cosine positions added."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas.blocks import check, check_positive

_KIND = "patch_embedding"
_MAX_PERIOD = 10_000.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Shape of the embedding.

    Attributes:
        in_channels: Channels of the latent.
        width: Width of a token, a multiple of 4.
        patch_size: Side of a patch in latent pixels.
        base_size: Side in tokens of the grid that positions are counted on: a grid of another size is stretched to it.
        interpolation_scale: What positions are divided by after that.
    """

    in_channels: int
    width: int
    patch_size: int
    base_size: int
    interpolation_scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive(
            _KIND,
            in_channels=self.in_channels,
            width=self.width,
            patch_size=self.patch_size,
            base_size=self.base_size,
        )
        check(self.width % 4 == 0, _KIND, "width", self.width, "a multiple of 4, for sine and cosine of two axes")
        check(self.interpolation_scale > 0, _KIND, "interpolation_scale", self.interpolation_scale, "above 0")


def axis(count: int, width: int, base_size: int, scale: float, device: torch.device) -> Tensor:
    """Sine then cosine features of the positions along one axis: `[count, width]`, in float32.

    Position i stands at `i / (count / base_size) / scale`; angle j is position times `10000^(-j / (width / 2))`.
    """
    # diffusers computes the angles in float64, except where a device has none.
    precise = torch.float32 if device.type == "mps" else torch.float64
    position = torch.arange(count, dtype=torch.float32, device=device) / (count / base_size) / scale
    index = torch.arange(width // 2, dtype=precise, device=device)
    frequency = torch.exp(index * (-math.log(_MAX_PERIOD) / (width // 2)))
    angle = position[:, None].to(precise) * frequency[None, :]
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(torch.float32)


class Block(nn.Module):
    """Strided convolution and positions: the first half of a token's width is its column, the rest its row.

    Names and numerics are those of diffusers' `PatchEmbed` with `pos_embed_type="sincos"` (Peebles & Xie 2023, arXiv
    2212.09748; the stretching is that of PixArt-Sigma, arXiv 2403.04692).
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        patch = settings.patch_size
        self.proj = nn.Conv2d(settings.in_channels, settings.width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, H, W]` to tokens `[B, H / patch * W / patch, width]` in reading order."""
        image = self.proj(x)
        rows, columns = image.shape[2:]
        tokens = image.flatten(2).transpose(1, 2)
        return (tokens + self._positions(rows, columns, x.device)).to(tokens.dtype)

    def _positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        half, base, scale = self.settings.width // 2, self.settings.base_size, self.settings.interpolation_scale
        across = axis(columns, half, base, scale, device)[None].expand(rows, columns, half)
        down = axis(rows, half, base, scale, device)[:, None].expand(rows, columns, half)
        return torch.cat([across, down], dim=2).reshape(rows * columns, 2 * half)
