"""Tokens of an earlier block joined to the running ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas.blocks import check_positive


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Shape of the skip.

    Attributes:
        width: Width C of the tokens, of those of the earlier block and of the result.
    """

    width: int

    def __post_init__(self) -> None:
        check_positive("token_skip", width=self.width)


class Block(nn.Module):
    """Concatenation and a linear layer, as the long skips of U-ViT (Bao et al. 2022, arXiv 2209.12152, figure 2a).

    How SnapGen++ (arXiv 2601.08303) joins its dense skips is not public in detail: our reconstruction.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.proj = nn.Linear(2 * settings.width, settings.width)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map `x` and `skip`, both `[B, L, C]`, to `[B, L, C]`."""
        return self.proj(torch.cat([x, skip], dim=2))
