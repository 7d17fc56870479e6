"""Denoisers: networks behind the one signature that teachers, students and samplers share.

Legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.diffusion.conditioning import Conditioning
from nas.diffusion.schedules import (
    FLOW,
    TIMESTEPS,
    Schedule,
    clean_and_noise,
    convert,
    rectified_flow,
    to_variance_preserving,
    variance_preserving,
)


class Denoiser(Protocol):
    """What teacher and student share."""

    def velocity(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The expected eps - x0 [B, C, H, W] given x_t = x [B, C, H, W] and t [B] in (0, 1]."""
        ...

    def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The expected clean x0 [B, C, H, W] given the same."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Preconditioner:
    """The exact denoiser of N(mean, sd^2 I) as a skip path, so a network only learns what that Gaussian cannot say.

    As Karras et al. 2022 (EDM, section 5) do for sigma-space, carried over to rectified flow: with
    q = t^2 + (1 - t)^2 sd^2 and xs = x - (1 - t) mean,

        v = (t - (1 - t) sd^2) / q * xs - mean + sd / sqrt(q) * F(xs / sqrt(q), t)

    F = 0 is that Gaussian's exact velocity, and for Gaussian data both F's input and its target have variance one.
    Without the skip path a narrow network on pixel-unshuffled input cannot pass the noise through: its width, not its
    design, would be scored.

    Attributes:
        mean: one value, or one per channel of the image (before pixel-unshuffle).
        sd: the data's standard deviation about it.
    """

    mean: tuple[float, ...]
    sd: float

    def _mean(self, x: Tensor) -> Tensor:
        return torch.tensor(self.mean, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)

    def _terms(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = t.to(x.dtype).view(-1, 1, 1, 1)
        return t, t**2 + (1 - t) ** 2 * self.sd**2, x - (1 - t) * self._mean(x)

    def network_input(self, x: Tensor, t: Tensor) -> Tensor:
        """What F sees, of variance one: xs / sqrt(q) [B, C, H, W]."""
        _, q, centred = self._terms(x, t)
        return centred / q.sqrt()

    def skip(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity [B, C, H, W] with F = 0."""
        t, q, centred = self._terms(x, t)
        return (t - (1 - t) * self.sd**2) / q * centred - self._mean(x)

    def output_scale(self, x: Tensor, t: Tensor) -> Tensor:
        """What F is multiplied by, [B, 1, 1, 1]."""
        _, q, _ = self._terms(x, t)
        return self.sd / q.sqrt()


Call = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]


def called(network: nn.Module, sample: Tensor, timestep: Tensor, text: Conditioning) -> Tensor:
    """Calls a network of ours: `nas.build.Network` and whatever has its signature.

    Of twice as many channels (PixArt's learnt variance) the first half is the prediction.
    """
    conditions = dict(text.parts())
    predicted: Tensor = network(sample, timestep, conditions.pop("tokens"), **conditions)
    return predicted[:, : sample.shape[1]]


class FlowDenoiser(nn.Module):
    """A network as a rectified-flow denoiser of images, behind the preconditioner and pixel-unshuffle.

    Args:
        network: called as network(sample [B, C p^2, H/p, W/p], 1000 t [B], text [B, T, D], and whatever other
            conditions there are), returns sample's shape.
        preconditioner: its skip path and scales, in image channels.
        patch: p, the side of the square of pixels folded into channels; 1 folds none.
    """

    def __init__(self, network: nn.Module, preconditioner: Preconditioner, *, patch: int = 1) -> None:
        super().__init__()
        self.network = network
        self.preconditioner = preconditioner
        self.patch = patch

    @property
    def schedule(self) -> Schedule:
        """Rectified flow."""
        return FLOW

    def velocity(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The flow eps - x0 [B, C, H, W] at x [B, C, H, W], t [B] in [0, 1]."""
        folded = functional.pixel_unshuffle(self.preconditioner.network_input(x, t), self.patch)
        if text.layout is not None:
            folded, text = folded + self._refolded(text.layout, x), replace(text, layout=None)
        predicted = functional.pixel_shuffle(called(self.network, folded, TIMESTEPS * t, text), self.patch)
        return self.preconditioner.skip(x, t) + self.preconditioner.output_scale(x, t) * predicted

    def _refolded(self, layout: Tensor, x: Tensor) -> Tensor:
        """A layout [B, C q^2, H / q, W / q] of whoever folds by q, as this network folds."""
        theirs = x.shape[-1] // layout.shape[-1]
        if theirs == self.patch:
            return layout
        return functional.pixel_unshuffle(functional.pixel_shuffle(layout, theirs), self.patch)

    def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The clean image x0 = x - t v [B, C, H, W]."""
        return x - t.view(-1, 1, 1, 1) * self.velocity(x, t, text)

    def forward(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The velocity: what training fits."""
        return self.velocity(x, t, text)


class NativeDenoiser(nn.Module):
    """A network that keeps the schedule and the prediction it was published with, so that diffusers can run it.

    Of a variance-preserving schedule it is asked at the point of equal signal-to-noise ratio, between the discrete
    levels by linear interpolation of log alpha_bar; beyond the schedule's ends at the nearest end, which is how its own
    sampler treats pure noise.

    Args:
        network: predicts latents [B, C, H, W].
        schedule: what it was trained on.
        call: how it is called; as a network of ours by default.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, call: Call = called) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.call = call

    def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The expected clean latent [B, C, H, W] at x [B, C, H, W], t [B] in [0, 1]."""
        broad = t.to(x.dtype).view(-1, 1, 1, 1)
        if self.schedule.alpha_bar is None:
            predicted = self.call(self.network, x, TIMESTEPS * t, text)
            return clean_and_noise(predicted, self.schedule.prediction, x, rectified_flow(broad))[0]
        scaled, wanted = to_variance_preserving(x, broad)
        step, alpha_bar = self.schedule.nearest(wanted.flatten())
        at = variance_preserving(alpha_bar.to(x.dtype).view(-1, 1, 1, 1))
        return clean_and_noise(self.call(self.network, scaled, step, text), self.schedule.prediction, scaled, at)[0]

    def velocity(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The expected eps - x0 [B, C, H, W]; t must be above 0."""
        broad = t.to(x.dtype).view(-1, 1, 1, 1)
        if self.schedule.alpha_bar is None and self.schedule.prediction == "velocity":
            return self.call(self.network, x, TIMESTEPS * t, text)
        return convert(self.denoise(x, t, text), "clean", "velocity", x, rectified_flow(broad))

    def forward(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The velocity: what training fits."""
        return self.velocity(x, t, text)
