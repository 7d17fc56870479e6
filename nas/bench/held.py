"""One student against the teacher on held-out rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nas.diffusion import FlowDenoiser
from nas.distill import predict
from nas.targets import Rows

_EVALUATED = 128  # held-out rows per forward pass


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """One trained student against the teacher on held-out rows; higher is better.

    Attributes:
        quality_db: 10 log10(P / mse), where P is the mean square of what the teacher's velocity has beyond the
            preconditioner's skip path, so 0 dB is a network that adds nothing.
        text_error: relative error (root mean square) of v(caption) - v(no caption) against the teacher's; 1 is a
            student that ignores the caption.
        loss: mse of the velocity.
    """

    quality_db: float
    text_error: float
    loss: float

    @property
    def text_db(self) -> float:
        """-20 log10(text_error)."""
        return -20 * math.log10(self.text_error)


@torch.no_grad()
def fidelity_of(denoiser: FlowDenoiser, held: Rows) -> Fidelity:
    """How closely a student follows the teacher on held-out rows."""
    residual = error = change = change_error = 0.0
    for first in range(0, len(held), _EVALUATED):
        batch = held.batch(slice(first, first + _EVALUATED))
        outputs, teacher = predict(denoiser, batch, with_null=True), batch.teacher
        assert teacher is not None  # cached rows bring it
        assert outputs.null_velocity is not None  # asked for
        assert teacher.null_velocity is not None
        skip = denoiser.preconditioner.skip(*batch.point())
        wanted = teacher.velocity - teacher.null_velocity
        residual += float((teacher.velocity - skip).square().sum())
        error += float((teacher.velocity - outputs.velocity).square().sum())
        change += float(wanted.square().sum())
        change_error += float((wanted - (outputs.velocity - outputs.null_velocity)).square().sum())
    return Fidelity(
        quality_db=10 * math.log10(residual / error),
        text_error=math.sqrt(change_error / change),
        loss=error / held.velocity.numel(),
    )
