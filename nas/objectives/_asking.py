"""What the games share: levels and times, guided answers, noise, the fake score's network.

Legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nas.diffusion import Conditioning, Schedule, guided, noised
from nas.errors import NasError, UsageError
from nas.objectives import Scene

Ask = Callable[[Tensor, Tensor, Conditioning], Tensor]  # a denoiser's `denoise` or `velocity`

LEVELS = 1000  # the published settings of every game count the levels of a schedule of this many


def level_times(schedule: Schedule, level: Tensor, like: Tensor) -> Tensor:
    """The rectified-flow times of whole levels (any shape), in the precision of `like`."""
    return schedule.times(level).to(like.dtype)


def check_schedule(schedule: Schedule, game: str) -> None:
    """Refuses a schedule whose levels the published settings do not count.

    Raises:
        NasError: it has another number of levels than 1000.
    """
    if schedule.levels != LEVELS:
        raise NasError(
            f"the objective {game} counts noise levels of {LEVELS}, and the student's schedule has {schedule.levels}",
            hint="train the student in rectified flow, or on a teacher with 1000 levels",
        )


def check_levels(game: str, **levels: int) -> None:
    """Refuses levels outside 0..1000 (the upper end is exclusive where it is one).

    Raises:
        UsageError: names the setting.
    """
    for name, level in levels.items():
        if not 0 <= level <= LEVELS:
            raise UsageError(f"{game}: {name} must be a level from 0 to {LEVELS}, got {level}")


def check_falling(game: str, levels: Sequence[int]) -> None:
    """Refuses a list of a student's levels that is empty, does not fall, or leaves 0..999.

    Raises:
        UsageError: says what is allowed.
    """
    given = list(levels)
    if not given or given != sorted(set(given), reverse=True) or not 0 <= given[-1] <= given[0] < LEVELS:
        raise UsageError(f"{game}: levels must fall and be from 0 to {LEVELS - 1}, got {given}")


def sampled_times(game: str, schedule: Schedule, levels: Sequence[int], steps: int | None) -> tuple[float, ...]:
    """The times of a student's levels; of fewer steps than levels, spread over them from the first on.

    Raises:
        UsageError: more steps than levels.
    """
    count = len(levels) if steps is None else steps
    if not 1 <= count <= len(levels):
        raise UsageError(f"{game}: a student of {len(levels)} levels samples in 1 to as many steps, got {count}")
    chosen = [levels[place * len(levels) // count] for place in range(count)]
    return tuple(schedule.times(torch.tensor(chosen)).tolist())


def check_above(game: str, least: float, **values: float) -> None:
    """Refuses settings that are not above `least`.

    Raises:
        UsageError: names the setting.
    """
    for name, value in values.items():
        if not value > least:
            raise UsageError(f"{game}: {name} must be above {least:g}, got {value:g}")


def image_noise(scene: Scene) -> Tensor:
    """N(0, 1) [B, C, H, W] for the images of a turn, which prompts alone say nothing about: then the teacher's shape.

    Raises:
        NasError: neither the data nor the teacher says what shape images have.
    """
    clean = scene.batch.clean
    shape = getattr(scene.teacher, "image_shape", None) if clean is None else clean.shape[1:]
    if shape is None:
        raise NasError("the data has prompts only, and the teacher does not say what shape its images have")
    dtype = scene.batch.text.tokens.dtype if clean is None else clean.dtype
    return scene.draws.normal(*shape).to(torch.promote_types(dtype, torch.float32))


def renoised(images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t [B, C, H, W] of images in their own precision, whatever autocast made of them."""
    return noised(images.to(noise.dtype), noise, t)


def guided_answers(
    ask: Ask, x: Tensor, t: Tensor, text: Conditioning, null_text: Conditioning, *scales: float | Tensor
) -> tuple[Tensor, ...]:
    """A denoiser's answer [B, C, H, W] under each guidance scale k: u + k (c - u), gradients kept.

    Only the branches that some scale needs are asked, both in one pass of 2 B. Guidance is linear, so it may be applied
    to x0, eps and velocity alike at fixed x and t.

    Args:
        ask: `denoise` or `velocity` of the denoiser.
        x: x_t [B, C, H, W].
        t: times [B].
        text: conditions of the B images.
        null_text: of no caption, one row or B.
        scales: numbers, or one per image [B]; 1 is the conditional and 0 the unconditional answer.
    """
    if not _any_other(scales, than=1):
        return (ask(x, t, text),) * len(scales)
    null = null_text.like(text)
    if not _any_other(scales, than=0):
        return (ask(x, t, null),) * len(scales)
    both = ask(torch.cat([x, x]), torch.cat([t, t]), Conditioning.cat([text, null]))
    conditional, unconditional = both.chunk(2)

    def under(scale: float | Tensor) -> Tensor:
        wide: Any = scale.view(-1, 1, 1, 1) if isinstance(scale, Tensor) else scale
        return guided(conditional, unconditional, wide)

    return tuple(under(scale) for scale in scales)


def _any_other(scales: Sequence[float | Tensor], than: float) -> bool:
    return any(isinstance(scale, Tensor) or scale != than for scale in scales)


def noise_error(velocity: Tensor, images: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Each example's squared error of the predicted noise [B], summed over channels and pixels.

    In rectified flow eps = x_t + (1 - t) u, so the error in eps is (1 - t) that in the velocity; a prediction of v on a
    variance-preserving schedule weighted by a^2 gives the same.
    """
    dtype = noise.dtype
    error = (1 - t).view(-1, 1, 1, 1) * (velocity.to(dtype) - (noise - images.to(dtype)))
    return error.square().flatten(1).sum(1)


def normaliser(images: Tensor, real: Tensor, floor: float = 1e-5) -> Tensor:
    """1 / mean |images - real| per example [B, 1, 1, 1], no gradient; the mean is at least `floor`.

    SiD, DMD and DMD2 all weight their per-example term so.
    """
    distance = (images.detach() - real.detach()).abs().mean((1, 2, 3), keepdim=True)
    return 1 / distance.clamp_min(floor)


def trainable_copy(teacher: nn.Module) -> nn.Module:
    """A copy of the teacher whose denoiser learns; a text part that it brings stays frozen, as text is given."""
    copied = copy.deepcopy(teacher)
    learns: nn.Module = getattr(copied, "denoiser", copied)
    learns.requires_grad_(True)
    return copied
