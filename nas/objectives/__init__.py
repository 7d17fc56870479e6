"""Objectives: a plug-in is one distillation loss, a frozen record of settings called on tensors.

Each file has a class `Objective` that follows the protocol below. Legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nas import registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """What a teacher or a student says about one batch, as rectified-flow velocities whatever its network predicts.

    Attributes:
        velocity: eps - x0 [B, C, H, W] given the caption.
        null_velocity: the same [B, C, H, W] given the text of no caption; None where nobody asked for it.
    """

    velocity: Tensor
    null_velocity: Tensor | None = None


class Objective(Protocol):
    """A loss: a pure function of tensors with its settings in a frozen dataclass.

    What every objective keeps (tests/test_objectives.py): finite; at its minimum 0 when student equals teacher;
    gradient to the student and none to the teacher; a batch's loss is the mean of its examples' losses; bfloat16
    inputs give nearly the float32 value.
    """

    @property
    def weight(self) -> float:
        """What its terms are multiplied by in the total."""
        ...

    @property
    def needs_null(self) -> bool:
        """Whether both sides must also be asked without a caption."""
        ...

    def __call__(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """Named scalar terms, not yet weighted."""
        ...


def objective(name: str, **settings: float) -> Objective:
    """The objective of the file `name` with these settings.

    Raises:
        UsageError: no such objective; the message offers the nearest.
    """
    made: Objective = registry.load("nas.objectives", name).Objective(**settings)
    return made


def total(objectives: tuple[Objective, ...], student: Outputs, teacher: Outputs) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The weighted sum of all terms, and the terms themselves by name."""
    terms: dict[str, Tensor] = {}
    weighted: list[Tensor] = []
    for each in objectives:
        found = each(student, teacher)
        terms |= found
        weighted += [each.weight * term for term in found.values()]
    return torch.stack(weighted).sum(), terms
