"""Text tokens brought to the width of a transformer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check_positive


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Widths of the projection.

    Attributes:
        text_width: Width D of the text encoder's tokens.
        width: Width of the transformer's tokens.
    """

    text_width: int
    width: int

    def __post_init__(self) -> None:
        check_positive("text_projection", text_width=self.text_width, width=self.width)


class Block(nn.Module):
    """Linear, GELU (tanh approximation), linear: diffusers' `PixArtAlphaTextProjection`, its `caption_projection`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(settings.text_width, settings.width)
        self.linear_2 = nn.Linear(settings.width, settings.width)

    def forward(self, text: Tensor) -> Tensor:
        """Map `[B, T, D]` to `[B, T, width]`."""
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))
