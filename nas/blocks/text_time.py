"""SDXL's added conditions: a summary of the text and the sizes of the wanted image, added to the time embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check, check_positive
from nas.blocks.time_embedding import sinusoid

_KIND = "text_time"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Widths of the added conditions.

    Attributes:
        pooled_width: Width P of the vector that summarises the text.
        size_ids: Number n of sizes (SDXL: height and width of the original, of the crop's corner, of the target).
        size_embedding_width: Sinusoidal features of each size (even; 256 in SDXL).
        time_width: Width of `temb`.
    """

    pooled_width: int
    size_ids: int
    size_embedding_width: int
    time_width: int

    def __post_init__(self) -> None:
        check_positive(
            _KIND,
            pooled_width=self.pooled_width,
            size_ids=self.size_ids,
            size_embedding_width=self.size_embedding_width,
            time_width=self.time_width,
        )
        even = self.size_embedding_width % 2 == 0
        check(even, _KIND, "size_embedding_width", self.size_embedding_width, "even")


class Block(nn.Module):
    """`temb` plus linear, SiLU, linear of the text's summary and the sinusoids of the sizes.

    Names and numerics are those of `add_embedding` in diffusers' `UNet2DConditionModel` with
    `addition_embed_type="text_time"` (Podell et al. 2023, arXiv 2307.01952, section 2.2).
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.size_embedding_width = settings.size_embedding_width
        width = settings.pooled_width + settings.size_ids * settings.size_embedding_width
        self.linear_1 = nn.Linear(width, settings.time_width)
        self.linear_2 = nn.Linear(settings.time_width, settings.time_width)

    def forward(self, temb: Tensor, pooled: Tensor, size_ids: Tensor) -> Tensor:
        """Map `temb` `[B, E]` to the same shape, given `pooled` `[B, P]` and `size_ids` `[B, n]` in px."""
        sizes = sinusoid(size_ids.flatten(), self.size_embedding_width).reshape(size_ids.shape[0], -1)
        features = torch.cat([pooled, sizes.to(pooled.dtype)], dim=1).to(self.linear_1.weight.dtype)
        return temb + self.linear_2(F.silu(self.linear_1(features)))
