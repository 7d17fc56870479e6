"""SnapGen's multi-level distillation (arXiv 2412.09619): data, output and feature loss, balanced at every noise level.

    S(L_task, L_kd) = E_t[ alpha_t L_task + (1 - alpha_t) sg(L_task / L_kd) L_kd ],  alpha_t = rho(t) / rho(1/2)
    L = S(L_task, L_output) + S(L_task, L_features)

with rho the density of the logit-normal(0, 1) distribution and sg a stop of the gradient. In the middle of the schedule
the data leads, at both ends the teacher. S has the value of L_task whatever the student; only its gradient shows the
teacher, in units of L_task, so that the scale of L_kd does not matter.

The paper's text was not at hand: S is as secondary sources give it, that alpha is scaled to 1 at the density's maximum
and that the ratio has no gradient are our reading (with one, L_kd would cancel and teach nothing). Legend: B batch,
L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nas.objectives import Anatomy, Batch, Common, Outputs, Tap
from nas.objectives._taps import POINTS, check_points, chosen, compared, summed
from nas.objectives.output import exact, squared

_NO_LAYERS = "none"
_EDGE = 1e-6  # nearest that a time may come to 0 or 1; alpha is 0 there in double precision


@dataclass(frozen=True, kw_only=True)
class Objective(Common):
    """Both balanced losses, of velocities and of layers; mean over the batch.

    It is 0 where student, teacher and data agree, and has the value of the data's loss otherwise.

    Attributes:
        weight: what both terms are multiplied by in the total.
        points: which layers, as for the objective `features`; SnapGen++ (arXiv 2601.08303, equation 7) has the last
            transformer layer. "none" compares no layers: S(L_task, L_output) alone, as beside SnapGen's
            adversarial loss.
        scale_features: whether the feature loss is balanced too. False leaves it as it is: S(L_task, L_output) +
            L_features (SnapGen++, equation 8).
    """

    points: str = "last"
    scale_features: bool = True

    def __post_init__(self) -> None:
        check_points(self.points, "multi_level", (*POINTS, _NO_LAYERS))

    def taps(self, student: Anatomy, teacher: Anatomy) -> tuple[Tap, ...]:
        """The layers that `points` names."""
        return () if self.points == _NO_LAYERS else chosen(self.points, student, teacher)

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """The terms "task_and_output" and, of layers, "task_and_features" (unscaled: "features"), scalars.

        Raises:
            NasError: the data brings no images or not the noise that was added, or a feature is missing or has another
                shape than the teacher's.
        """
        assert teacher is not None  # it says that it needs one
        task = squared(student.velocity, batch.velocity)
        output = squared(student.velocity, teacher.velocity)
        share = data_share(batch.point()[1])
        terms = {"task_and_output": balanced(task, output, share).mean()}
        if self.points == _NO_LAYERS:
            return terms
        # Where both texts were asked, a feature has two rows for every example.
        features = summed(compared(student, teacher, "multi_level", squared)).view(-1, len(task)).mean(0)
        if self.scale_features:
            return terms | {"task_and_features": balanced(task, features, share).mean()}
        return terms | {"features": features.mean()}


def data_share(t: Tensor) -> Tensor:
    """alpha_t [B]: the density of the logit-normal(0, 1) distribution at t [B] over its maximum, in [0, 1].

    With u = logit t the density is exp(-u^2 / 2) / (sqrt(2 pi) t (1 - t)), and the slope of its logarithm in u is
    tanh(u / 2) - u, which falls through 0 at u = 0: the only maximum is rho(1/2) = 4 / sqrt(2 pi).
    """
    t = exact(t).clamp(_EDGE, 1 - _EDGE)
    return (torch.exp(-t.logit().square() / 2) / (4 * t * (1 - t))).clamp(0, 1)


def balanced(task: Tensor, teaching: Tensor, share: Tensor) -> Tensor:
    """S per example [B] of the data's loss [B], the teacher's [B] and alpha [B]."""
    return share * task + (1 - share) * ratio(task, teaching) * teaching


def ratio(task: Tensor, teaching: Tensor) -> Tensor:
    """What the teacher's loss is multiplied by [B], without gradient; 0 where it is 0 or as good as."""
    task, teaching = task.detach(), teaching.detach()
    found = task / teaching
    return torch.where(found.isfinite(), found, 0)
