"""Block of a multimodal diffusion transformer: image and text tokens attend jointly, with weights of their own.

Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206, section 4 and figure 2b).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks._attention import Form, JointAttention
from nas.blocks._dit import FeedForward, check_ffn, modulated, norm

_KIND = "mmdit_block"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Shape of a block.

    Attributes:
        width: Width C of image and text tokens.
        heads: Query heads.
        kv_heads: Key and value heads.
        ffn_ratio: Inner width of the feed-forward layers as a multiple of `width`.
        ffn_kind: `gelu` or `geglu`.
        updates_text: Whether the text goes on changed; the last block of a network leaves it.
        attention: How image tokens attend (see `nas.blocks._attention.JointAttention`).
        rows: Rows of the grid of tokens, for the kinds that need it.
        columns: Its columns.
        window: Most tokens along a side of a window, for the kinds that need it.
    """

    width: int
    heads: int
    kv_heads: int
    ffn_ratio: float
    ffn_kind: str = "gelu"
    updates_text: bool = True
    attention: str = "full"
    rows: int = 0
    columns: int = 0
    window: int = 0

    def __post_init__(self) -> None:
        check_ffn(_KIND, self.ffn_ratio, self.ffn_kind)
        self.form.checked(_KIND)

    @property
    def form(self) -> Form:
        """The joint attention."""
        return Form(
            width=self.width,
            heads=self.heads,
            kv_heads=self.kv_heads,
            kind=self.attention,
            rows=self.rows,
            columns=self.columns,
            window=self.window,
        )


class _Modulation(nn.Module):
    """SiLU and a linear layer to `parts` vectors of the tokens' width (adaLN-Zero, arXiv 2212.09748, section 3.2)."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, temb: Tensor) -> tuple[Tensor, ...]:
        """Map `[B, C]` to `parts` of `[B, 1, C]`."""
        return self.linear(F.silu(temb))[:, None].chunk(self.parts, dim=-1)


class Block(nn.Module):
    """Names and numerics are those of diffusers' `JointTransformerBlock` (at attention "full", FFN ratio 4)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.updates_text = settings.updates_text
        self.norm = norm(width)
        self.norm1 = _Modulation(width, 6)
        self.norm1_context = _Modulation(width, 6 if settings.updates_text else 2)
        self.attn = JointAttention(settings.form, updates_text=settings.updates_text)
        self.ff = FeedForward(width, settings.ffn_ratio, settings.ffn_kind)
        if settings.updates_text:
            self.ff_context = FeedForward(width, settings.ffn_ratio, settings.ffn_kind)

    def forward(self, x: Tensor, temb: Tensor, text: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Map tokens `x` `[B, L, C]` and `text` `[B, T, C]` to the same shapes, or `x` alone if the text stays.

        Args:
            x: Tokens.
            temb: `[B, C]`, the embedded timestep.
            text: Text tokens.
        """
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.norm1(temb)
        normed = modulated(self.norm(x), shift, scale)
        if not self.updates_text:
            # Here diffusers' AdaLayerNormContinuous has the scale first.
            text_scale, text_shift = self.norm1_context(temb)
            read, _ = self.attn.both(normed, modulated(self.norm(text), text_shift, text_scale))
        else:
            text_shift, text_scale, text_gate, words_shift, words_scale, words_gate = self.norm1_context(temb)
            read, words = self.attn.both(normed, modulated(self.norm(text), text_shift, text_scale))
            assert words is not None  # the attention updates the text too
            text = text + text_gate * words
            text = text + words_gate * self.ff_context(modulated(self.norm(text), words_shift, words_scale))
        x = x + gate * read
        x = x + ff_gate * self.ff(modulated(self.norm(x), ff_shift, ff_scale))
        return (x, text) if self.updates_text else x
