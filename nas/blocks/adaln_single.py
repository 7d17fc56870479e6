"""Time embedding of a diffusion transformer, with the modulation that all its blocks share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nas.blocks import check, check_positive
from nas.blocks._dit import SiluMlp
from nas.blocks.time_embedding import sinusoid

_KIND = "adaln_single"
_FREQUENCIES = 256  # sinusoidal features of every number, in PixArt and SD3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Shape of the embedding.

    Attributes:
        width: Width C of the tokens.
        modulation: Whether the six modulations follow the embedded timestep; blocks that make their own need none.
        size_conditions: Whether height, width and aspect ratio of the wanted image are embedded too (a third of
            `width` each).
    """

    width: int
    modulation: bool = True
    size_conditions: bool = False

    def __post_init__(self) -> None:
        check_positive(_KIND, width=self.width)
        whole = not self.size_conditions or self.width % 3 == 0
        check(whole, _KIND, "width", self.width, "a multiple of 3 with size_conditions")


class _Embeddings(nn.Module):
    """Timestep, and the sizes where they are conditions: diffusers' `PixArtAlphaCombinedTimestepSizeEmbeddings`."""

    def __init__(self, width: int, *, sizes: bool) -> None:
        super().__init__()
        self.timestep_embedder = SiluMlp(_FREQUENCIES, width)
        if sizes:
            self.resolution_embedder = SiluMlp(_FREQUENCIES, width // 3)
            self.aspect_ratio_embedder = SiluMlp(_FREQUENCIES, width // 3)

    def forward(self, timestep: Tensor, size_ids: Tensor | None) -> Tensor:
        """`[B]` and `[B, 3]` (height, width, aspect ratio) to `[B, C]`."""
        dtype = self.timestep_embedder.linear_1.weight.dtype
        embedded = self.timestep_embedder(sinusoid(timestep, _FREQUENCIES).to(dtype))
        if size_ids is None:
            return embedded
        sides = sinusoid(size_ids[:, :2].flatten(), _FREQUENCIES).to(dtype)
        ratio = sinusoid(size_ids[:, 2], _FREQUENCIES).to(dtype)
        sizes = self.resolution_embedder(sides).reshape(embedded.shape[0], -1)
        return embedded + torch.cat([sizes, self.aspect_ratio_embedder(ratio)], dim=1)


class Block(nn.Module):
    """Timestep to `temb`: the embedded timestep `[B, C]`, then, with modulation, six times C from a linear layer.

    Names and numerics are those of diffusers' `AdaLayerNormSingle`, which returns the two parts separately
    (PixArt-alpha, arXiv 2310.00426, section 2.3).
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.size_conditions = settings.size_conditions
        self.emb = _Embeddings(width, sizes=settings.size_conditions)
        self.linear = nn.Linear(width, 6 * width) if settings.modulation else None

    def forward(self, timestep: Tensor, size_ids: Tensor | None = None) -> Tensor:
        """Map `timestep` `[B]` and, if asked to, `size_ids` `[B, 3]` to `[B, 7 C]`, or `[B, C]` without modulation."""
        check((size_ids is not None) == self.size_conditions, _KIND, "size_ids", size_ids, "given with size_conditions")
        embedded = self.emb(timestep, size_ids)
        if self.linear is None:
            return embedded
        return torch.cat([embedded, self.linear(F.silu(embedded))], dim=1)
