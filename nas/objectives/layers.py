"""The layer loss of SSD-1B and Segmind-Vega (arXiv 2401.02677): every residual block and every transformer that stays.

Weighted 0.5 beside the data's loss and 0.5 times the output loss in a re-implementation; the paper's own weights are
not known here. A recipe that removes blocks in stages asks for the layers anew in each, so what is gone is no longer
compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nas.objectives import Anatomy, Batch, Common, Outputs, Tap
from nas.objectives._taps import block_taps, compared, summed
from nas.objectives.output import squared


@dataclass(frozen=True, kw_only=True)
class Objective(Common):
    """Sum over the compared layers of each one's mean squared difference, each counted once.

    Attributes:
        weight: what the term is multiplied by in the total.
    """

    def taps(self, student: Anatomy, teacher: Anatomy) -> tuple[Tap, ...]:
        """The student's residual blocks and transformers, or a diffusion transformer's blocks, that have a counterpart.

        Where a middle of one residual block stands for a longer one, it is compared with the teacher's last.
        """
        return block_taps(student, teacher, ("resnets", "attentions", "layer"))

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """The term "layers", a scalar in squared units of the features.

        Raises:
            NasError: a feature is missing or has another shape than the teacher's.
        """
        assert teacher is not None  # it says that it needs one
        return {"layers": summed(compared(student, teacher, "layers", squared)).mean()}
