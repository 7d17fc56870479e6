"""Output distillation: the mean squared difference of the student's and the teacher's prediction.

Both are given as rectified-flow velocities whatever their networks predict; at a given x_t the squared difference in x0
is t^2 and in eps (1 - t)^2 times this one. Hinton et al. 2015 for the idea; Kim et al. 2023 (BK-SDM, arXiv 2305.15798)
for diffusion, there between noise predictions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nas.errors import unknown
from nas.objectives import Batch, Common, Outputs

Space = Literal["velocity", "noise", "clean"]
_SPACES = ("velocity", "noise", "clean")


@dataclass(frozen=True, kw_only=True)
class Objective(Common):
    """Mean over batch, channels and pixels; where predictions without a caption are given, the mean of both.

    Attributes:
        weight: what the term is multiplied by in the total.
        space: what is compared. The velocity is the weighting that neither end of the schedule escapes; "noise" is
            what BK-SDM, KOALA and SSD-1B compare.
    """

    space: Space = "velocity"

    def __post_init__(self) -> None:
        check_space(self.space)

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """The term "output", a scalar in squared units of `space`."""
        assert teacher is not None  # it says that it needs one
        per_example = squared(student.velocity, teacher.velocity)
        if student.null_velocity is not None and teacher.null_velocity is not None:
            per_example = (per_example + squared(student.null_velocity, teacher.null_velocity)) / 2
        return {"output": (per_example * space_weight(self.space, batch)).mean()}


def check_space(space: str) -> None:
    """Refuses an unknown space.

    Raises:
        UsageError: offers the nearest.
    """
    if space not in _SPACES:
        raise unknown("space to compare predictions in", space, _SPACES)


def squared(student: Tensor, teacher: Tensor) -> Tensor:
    """Each example's mean squared difference [B]; no gradient to the second."""
    # Differences of bfloat16 numbers lose what they are about: subtract in float32.
    return (exact(student) - exact(teacher.detach())).square().flatten(1).mean(1)


def exact(value: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 where they are."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def space_weight(space: Space, batch: Batch) -> Tensor | float:
    """What a squared difference of velocities is multiplied by [B] to be one of `space`.

    With eps = x_t + (1 - t) u and x0 = x_t - t u the factors are (1 - t)^2 and t^2.
    """
    if space == "velocity":
        return 1.0
    t = exact(batch.point()[1])
    return (1 - t) ** 2 if space == "noise" else t**2
