"""Output distillation: the mean squared difference of the student's and the teacher's velocity.

At a given x_t the same difference in x0 is t^2 and in eps (1 - t)^2 times this one, so the velocity is the weighting
that neither end of the schedule escapes (Hinton et al. 2015 for the idea; Kim et al. 2023, BK-SDM, for diffusion).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from nas.objectives import Outputs


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Mean over batch, channels and pixels; where predictions without a caption are given, the mean of both.

    Attributes:
        weight: what the term is multiplied by in the total.
    """

    weight: float = 1.0

    @property
    def needs_null(self) -> bool:
        """It uses predictions without a caption where they are, and asks for none."""
        return False

    def __call__(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """The term "output", a scalar in units of velocity squared."""
        loss = _mse(student.velocity, teacher.velocity)
        if student.null_velocity is not None and teacher.null_velocity is not None:
            loss = (loss + _mse(student.null_velocity, teacher.null_velocity)) / 2
        return {"output": loss}


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    # Differences of bfloat16 numbers lose what they are about: subtract in float32.
    return functional.mse_loss(student.float(), teacher.detach().float())
