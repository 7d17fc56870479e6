"""Text distillation: the mean squared error of what the caption changes, v(caption) - v(no caption).

Classifier-free guidance multiplies exactly this difference, and the output loss hardly sees it: in most of the picture
and at most times the caption changes little.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from nas.errors import NasError
from nas.objectives import Outputs


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Mean over batch, channels and pixels.

    Attributes:
        weight: what the term is multiplied by in the total.
    """

    weight: float = 1.0

    @property
    def needs_null(self) -> bool:
        """It is about the difference that the caption makes."""
        return True

    def __call__(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """The term "text", a scalar in units of velocity squared.

        Raises:
            NasError: one side was not asked without a caption.
        """
        return {"text": functional.mse_loss(_change(student), _change(teacher).detach())}


def _change(outputs: Outputs) -> Tensor:
    """What the caption changes [B, C, H, W], in float32."""
    if outputs.null_velocity is None:
        raise NasError("the text objective needs predictions without a caption from teacher and student")
    return outputs.velocity.float() - outputs.null_velocity.float()
