"""Block of a diffusion transformer with cross-attention, modulated by adaLN-single.

Self-attention, cross-attention to the text and a feed-forward layer. Shift, scale and gate of the first and the last
come from the time embedding that all blocks share, plus a table of the block's own (PixArt-alpha, arXiv 2310.00426,
section 2.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas.blocks import check_positive
from nas.blocks._attention import Attention, Form
from nas.blocks._dit import FeedForward, check_ffn, modulated, norm

_KIND = "dit_block"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Shape of a block.

    Attributes:
        width: Width C of the tokens.
        heads: Query heads.
        kv_heads: Key and value heads of both attentions.
        text_width: Width D of the text tokens.
        ffn_ratio: Inner width of the feed-forward layer as a multiple of `width`.
        ffn_kind: `gelu` or `geglu`.
        attention: Kind of the self-attention (see `nas.blocks._attention.Attention`).
        rows: Rows of the grid of tokens, for the kinds that need it.
        columns: Its columns.
        window: Most tokens along a side of a window, for the kinds that need it.
    """

    width: int
    heads: int
    kv_heads: int
    text_width: int
    ffn_ratio: float
    ffn_kind: str = "gelu"
    attention: str = "full"
    rows: int = 0
    columns: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        check_positive(_KIND, text_width=self.text_width)
        check_ffn(_KIND, self.ffn_ratio, self.ffn_kind)
        self.form.checked(_KIND)

    @property
    def form(self) -> Form:
        """The self-attention."""
        return Form(
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            kind=self.attention,
            rows=self.rows,
            columns=self.columns,
            window=self.window,
        )


class Block(nn.Module):
    """Names and numerics are those of diffusers' `BasicTransformerBlock` with `norm_type="ada_norm_single"`."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.width = width
        self.norm1 = norm(width)
        self.attn1 = Attention(settings.form, width)
        cross = Form(width=width, heads=settings.heads, kv_heads=settings.kv_heads)
        self.attn2 = Attention(cross, settings.text_width)
        self.norm2 = norm(width)
        self.ff = FeedForward(width, settings.ffn_ratio, settings.ffn_kind)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x: Tensor, temb: Tensor, text: Tensor) -> Tensor:
        """Map tokens `x` `[B, L, C]` to the same shape.

        Args:
            x: Tokens.
            temb: `[B, 7 C]`, the embedded timestep and six modulations (see `nas.blocks.adaln_single`).
            text: `[B, T, D]`.
        """
        modulation = self.scale_shift_table + temb[:, self.width :].reshape(-1, 6, self.width)
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.chunk(6, dim=1)
        normed = modulated(self.norm1(x), shift, scale)
        x = gate * self.attn1(normed, normed) + x
        x = self.attn2(x, text) + x  # without a norm, as PixArt has it
        return ff_gate * self.ff(modulated(self.norm2(x), ff_shift, ff_scale)) + x
