"""Feature distillation: the outputs of a student's stages against those of its teacher (BK-SDM, arXiv 2305.15798).

There the stages' outputs have equal shapes; where they differ the loop trains a projection and resizes (FitNets, Romero
et al. 2015). Legend: B batch, C channels, H W height and width, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from nas.errors import UsageError, unknown
from nas.objectives import Anatomy, Batch, Common, Outputs, Tap
from nas.objectives._taps import check_points, chosen, compared, summed
from nas.objectives.output import exact, squared

Normalise = Literal["none", "teacher_norm", "layer_norm"]
_NORMALISE = ("none", "teacher_norm", "layer_norm")
_EPS = 1e-6  # of LayerNorm


@dataclass(frozen=True, kw_only=True)
class Objective(Common):
    """Sum over the compared layers of each one's mean squared difference.

    Attributes:
        weight: what the term is multiplied by in the total; BK-SDM has 1, distill-sd 0.5.
        points: which layers: "stages" (BK-SDM), "stages+mid" (distill-sd), "blocks", "last", or by name
            (`nas.objectives._taps.chosen`).
        normalise: "none"; "teacher_norm", each layer's squared error over the squared norm of the teacher's feature, so
            that no stage dominates (LAPTOP-Diff, arXiv 2404.11098); "layer_norm", both sides behind a LayerNorm over
            the channels (Shiva-DiT, equation 31).
        mask_sd: k of masked distillation: on each side, what is k standard deviations or more from an example's mean
            is set to 0 before the comparison, because a few huge activations of a transformer would be all that is
            learnt (TinyFusion, arXiv 2412.01199, which has k = 2). None masks nothing.
    """

    points: str = "stages"
    normalise: Normalise = "none"
    mask_sd: float | None = None

    def __post_init__(self) -> None:
        check_points(self.points, "features")
        if self.normalise not in _NORMALISE:
            raise unknown("normalise", self.normalise, _NORMALISE, where="the objective features")
        if self.mask_sd is not None and not self.mask_sd > 0:
            raise UsageError(f"the objective features: mask_sd must be above 0, got {self.mask_sd}")

    def taps(self, student: Anatomy, teacher: Anatomy) -> tuple[Tap, ...]:
        """The layers that `points` names."""
        return chosen(self.points, student, teacher)

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """The term "features", a scalar in squared units of the features; with a normalisation, without unit.

        Raises:
            NasError: a feature is missing or has another shape than the teacher's.
        """
        assert teacher is not None  # it says that it needs one
        return {"features": summed(compared(student, teacher, "features", self._difference)).mean()}

    def _difference(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Each example's difference [B] of two features [B, C, H, W] or [B, L, C]."""
        teacher = teacher.detach()
        if self.mask_sd is not None:
            student, teacher = masked(student, self.mask_sd), masked(teacher, self.mask_sd)
        if self.normalise == "layer_norm":
            student, teacher = _layer_normed(student), _layer_normed(teacher)
        difference = squared(student, teacher)
        if self.normalise == "teacher_norm":
            # The numbers of entries cancel: a ratio of sums is a ratio of means.
            power = exact(teacher).square().flatten(1).mean(1)
            difference = difference / power.clamp_min(torch.finfo(power.dtype).eps)
        return difference


def masked(feature: Tensor, mask_sd: float) -> Tensor:
    """A feature with what is `mask_sd` standard deviations or more from its example's mean set to 0."""
    value = exact(feature)
    flat = value.detach().flatten(1)
    shape = (-1, *(1,) * (value.dim() - 1))
    mean, spread = flat.mean(1).view(shape), flat.std(1).view(shape)
    return torch.where((value - mean).abs() < mask_sd * spread, value, 0)


def _layer_normed(feature: Tensor) -> Tensor:
    """LayerNorm without weights over the channels of a map's pixel or of a token."""
    value = exact(feature)
    last = value.movedim(1, -1) if value.dim() == 4 else value
    return functional.layer_norm(last, last.shape[-1:], eps=_EPS)
