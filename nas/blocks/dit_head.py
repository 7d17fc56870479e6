"""Output layer of a diffusion transformer: from tokens back to the latent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas.blocks import check_positive
from nas.blocks._dit import modulated, norm


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Shape of the head.

    Attributes:
        width: Width C of the tokens.
        patch_size: Side of a patch in latent pixels.
        out_channels: Channels of the prediction.
        rows: Rows of the grid of tokens.
        columns: Its columns.
    """

    width: int
    patch_size: int
    out_channels: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        check_positive(
            "dit_head",
            width=self.width,
            patch_size=self.patch_size,
            out_channels=self.out_channels,
            rows=self.rows,
            columns=self.columns,
        )


class Block(nn.Module):
    """Norm modulated by the embedded timestep, linear layer, patches put in place.

    Names and numerics are those at the root of diffusers' `PixArtTransformer2DModel`, which keeps `scale_shift_table`
    and `proj_out` there.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        width = settings.width
        self.norm_out = norm(width)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, settings.patch_size**2 * settings.out_channels)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """Map tokens `[B, rows * columns, C]` to `[B, out_channels, rows * patch, columns * patch]`.

        Args:
            x: Tokens in reading order.
            temb: Its first C are the embedded timestep.
        """
        shape, patch = self.settings, self.settings.patch_size
        shift, scale = (self.scale_shift_table + temb[:, None, : shape.width]).chunk(2, dim=1)
        patches = self.proj_out(modulated(self.norm_out(x), shift, scale))
        split = patches.reshape(-1, shape.rows, shape.columns, patch, patch, shape.out_channels)
        image = split.permute(0, 5, 1, 3, 2, 4)
        return image.reshape(-1, shape.out_channels, shape.rows * patch, shape.columns * patch)
