"""The data's own loss: the mean squared difference of the student's prediction and what was really mixed in.

Flow matching (Lipman et al. 2023) as a velocity eps - x0; as noise the loss of Ho et al. 2020. It is the L_task of
BK-SDM, KOALA, SSD-1B and SnapGen, and alone it is training without distillation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from nas.objectives import Batch, Common, Outputs
from nas.objectives.output import Space, check_space, space_weight, squared


@dataclass(frozen=True, kw_only=True)
class Objective(Common):
    """Mean over batch, channels and pixels. Its minimum 0 is a student that gives the data's own velocity.

    How many captions are dropped is the data's choice: a prediction without a caption that another objective asked for
    is not compared.

    Attributes:
        weight: what the term is multiplied by in the total.
        space: what is compared, as for the objective `output`.
    """

    space: Space = "velocity"
    needs_teacher: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_space(self.space)

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """The term "task", a scalar in squared units of `space`.

        Raises:
            NasError: the data brings no images or not the noise that was added.
        """
        per_example = squared(student.velocity, batch.velocity)
        return {"task": (per_example * space_weight(self.space, batch)).mean()}
