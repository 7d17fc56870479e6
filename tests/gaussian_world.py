"""A world in which everything is known in closed form: Gaussian data, its exact denoiser, players with few weights.

Denoisers here are modules in rectified flow's terms, as everywhere; `sd_schedule` and `NativeGaussian` give the same
Gaussian as a variance-preserving network. Legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nas.batches import WHOLE, Batch, Draws, Part, stream
from nas.diffusion import (
    FLOW,
    Conditioning,
    NativeDenoiser,
    Prediction,
    Schedule,
    convert,
    variance_preserving,
)
from nas.objectives import Game, Scene

SHAPE = (1, 1, 1)  # one number per image


@contextmanager
def double() -> Iterator[None]:
    """float64 by default: schedules and draws are made in the default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def sd_schedule(prediction: Prediction = "noise") -> Schedule:
    """Stable Diffusion 1's noise levels (beta "scaled_linear", 0.00085 to 0.012)."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return Schedule(prediction=prediction, alpha_bar=(1 - beta).cumprod(0))


class Gaussian(nn.Module):
    """The exact denoiser of N(mean + pull * mean of the text, sd^2); trainable, it is a fake score's whole family.

    Args:
        mean: of the data without a caption.
        sd: above 0.
        pull: how far a text whose entries average 1 shifts the mean.
        shape: (C, H, W) of an image, whose values are independent.
    """

    def __init__(self, mean: float, sd: float, *, pull: float = 0.0, shape: tuple[int, int, int] = SHAPE) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean))
        self.log_sd = nn.Parameter(torch.tensor(sd).log())
        self.pull = nn.Parameter(torch.tensor(pull))
        self.schedule = FLOW
        self.image_shape = shape

    def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        mean = self.mean + self.pull * text.tokens.mean((1, 2)).view(-1, 1, 1, 1)
        variance = (2 * self.log_sd).exp()
        return mean + (1 - t) * variance / ((1 - t) ** 2 * variance + t**2) * (x - (1 - t) * mean)

    def velocity(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        return (x - self.denoise(x, t, text)) / t.view(-1, 1, 1, 1)


class Generator(nn.Module):
    """x_g = shift + pull * mean of the text + slope * z, for an input x = start * z."""

    def __init__(self, slope: float, shift: float, *, start: float, pull: float = 0.0) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.shift = nn.Parameter(torch.tensor(shift))
        self.pull = nn.Parameter(torch.tensor(pull))
        self.start = start
        self.schedule = FLOW

    def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        pulled = self.pull * text.tokens.mean((1, 2)).view(-1, 1, 1, 1)
        return self.shift + pulled + self.slope * x / self.start

    def velocity(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        return (x - self.denoise(x, t, text)) / t.view(-1, 1, 1, 1)


class GaussianNetwork(nn.Module):
    """A variance-preserving network of N(mean, sd^2), exact on every level, that predicts what its schedule says."""

    def __init__(self, mean: float, sd: float, schedule: Schedule, pull: float = 0.0) -> None:
        super().__init__()
        self.mean, self.sd, self.schedule, self.pull = mean, sd, schedule, pull

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        assert self.schedule.alpha_bar is not None
        level = timestep.round().long()
        at = variance_preserving(self.schedule.alpha_bar.to(sample.dtype)[level].view(-1, 1, 1, 1))
        mean = self.mean + self.pull * text.mean((1, 2)).view(-1, 1, 1, 1)
        clean = mean + at.a * self.sd**2 / (at.a**2 * self.sd**2 + at.s**2) * (sample - at.a * mean)
        return convert(clean, "clean", self.schedule.prediction, sample, at)


def native(mean: float, sd: float, prediction: Prediction = "noise", pull: float = 0.0) -> NativeDenoiser:
    """A teacher on Stable Diffusion's schedule."""
    schedule = sd_schedule(prediction)
    return NativeDenoiser(GaussianNetwork(mean, sd, schedule, pull), schedule)


class Table(nn.Module):
    """A student that is affine at each of its schedule's levels: x0 = slope * x + intercept, x in native scale."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.slope = nn.Parameter(torch.zeros(1000))
        self.intercept = nn.Parameter(torch.zeros(1000))
        self.times = schedule.times(torch.arange(1000))

    def level(self, t: Tensor) -> Tensor:
        return torch.searchsorted(self.times, t - 1e-9)

    def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        level, t = self.level(t), t.view(-1, 1, 1, 1)
        scaled = x / ((1 - t) ** 2 + t**2).sqrt() if self.schedule.alpha_bar is not None else x
        return self.slope[level].view(-1, 1, 1, 1) * scaled + self.intercept[level].view(-1, 1, 1, 1)

    def velocity(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        return (x - self.denoise(x, t, text)) / t.view(-1, 1, 1, 1)


def text_of(values: Tensor) -> Conditioning:
    """Captions [B, 1, 1] that say one number each."""
    return Conditioning(tokens=values.view(-1, 1, 1))


def null_text() -> Conditioning:
    """No caption, in the default precision."""
    return Conditioning(tokens=torch.zeros(1, 1, 1))


class GaussianData:
    """Batches of N(mean + pull * caption, sd^2), or of prompts alone; a caption is one number.

    Args:
        size: rows per batch.
        caption: what every caption says.
        prompts_only: whether images are left out.
    """

    def __init__(
        self, size: int, *, mean: float = 0.0, sd: float = 1.0, caption: float = 0.0, prompts_only: bool = False
    ) -> None:
        self.size, self.mean, self.sd = size, mean, sd
        self.caption, self.prompts_only = caption, prompts_only

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        own, generator = part.rows(self.size), stream(7, step)
        clean = self.mean + self.sd * torch.randn((self.size, *SHAPE), generator=generator)
        text = text_of(torch.full((self.size,), self.caption))
        whole = Batch(text=text, null_text=null_text(), clean=None if self.prompts_only else clean)
        return whole.rows(own)


def draws(size: int, seed: int = 0, part: Part = WHOLE) -> Draws:
    """A turn's random numbers."""
    return Draws(generator=stream(seed), total=size, part=part, device=torch.device("cpu"))


class Corners:
    """Draws whose expectation of a quadratic is exact: every normal number is -1 or 1, in all combinations.

    A quadratic has the same mean over these corners as over independent N(0, 1), so a game's loss on them is its
    expectation, and its gradient the closed form's.

    Args:
        normals: how many normal numbers the turn draws per image.
        level: the noise level, any real number; or several, each of which meets all corners.
        uniform: what its uniform numbers are, each meeting all of these.
    """

    def __init__(self, normals: int, *level: float, uniform: tuple[float, ...] = (0.5,)) -> None:
        signs = torch.tensor([1.0, -1.0])
        rows = torch.cartesian_prod(torch.tensor(uniform), 1.0 * torch.tensor(level), *[signs] * normals)
        self.shares, self.levels, self.signs = rows[:, 0], rows[:, 1], rows[:, 2:].T
        self.total = len(rows)
        self.calls = 0

    def normal(self, *shape: int) -> Tensor:
        assert self.calls < len(self.signs), "the turn draws more normal numbers than these corners have"
        self.calls += 1
        return self.signs[self.calls - 1].view(-1, *(1,) * len(shape)).expand(-1, *shape)

    def uniform(self) -> Tensor:
        return self.shares

    def integers(self, low: int, high: int) -> Tensor:
        assert bool(((low <= self.levels) & (self.levels < high)).all())
        return self.levels

    def integer(self, low: int, high: int) -> int:
        return low


def level_of(a: float, s: float) -> float:
    """The fractional level of rectified flow with the signal-to-noise ratio of a and s."""
    return 1000 * s / (a + s) - 1


def corner_scene(
    student: nn.Module, teacher: nn.Module, partners: Mapping[str, Any], corners: Corners, *, caption: float = 0.0
) -> Scene:
    """A turn on corners, with prompts alone."""
    batch = Batch(text=text_of(torch.full((corners.total,), caption)), null_text=null_text())
    anything: Any = corners
    return replace(scene(student, teacher, batch, partners), draws=anything)


def scene(
    student: nn.Module,
    teacher: nn.Module,
    batch: Batch,
    partners: Mapping[str, Any],
    *,
    seed: int = 0,
    part: Part = WHOLE,
    schedule: Schedule | None = None,
) -> Scene:
    """One turn."""
    anything: Any = student
    taught: Any = teacher
    return Scene(
        student=anything,
        teacher=taught,
        partners=partners,
        batch=batch,
        draws=draws(len(batch) * part.count, seed, part),
        schedule=schedule or getattr(student, "schedule", FLOW),
    )


def partners_of(game: Game, student: nn.Module, teacher: nn.Module, batch: Batch) -> dict[str, nn.Module]:
    """A game's own networks as the loop keeps them: those that learn in training mode, the others frozen."""
    modules = {}
    for name, partner in game.partners(student, teacher, batch).items():
        learns = partner.lr is not None
        modules[name] = partner.module.train(learns).requires_grad_(learns)
    return modules


def numeric(parameter: Tensor) -> float:
    """The gradient of a number."""
    assert parameter.grad is not None
    return float(parameter.grad)
