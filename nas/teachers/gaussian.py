"""An exact teacher for tests: the denoiser of Gaussian data in closed form (no network, no training)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nas.diffusion import FLOW, Conditioning, Schedule, rectified_flow


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussianTeacher:
    """Data N(mean + shift, diag(sd^2)), where a caption shifts the mean by `pull` times the mean of its text.

    x0*(x) = mu + a S M^-1 (x - a mu) with S = sd^2, M = a^2 S + s^2, a = 1 - t, s = t. With equal covariances
    classifier-free guidance k is the exact denoiser of the mean m_u + k (m_c - m_u).

    Attributes:
        mean: [C, H, W].
        sd: [C, H, W] or a scalar tensor, above 0.
        pull: how far a text whose entries average 1 shifts the mean.
        text_shape: (T, D).
    """

    mean: Tensor
    sd: Tensor
    pull: float = 0.0
    text_shape: tuple[int, int] = (4, 8)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.mean.shape)

    @property
    def schedule(self) -> Schedule:
        """Rectified flow."""
        return FLOW

    def encode(self, tokens: Tensor) -> Conditioning:
        """Text [B, T, D]: each token id [B, T] repeated D times."""
        return Conditioning(tokens=tokens.to(self.mean.dtype)[..., None].expand(-1, -1, self.text_shape[1]))

    def null_text(self, count: int = 1) -> Conditioning:
        """Zeros [count, T, D]."""
        return Conditioning(tokens=torch.zeros((count, *self.text_shape), dtype=self.mean.dtype))

    def mean_given(self, text: Conditioning) -> Tensor:
        """The data's mean [B, C, H, W] under text [B, T, D]."""
        return self.mean + self.pull * text.tokens.mean((1, 2)).view(-1, 1, 1, 1)

    def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """x0*(x) [B, C, H, W], exact."""
        at = rectified_flow(t.to(x.dtype).view(-1, 1, 1, 1))
        mean, variance = self.mean_given(text), self.sd**2
        return mean + at.a * variance / (at.a**2 * variance + at.s**2) * (x - at.a * mean)

    def velocity(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """eps* - x0* [B, C, H, W], exact; eps* = s M^-1 (x - a mu), so t = 0 is no special case."""
        at = rectified_flow(t.to(x.dtype).view(-1, 1, 1, 1))
        mean, variance = self.mean_given(text), self.sd**2
        return (at.s - at.a * variance) / (at.a**2 * variance + at.s**2) * (x - at.a * mean) - mean
