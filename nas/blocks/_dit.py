"""Layers that the block kinds of diffusion transformers share: feed-forward, modulated norm, two-layer embedding."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check
from nas.blocks.transformer import GEGLU

FFN_KINDS = ("gelu", "geglu")
NORM_EPS = 1e-6  # diffusers: every LayerNorm of PixArtTransformer2DModel and JointTransformerBlock


class _Gelu(nn.Module):
    """Linear, then GELU in its tanh approximation."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `[B, L, C]` to `[B, L, inner]`."""
        return F.gelu(self.proj(tokens), approximate="tanh")


class FeedForward(nn.Module):
    """Activation and a linear layer back; position 1 of `net` is where diffusers keeps its dropout."""

    def __init__(self, width: int, ratio: float, kind: str) -> None:
        super().__init__()
        inner = int(width * ratio)
        first = _Gelu(width, inner) if kind == "gelu" else GEGLU(width, inner)
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(inner, width)])

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `[B, L, C]` to `[B, L, C]`."""
        return self.net[2](self.net[0](tokens))


class SiluMlp(nn.Module):
    """Linear, SiLU, linear: diffusers' `TimestepEmbedding`."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """Map `[B, in_width]` to `[B, width]`."""
        return self.linear_2(F.silu(self.linear_1(features)))


def norm(width: int) -> nn.LayerNorm:
    """A LayerNorm without weights, for a modulation to follow."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=NORM_EPS)


def modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`[B, L, C]` scaled and shifted by `[B, 1, C]` (Peebles & Xie 2023, arXiv 2212.09748, section 3.2)."""
    return tokens * (1 + scale) + shift


def check_ffn(block: str, ratio: float, kind: str) -> None:
    """Raise unless a feed-forward layer can be made."""
    check(ratio > 0, block, "ffn_ratio", ratio, "above 0")
    check(kind in FFN_KINDS, block, "ffn_kind", kind, " or ".join(FFN_KINDS))
