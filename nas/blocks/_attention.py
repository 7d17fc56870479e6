"""Attention of a transformer over image tokens: full, over compressed keys, over windows, both of these, linear.

Shared by the block kinds of diffusion transformers. All forms have the projections of diffusers' `Attention`; key and
value heads may be fewer than query heads (Shazeer 2019, arXiv 1911.02150; Ainslie et al. 2023, arXiv 2305.13245).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check, check_positive

KINDS = ("full", "kv-compressed", "window", "sparse", "linear")
_ON_A_GRID = ("kv-compressed", "window", "sparse")
_COMPRESSED = ("kv-compressed", "sparse")
_LINEAR_EPS = 1e-15  # as in diffusers' SanaLinearAttnProcessor2_0, which also computes in float32


@dataclass(frozen=True, kw_only=True)
class Form:
    """What an attention layer looks like.

    Attributes:
        width: Width of the tokens.
        heads: Query heads N.
        kv_heads: Key and value heads, a divisor of `heads`.
        kind: One of `KINDS`.
        rows: Rows of the grid that the tokens are, in reading order; 0 where `kind` needs no grid.
        columns: Its columns.
        window: Most tokens along a side of a window; it is the largest divisor of the grid's side not above.
    """

    width: int
    heads: int
    kv_heads: int
    kind: str = "full"
    rows: int = 0
    columns: int = 0
    window: int = 0

    def checked(self, block: str) -> Form:
        """Itself; raises in the name of the block kind `block` where a value is out of range."""
        check_positive(block, width=self.width, heads=self.heads, kv_heads=self.kv_heads)
        check(self.width % self.heads == 0, block, "heads", self.heads, f"a divisor of width = {self.width}")
        shared = self.heads % self.kv_heads == 0
        check(shared, block, "kv_heads", self.kv_heads, f"a divisor of heads = {self.heads}")
        check(self.kind in KINDS, block, "attention", self.kind, ", ".join(KINDS))
        if self.kind in _ON_A_GRID:
            check_positive(block, rows=self.rows, columns=self.columns)
        if self.kind in _COMPRESSED:
            check(self.rows % 2 == 0, block, "rows", self.rows, "even, so that keys can be merged in twos")
            check(self.columns % 2 == 0, block, "columns", self.columns, "even, so that keys can be merged in twos")
        if self.kind in ("window", "sparse"):
            check_positive(block, window=self.window)
        return self

    @property
    def window_sides(self) -> tuple[int, int]:
        """Rows and columns of a window."""
        rows, columns = (
            max(d for d in range(1, min(self.window, side) + 1) if side % d == 0) for side in (self.rows, self.columns)
        )
        return rows, columns

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.heads


class Attention(nn.Module):
    """Attention of image tokens to themselves, or to a context (then always full).

    The kinds beside full softmax attention:

    * kv-compressed: keys and values of each 2x2 tokens become one by a strided depthwise convolution, initialised to
      the mean, and a LayerNorm (PixArt-Sigma, arXiv 2403.04692, section 3.3; `sr` and `norm` as in its code, where
      keys and values share them).
    * window: tokens attend within non-overlapping square windows.
    * sparse: both of these, mixed per token and head by a sigmoid of a linear layer (`gate`). It follows SnapGen++'s
      "adaptive global-local sparse attention" (arXiv 2601.08303); the gate is our reconstruction, and its local part
      sees neighbouring blocks too, ours does not.
    * linear: ReLU of queries and keys instead of the softmax (SANA, arXiv 2410.10629, section 2.2), without the
      convolutions that SANA adds to its feed-forward layer.
    """

    def __init__(self, form: Form, context_width: int) -> None:
        super().__init__()
        self.form = form
        kv_width = form.kv_heads * form.head_width
        self.to_q = nn.Linear(form.width, form.width)
        self.to_k = nn.Linear(context_width, kv_width)
        self.to_v = nn.Linear(context_width, kv_width)
        if form.kind in _COMPRESSED:
            self.sr = nn.Conv2d(kv_width, kv_width, kernel_size=2, stride=2, groups=kv_width)
            nn.init.constant_(self.sr.weight, 0.25)
            nn.init.zeros_(self.sr.bias)  # type: ignore[arg-type]
            self.norm = nn.LayerNorm(kv_width)
        if form.kind == "sparse":
            self.gate = nn.Linear(form.width, form.heads)
        self.to_out = nn.ModuleList([nn.Linear(form.width, form.width)])

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Attend `tokens` `[B, L, C]` to `context` `[B, S, D]`; returns `[B, L, C]`."""
        query = _heads(self.to_q(tokens), self.form.heads)
        mixed = self.mix(tokens, query, self.to_k(context), self.to_v(context))
        return self.to_out[0](_joined(mixed))

    def mix(
        self, tokens: Tensor, query: Tensor, key: Tensor, value: Tensor, text: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """What each query reads, `[B, N, L, w]`.

        Args:
            tokens: `[B, L, C]`, which the gate of sparse attention reads.
            query: `[B, N, L, w]`.
            key: `[B, S, kv]`, of the image.
            value: `[B, S, kv]`.
            text: Keys and values `[B, kv heads, T, w]` that every query sees as well.
        """
        if self.form.kind == "window":
            return self._within_windows(query, key, value, text)
        everywhere = self.everywhere(query, *self.sources(key, value, text))
        if self.form.kind != "sparse":
            return everywhere
        gate = torch.sigmoid(self.gate(tokens)).transpose(1, 2)[..., None]
        near = self._within_windows(query, key, value, text)
        return near + gate * (everywhere - near)

    def sources(self, key: Tensor, value: Tensor, text: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, kv heads, S', w]` of the whole image, compressed if the kind says so, then the text."""
        pair = [
            _heads(self._compressed(states) if self.form.kind in _COMPRESSED else states, self.form.kv_heads)
            for states in (key, value)
        ]
        if text is not None:
            pair = [torch.cat(both, dim=2) for both in zip(pair, text, strict=True)]
        return pair[0], pair[1]

    def everywhere(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Softmax or linear attention of `[B, N, L, w]` to `[B, kv heads, S, w]`."""
        return (linear_attention if self.form.kind == "linear" else softmax_attention)(query, key, value)

    def _compressed(self, states: Tensor) -> Tensor:
        batch, _, width = states.shape
        image = states.transpose(1, 2).reshape(batch, width, self.form.rows, self.form.columns)
        # A real copy back to tokens, stated, so that the trace counts it as layout.
        return self.norm(self.sr(image).flatten(2).transpose(1, 2).contiguous())

    def _within_windows(self, query: Tensor, key: Tensor, value: Tensor, text: tuple[Tensor, Tensor] | None) -> Tensor:
        form = self.form
        grid = (form.rows, form.columns)
        sides = form.window_sides
        batch = query.shape[0]
        windows = (form.rows // sides[0]) * (form.columns // sides[1])
        keys, values = (_windowed(_heads(states, form.kv_heads), grid, sides) for states in (key, value))
        if text is not None:
            seen = [_repeated(states, windows) for states in text]
            keys, values = torch.cat([keys, seen[0]], dim=2), torch.cat([values, seen[1]], dim=2)
        mixed = softmax_attention(_windowed(query, grid, sides), keys, values)
        return _unwindowed(mixed, batch, grid, sides)


class JointAttention(Attention):
    """Image and text tokens attend to each other, with projections of their own (Esser et al. 2024, arXiv 2403.03206).

    Names and numerics at kind "full" are those of diffusers' `Attention` with `JointAttnProcessor2_0`. At the other
    kinds every image token also sees all of the text, and the text sees the whole image (compressed where image tokens
    see it so); that is ours.
    """

    def __init__(self, form: Form, *, updates_text: bool) -> None:
        super().__init__(form, form.width)
        kv_width = form.kv_heads * form.head_width
        self.add_k_proj = nn.Linear(form.width, kv_width)
        self.add_v_proj = nn.Linear(form.width, kv_width)
        self.add_q_proj = nn.Linear(form.width, form.width)
        self.to_add_out = nn.Linear(form.width, form.width) if updates_text else None

    def both(self, tokens: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attend `tokens` `[B, L, C]` and `text` `[B, T, C]` to both; the second is None if the text stays."""
        form, length = self.form, tokens.shape[1]
        query, key, value = _heads(self.to_q(tokens), form.heads), self.to_k(tokens), self.to_v(tokens)
        text_query = _heads(self.add_q_proj(text), form.heads)
        pair = (_heads(self.add_k_proj(text), form.kv_heads), _heads(self.add_v_proj(text), form.kv_heads))
        if form.kind in ("window", "sparse"):
            image = _joined(self.mix(tokens, query, key, value, pair))
            if self.to_add_out is None:
                return self.to_out[0](image), None
            words = _joined(self.everywhere(text_query, *self.sources(key, value, pair)))
        else:
            # As diffusers: the text's queries are computed even where the text stays.
            joint = torch.cat([query, text_query], dim=2)
            mixed = _joined(self.everywhere(joint, *self.sources(key, value, pair)))
            image, words = mixed[:, :length], mixed[:, length:]
        return self.to_out[0](image), None if self.to_add_out is None else self.to_add_out(words)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of `[B, N, L, w]` to `[B, kv heads, S, w]`: `[B, N, L, w]`."""
    heads = query.shape[1]
    return F.scaled_dot_product_attention(query, _spread(key, heads), _spread(value, heads))


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention with weights `relu(q_i) . relu(k_j)`, normalised to sum 1 over j, in a time linear in the tokens.

    Args:
        query: `[B, N, L, w]`.
        key: `[B, kv heads, S, w]`.
        value: `[B, kv heads, S, w]`.

    Returns:
        `[B, N, L, w]`: SANA (arXiv 2410.10629), equation 1. The sum over keys is one `w x (w + 1)` matrix per key
        head, whose last column sums the weights.
    """
    batch, heads, length, width = query.shape
    query, key = F.relu(query.to(torch.float32)), F.relu(key.to(torch.float32))
    summed = key.transpose(-1, -2) @ F.pad(value.to(torch.float32), (0, 1), value=1.0)
    groups = key.shape[1]
    # Query heads of one group are neighbours, so that they can be stacked as further tokens.
    stacked = query.reshape(batch, groups, heads // groups * length, width)
    weighted = stacked @ summed
    mixed = weighted[..., :width] / (weighted[..., width:] + _LINEAR_EPS)
    return mixed.reshape(batch, heads, length, width).to(value.dtype)


def _heads(states: Tensor, heads: int) -> Tensor:
    """`[B, S, heads * w]` to `[B, heads, S, w]`."""
    batch, source, width = states.shape
    return states.reshape(batch, source, heads, width // heads).transpose(1, 2)


def _joined(states: Tensor) -> Tensor:
    """`[B, N, L, w]` to `[B, L, N * w]`."""
    batch, heads, length, width = states.shape
    return states.transpose(1, 2).reshape(batch, length, heads * width)


def _spread(states: Tensor, heads: int) -> Tensor:
    """Give every query head its key or value head: `[B, kv heads, S, w]` to `[B, N, S, w]`."""
    batch, groups, source, width = states.shape
    if groups == heads:
        return states
    return states[:, :, None].expand(batch, groups, heads // groups, source, width).reshape(batch, heads, source, width)


def _windowed(states: Tensor, grid: tuple[int, int], sides: tuple[int, int]) -> Tensor:
    """`[B, heads, rows * columns, w]` to `[B * windows, heads, tokens of a window, w]`."""
    batch, heads, _, width = states.shape
    down, across = grid[0] // sides[0], grid[1] // sides[1]
    split = states.reshape(batch, heads, down, sides[0], across, sides[1], width).permute(0, 2, 4, 1, 3, 5, 6)
    return split.reshape(batch * down * across, heads, sides[0] * sides[1], width)


def _unwindowed(states: Tensor, batch: int, grid: tuple[int, int], sides: tuple[int, int]) -> Tensor:
    """The inverse of `_windowed`."""
    _, heads, _, width = states.shape
    down, across = grid[0] // sides[0], grid[1] // sides[1]
    split = states.reshape(batch, down, across, heads, sides[0], sides[1], width).permute(0, 3, 1, 4, 2, 5, 6)
    return split.reshape(batch, heads, grid[0] * grid[1], width)


def _repeated(states: Tensor, windows: int) -> Tensor:
    """The same text for every window: `[B, heads, T, w]` to `[B * windows, heads, T, w]`."""
    batch, heads, length, width = states.shape
    shared = states[:, None].expand(batch, windows, heads, length, width)
    return shared.reshape(batch * windows, heads, length, width)
