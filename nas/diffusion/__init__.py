"""Rectified flow, its preconditioning and sampler, and the conversions between parameterisations.

Every model here is a denoiser: `denoise(x, t, text) -> clean`, so objectives and samplers never ask what a network
predicts. Legend: B batch, C channels, H W height and width, T text tokens, D text width; a, s are the signal and noise
coefficients of x_t = a x0 + s eps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.errors import NasError

TIMESTEPS = 1000  # diffusers' flow-matching schedulers hand a network 1000 t; our networks take the same

Prediction = Literal["clean", "noise", "velocity", "score"]


class Denoiser(Protocol):
    """What teacher and student share."""

    def denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The expected clean x0 [B, C, H, W] given x_t = x [B, C, H, W], t [B] in (0, 1] and text [B, T, D]."""
        ...


# ---------------------------------------------------------------------------------------------- parameterisations


@dataclass(frozen=True, kw_only=True, slots=True)
class Coefficients:
    """One instant of a noise schedule: x_t = a x0 + s eps, and the rates of change that its velocity is made of.

    Attributes:
        a: signal coefficient, broadcastable against x.
        s: noise coefficient.
        da: da/dt; the velocity is u = da x0 + ds eps.
        ds: ds/dt.
    """

    a: Tensor
    s: Tensor
    da: Tensor
    ds: Tensor


def rectified_flow(t: Tensor) -> Coefficients:
    """Rectified flow at t in [0, 1]: a = 1 - t, s = t, so u = eps - x0 (Liu et al. 2023)."""
    one = torch.ones_like(t)
    return Coefficients(a=1 - t, s=t, da=-one, ds=one)


def variance_preserving(alpha_bar: Tensor) -> Coefficients:
    """A variance-preserving schedule at the cumulative product `alpha_bar` in [0, 1]: a^2 + s^2 = 1.

    Its velocity is taken in trigonometric time (a = cos, s = sin), where it equals the usual v = a eps - s x0
    (Salimans and Ho 2022).
    """
    a, s = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return Coefficients(a=a, s=s, da=-s, ds=a)


def clean_and_noise(prediction: Tensor, kind: Prediction, x: Tensor, at: Coefficients) -> tuple[Tensor, Tensor]:
    """The pair (x0, eps) that a prediction of `kind` stands for at x_t = x.

    Raises:
        NasError: `kind` is unknown, or is "noise" or "score" at zero terminal SNR (a = 0), where x0 is undefined.
    """
    if kind == "velocity":
        wronskian = at.a * at.ds - at.da * at.s
        return (at.ds * x - at.s * prediction) / wronskian, (at.a * prediction - at.da * x) / wronskian
    if kind == "clean":
        return prediction, (x - at.a * prediction) / at.s
    if kind in ("noise", "score"):
        if bool((at.a == 0).any()):
            raise NasError(f"a {kind} prediction says nothing about x0 where the signal coefficient is 0")
        noise = prediction if kind == "noise" else -at.s * prediction
        return (x - at.s * noise) / at.a, noise
    raise NasError(f"unknown prediction {kind!r}; known: clean, noise, score, velocity")


def convert(prediction: Tensor, source: Prediction, to: Prediction, x: Tensor, at: Coefficients) -> Tensor:
    """A prediction of kind `source` at x_t = x, expressed as kind `to`; linear in `prediction` at fixed x and t."""
    if source == to:
        return prediction
    clean, noise = clean_and_noise(prediction, source, x, at)
    if to == "clean":
        return clean
    if to == "noise":
        return noise
    if to == "velocity":
        return at.da * clean + at.ds * noise
    if to == "score":
        return -noise / at.s
    raise NasError(f"unknown prediction {to!r}; known: clean, noise, score, velocity")


def to_rectified_flow(x: Tensor, at: Coefficients) -> tuple[Tensor, Tensor]:
    """The rectified-flow point (x, t) of equal signal-to-noise ratio; x0 and eps are the same in both."""
    total = at.a + at.s
    return x / total, at.s / total


def to_variance_preserving(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The variance-preserving point (x, alpha_bar) of equal signal-to-noise ratio as rectified flow's (x, t)."""
    norm = ((1 - t) ** 2 + t**2).sqrt()
    return x / norm, ((1 - t) / norm) ** 2


# ------------------------------------------------------------------------------------------------- preconditioning


def noised(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t eps for t [B] and x0, eps [B, C, H, W]."""
    t = t.view(-1, 1, 1, 1)
    return (1 - t) * clean + t * noise


def sample_times(count: int, generator: torch.Generator, high_noise: float = 0.5) -> Tensor:
    """Training times [count] in (0, 1): sigmoid(N(0, 1)), a share of them sigmoid(1.2 + 1.3 N(0, 1)), interleaved.

    Args:
        count: how many.
        generator: CPU generator.
        high_noise: the share of the second kind. It leans to high noise, where the text decides what is drawn; the
            first keeps fine grain trained.
    """
    normal = torch.randn(count, generator=generator)
    place = torch.arange(count + 1, dtype=torch.float64) * high_noise
    shifted = place[1:].floor() > place[:-1].floor()
    return torch.sigmoid(torch.where(shifted, 1.2 + 1.3 * normal, normal))


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


class FlowDenoiser(nn.Module):
    """A network as a rectified-flow denoiser of images, behind the preconditioner and pixel-unshuffle.

    Args:
        network: called as network(sample [B, C p^2, H/p, W/p], 1000 t [B], text [B, T, D]), returns sample's shape.
        preconditioner: its skip path and scales, in image channels.
        patch: p, the side of the square of pixels folded into channels; 1 folds none.
    """

    def __init__(self, network: nn.Module, preconditioner: Preconditioner, *, patch: int = 1) -> None:
        super().__init__()
        self.network = network
        self.preconditioner = preconditioner
        self.patch = patch

    def velocity(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The flow eps - x0 [B, C, H, W] at x [B, C, H, W], t [B] in [0, 1], text [B, T, D]."""
        folded = functional.pixel_unshuffle(self.preconditioner.network_input(x, t), self.patch)
        predicted = functional.pixel_shuffle(self.network(folded, TIMESTEPS * t, text), self.patch)
        return self.preconditioner.skip(x, t) + self.preconditioner.output_scale(x, t) * predicted

    def denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The clean image x0 = x - t v [B, C, H, W]."""
        return x - t.view(-1, 1, 1, 1) * self.velocity(x, t, text)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The velocity: what training fits."""
        return self.velocity(x, t, text)


# -------------------------------------------------------------------------------------------------------- sampling


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance u + k (c - u); k = 1 is the conditional prediction (Ho and Salimans 2022: k = w + 1)."""
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    text: Tensor,
    null_text: Tensor,
    *,
    shape: tuple[int, ...],
    generator: torch.Generator,
    steps: int = 20,
    guidance: float = 2.0,
) -> Tensor:
    """Images [B, C, H, W] by `steps` uniform Euler steps from t = 1 to 0 with diffusers' flow-matching scheduler.

    Args:
        denoiser: predicts x0; the velocity is (x - x0) / t whatever the network behind it predicts.
        text: [B, T, D].
        null_text: [B, T, D] or [1, T, D], the text of no caption; not used when guidance is 1.
        shape: (C, H, W) of one image.
        generator: CPU generator of the starting noise, so that the noise does not depend on the device.
        steps: calls of the denoiser (with guidance both texts go through it as one batch of 2 B).
        guidance: k of `guided`.
    """
    # Imported here: diffusers takes longer to import than a proxy worker needs it (it never samples).
    from diffusers import FlowMatchEulerDiscreteScheduler

    if steps < 1:
        raise NasError(f"sampling needs at least 1 step, got {steps}")
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist(), device=text.device)
    batch = text.shape[0]
    x = torch.randn((batch, *shape), generator=generator).to(device=text.device)
    both = guidance != 1.0
    texts = torch.cat([text, null_text.expand_as(text)]) if both else text
    for timestep in scheduler.timesteps:
        t = (timestep / TIMESTEPS).to(x.dtype)
        repeated = torch.cat([x, x]) if both else x
        clean = denoiser.denoise(repeated, t.expand(len(repeated)), texts)
        if both:
            clean = guided(clean[:batch], clean[batch:], guidance)
        x = scheduler.step((x - clean) / t, timestep, x).prev_sample
    return x
