"""Text distillation: the mean squared error of what the caption changes, v(caption) - v(no caption).

Classifier-free guidance multiplies exactly this difference, and the output loss hardly sees it: in most of the picture
and at most times the caption changes little.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from nas.errors import NasError
from nas.objectives import Batch, Common, Outputs
from nas.objectives.output import exact, squared


@dataclass(frozen=True, kw_only=True)
class Objective(Common):
    """Mean over batch, channels and pixels.

    Attributes:
        weight: what the term is multiplied by in the total.
    """

    needs_null: bool = field(default=True, init=False)  # it is about the difference that the caption makes

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """The term "text", a scalar in units of velocity squared.

        Raises:
            NasError: one side was not asked without a caption.
        """
        assert teacher is not None  # it says that it needs one
        return {"text": squared(_change(student), _change(teacher)).mean()}


def _change(outputs: Outputs) -> Tensor:
    """What the caption changes [B, C, H, W], in float32 or better."""
    if outputs.null_velocity is None:
        raise NasError("the text objective needs predictions without a caption from teacher and student")
    return exact(outputs.velocity) - exact(outputs.null_velocity)
