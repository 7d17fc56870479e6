"""Noise schedules and the conversions between parameterisations and between schedules.

Legend: B batch, C channels, H W height and width; a, s are the signal and noise coefficients of x_t = a x0 + s eps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from nas.errors import NasError

TIMESTEPS = 1000  # diffusers' flow-matching schedulers hand a network 1000 t; our networks take the same

Prediction = Literal["clean", "noise", "velocity", "score"]


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """The noise levels a network knows, 0 the least noisy, and what it predicts.

    Attributes:
        prediction: what its network predicts.
        alpha_bar: a variance-preserving schedule's cumulative products [levels], falling; None for rectified flow,
            whose level i is t = (i + 1) / 1000.
    """

    prediction: Prediction = "velocity"
    alpha_bar: Tensor | None = None

    @property
    def levels(self) -> int:
        """How many discrete levels there are."""
        return TIMESTEPS if self.alpha_bar is None else len(self.alpha_bar)

    def times(self, level: Tensor) -> Tensor:
        """The rectified-flow time of each level (whole numbers, any shape): s / (a + s)."""
        if self.alpha_bar is None:
            return (level + 1) / TIMESTEPS
        at = variance_preserving(self.alpha_bar.to(device=level.device, dtype=torch.float64)[level])
        return (at.s / (at.a + at.s)).to(torch.get_default_dtype())

    @property
    def least(self) -> float:
        """The time of its lowest level; 0 for rectified flow, which knows every t."""
        return 0.0 if self.alpha_bar is None else float(self.times(torch.tensor(0)))

    @property
    def most(self) -> float:
        """The time of its highest level; SD 1.x stops at 0.936 and has never seen pure noise."""
        return 1.0 if self.alpha_bar is None else float(self.times(torch.tensor(self.levels - 1)))

    def nearest(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The fractional level [B] of each wanted alpha_bar [B], and the alpha_bar that it has."""
        if self.alpha_bar is None:
            raise NasError("rectified flow has no alpha_bar")
        # Zero terminal SNR ends at alpha_bar = 0, whose logarithm is no number to interpolate with.
        grid = self.alpha_bar.to(device=wanted.device, dtype=torch.float64).clamp_min(1e-12).log()
        value = wanted.to(torch.float64).clamp_min(1e-12).log().clamp(grid[-1], grid[0])
        # searchsorted wants a rising grid; alpha_bar falls.
        right = torch.searchsorted(-grid, -value).clamp(1, len(grid) - 1)
        share = (grid[right - 1] - value) / (grid[right - 1] - grid[right])
        return (right - 1 + share).to(wanted.dtype), value.exp()

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> Schedule:
        """The schedule of a diffusers scheduler's configuration.

        Raises:
            NasError: a prediction type that is not known; `where` names whose it is.
        """
        # Imported here: diffusers takes longer to import than a proxy worker needs it.
        from diffusers import DDPMScheduler

        if str(config.get("_class_name", "")).startswith("FlowMatch"):
            return cls()
        kind = config.get("prediction_type", "epsilon")
        if kind not in _PREDICTIONS:
            raise NasError(f"{where} has prediction_type {kind!r} in its scheduler; known: {', '.join(_PREDICTIONS)}")
        return cls(prediction=_PREDICTIONS[kind], alpha_bar=DDPMScheduler.from_config(dict(config)).alphas_cumprod)


_PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "noise", "v_prediction": "velocity", "sample": "clean"}

FLOW = Schedule()


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
