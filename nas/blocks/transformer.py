"""Transformer stage over the pixels of a feature map: self-attention, cross-attention, GEGLU.

Key and value heads may be fewer than query heads (grouped-query attention; 1 = multi-query, Shazeer
2019), queries and keys may be RMS-normalised per head, self-attention may know where its pixels lie
(rotary embedding), and self-attention may be left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check, check_groups, check_positive

_KIND = "transformer"
_QK_NORMS = ("none", "rms_norm")
_PROJECTIONS = ("linear", "conv")
_GROUP_EPS = 1e-6  # diffusers: GroupNorm before a transformer uses 1e-6, all other norms 1e-5
_NORM_EPS = 1e-5
_ROPE_BASE = 10_000.0

# Cosines and sines by which the heads of every pixel are turned, [L, 1, w / 2] each.
_Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Shape of a transformer stage.

    Attributes:
        channels: Channels of the feature map and width of the tokens.
        depth: Number of transformer layers.
        head_width: Width of one attention head; `channels / head_width` query heads.
        kv_heads: Key and value heads; 1 is multi-query, all query heads is the plain form.
        text_width: Width D of the text tokens; unused (0) without cross-attention.
        self_attention: Attend between pixels. Without it the normalised tokens replace the
            tokens, with no residual sum, as DreamLite does.
        cross_attention: Attend to the text.
        qk_norm: `none`, or `rms_norm` of every query and key head.
        ffn_ratio: Inner width of the GEGLU as a multiple of `channels`.
        norm_groups: Groups of the GroupNorm in front.
        projection: `linear`, or `conv` for 1x1 convolutions before and after the layers, as Stable Diffusion 1.x
            has them; the outputs are the same, the weights have two more axes.
        rope: Turn queries and keys of self-attention by the place of their pixel (see `rotation`).
    """

    channels: int
    depth: int
    head_width: int
    kv_heads: int
    text_width: int
    self_attention: bool
    cross_attention: bool
    qk_norm: str
    ffn_ratio: float
    norm_groups: int
    projection: str = "linear"
    rope: bool = False

    def __post_init__(self) -> None:
        check_positive(
            _KIND,
            channels=self.channels,
            depth=self.depth,
            head_width=self.head_width,
            kv_heads=self.kv_heads,
            norm_groups=self.norm_groups,
            text_width=self.text_width if self.cross_attention else 1,
        )
        check_groups(_KIND, self.norm_groups, channels=self.channels)
        whole = self.channels % self.head_width == 0
        check(whole, _KIND, "head_width", self.head_width, f"a divisor of channels = {self.channels}")
        shared = self.heads % self.kv_heads == 0
        check(shared, _KIND, "kv_heads", self.kv_heads, f"a divisor of the {self.heads} query heads")
        check(self.qk_norm in _QK_NORMS, _KIND, "qk_norm", self.qk_norm, " or ".join(_QK_NORMS))
        check(self.ffn_ratio > 0, _KIND, "ffn_ratio", self.ffn_ratio, "above 0")
        check(self.projection in _PROJECTIONS, _KIND, "projection", self.projection, " or ".join(_PROJECTIONS))
        turns = not self.rope or self.head_width % 4 == 0
        check(turns, _KIND, "head_width", self.head_width, "a multiple of 4 with rope = True: two axes of pairs")

    @property
    def heads(self) -> int:
        """Number of query heads N."""
        return self.channels // self.head_width


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learnt scale (Zhang & Sennrich 2019, eq. 4).

    Written out, in float32 like the diffusers layer of the same name, because exporters that predate
    a fused operator accept it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., width]`; the result has the precision of `x`."""
        mean_square = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return (x * torch.rsqrt(mean_square + _NORM_EPS)).to(x.dtype) * self.weight


def rotation(height: int, width: int, head_width: int, like: Tensor) -> _Rotation:
    """Cosines and sines of a rotary embedding over a grid of pixels.

    RoFormer (arXiv 2104.09864, eq. 15: angle = place * 10000^(-2i/d)) along both axes: the first half of a head's
    pairs turns with the row, the second with the column, so that the scores of two pixels depend on their offset
    alone. SnapGen's design ladder adds rotary embeddings in its last step (arXiv 2412.09619).

    Args:
        height: Rows H.
        width: Columns W.
        head_width: Channels of a head, a multiple of 4.
        like: A tensor of the wanted device and precision.

    Returns:
        Two tensors `[H * W, 1, head_width / 2]`, row by row; angles are worked out in float32.
    """
    pairs = head_width // 4
    index = torch.arange(pairs, dtype=torch.float32, device=like.device)
    frequency = torch.exp(index * (-math.log(_ROPE_BASE) / pairs))
    rows = torch.arange(height, dtype=torch.float32, device=like.device)[:, None] * frequency
    columns = torch.arange(width, dtype=torch.float32, device=like.device)[:, None] * frequency
    shape = (height, width, pairs)
    angle = torch.cat([rows[:, None].expand(shape), columns[None].expand(shape)], dim=2).reshape(-1, 1, 2 * pairs)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(states: Tensor, turn: _Rotation) -> Tensor:
    """Turn each pair of channels (i, i + w / 2) of `states` `[B, L, N, w]` by its pixel's angles.

    RoFormer pairs neighbouring channels instead, which is the same up to the order of a head's channels.
    """
    cos, sin = turn
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Attention of the tokens to themselves or to a context, with shared key and value heads."""

    def __init__(self, settings: Settings, context_width: int) -> None:
        super().__init__()
        width, kv_width = settings.channels, settings.kv_heads * settings.head_width
        self.heads, self.kv_heads = settings.heads, settings.kv_heads
        self.head_width = settings.head_width
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, kv_width, bias=False)
        self.to_v = nn.Linear(context_width, kv_width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        normed = settings.qk_norm == "rms_norm"
        self.norm_q = RMSNorm(settings.head_width) if normed else None
        self.norm_k = RMSNorm(settings.head_width) if normed else None

    def forward(self, tokens: Tensor, context: Tensor, turn: _Rotation | None = None) -> Tensor:
        """Attend `tokens` `[B, L, C]` to `context` `[B, S, D]`, turned by `turn` if any; returns `[B, L, C]`."""
        batch, length, width = tokens.shape
        source = context.shape[1]
        query = self.to_q(tokens).reshape(batch, length, self.heads, self.head_width)
        key = self.to_k(context).reshape(batch, source, self.kv_heads, self.head_width)
        value = self.to_v(context).reshape(batch, source, self.kv_heads, self.head_width)
        if self.norm_q is not None and self.norm_k is not None:
            query, key = self.norm_q(query), self.norm_k(key)
        if turn is not None:
            query, key = rotate(query, turn), rotate(key, turn)
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), self._spread(key), self._spread(value))
        return self.to_out[0](mixed.transpose(1, 2).reshape(batch, length, width))

    def _spread(self, states: Tensor) -> Tensor:
        """Give every query head its key or value head: `[B, S, kv, w]` to `[B, N, S, w]`."""
        states = states.transpose(1, 2)
        if self.kv_heads == self.heads:
            return states
        batch, _, source, width = states.shape
        # Query heads of one group are neighbours (repeat-interleave order), hence the middle axis.
        share = self.heads // self.kv_heads
        states = states[:, :, None].expand(batch, self.kv_heads, share, source, width)
        return states.reshape(batch, self.heads, source, width)


class GEGLU(nn.Module):
    """Linear to twice the width; one half gates the other through GELU (Shazeer 2020, eq. 6)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `[B, L, C]` to `[B, L, inner]`."""
        hidden, gate = self.proj(tokens).chunk(2, dim=-1)
        return hidden * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU and a linear layer back; position 1 of `net` is where diffusers keeps its dropout."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, inner), nn.Identity(), nn.Linear(inner, width)])

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `[B, L, C]` to `[B, L, C]`."""
        return self.net[2](self.net[0](tokens))


class Layer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each behind its own LayerNorm."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.channels
        self.norm1 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.attn1 = Attention(settings, width) if settings.self_attention else None
        cross = settings.cross_attention
        self.norm2 = nn.LayerNorm(width, eps=_NORM_EPS) if cross else None
        self.attn2 = Attention(settings, settings.text_width) if cross else None
        self.norm3 = nn.LayerNorm(width, eps=_NORM_EPS)
        self.ff = FeedForward(width, int(width * settings.ffn_ratio))

    def forward(self, tokens: Tensor, text: Tensor | None, turn: _Rotation | None = None) -> Tensor:
        """Map `tokens` `[B, L, C]` to `[B, L, C]`, reading `text` `[B, T, D]` if it attends to it."""
        tokens = self._attended_to_itself(tokens, turn)
        if self.attn2 is not None and self.norm2 is not None:
            assert text is not None  # the Block checks
            tokens = self.attn2(self.norm2(tokens), text) + tokens
        return self.ff(self.norm3(tokens)) + tokens

    def _attended_to_itself(self, tokens: Tensor, turn: _Rotation | None) -> Tensor:
        normed = self.norm1(tokens)
        # Without self-attention the normalised tokens go on alone: no residual sum (DreamLite).
        return normed if self.attn1 is None else self.attn1(normed, normed, turn) + tokens


class Block(nn.Module):
    """GroupNorm, projection in, `depth` layers, projection out, plus the input.

    Names and numerics are those of diffusers' `Transformer2DModel` and `DreamLiteTransformer2DModel` with
    `use_linear_projection` true (`projection="linear"`) or false ("conv").
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.channels
        self.reads_text = settings.cross_attention
        self.rope_width = settings.head_width if settings.rope and settings.self_attention else 0
        self.convolves = settings.projection == "conv"
        self.norm = nn.GroupNorm(settings.norm_groups, width, eps=_GROUP_EPS)
        self.proj_in = nn.Conv2d(width, width, kernel_size=1) if self.convolves else nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([Layer(settings) for _ in range(settings.depth)])
        self.proj_out = nn.Conv2d(width, width, kernel_size=1) if self.convolves else nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        """Map `x` `[B, C, H, W]` to the same shape, attending to `text` `[B, T, D]` if asked to."""
        check(text is not None or not self.reads_text, _KIND, "text", text, "given to cross-attend")
        batch, width, height, wide = x.shape
        turn = rotation(height, wide, self.rope_width, x) if self.rope_width else None
        tokens = self._tokens(x)
        for layer in self.transformer_blocks:
            tokens = layer(tokens, text, turn)
        if not self.convolves:
            return self.proj_out(tokens).transpose(1, 2).reshape(batch, width, height, wide) + x
        hidden = tokens.transpose(1, 2).reshape(batch, width, height, wide).contiguous()
        return self.proj_out(hidden) + x

    def _tokens(self, x: Tensor) -> Tensor:
        """The normalised and projected pixels as tokens `[B, L, C]`."""
        hidden = self.norm(x)
        if self.convolves:
            hidden = self.proj_in(hidden)
        # Channels-last tokens are a real copy: stated, so that the trace counts it as layout.
        tokens = hidden.flatten(2).transpose(1, 2).contiguous()
        return tokens if self.convolves else self.proj_in(tokens)
