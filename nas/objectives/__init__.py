"""Objectives: a plug-in is one distillation loss, a frozen record of settings.

Each file has a class `Objective`. Most are losses between a student's and a teacher's outputs at the same noised image
(`Loss`); those that train networks of their own beside the student are games (`Game`). Legend: B batch, C channels,
H W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs

from nas import registry
from nas.batches import Batch, Draws, Outputs
from nas.diffusion import Denoiser, Schedule
from nas.errors import unknown
from nas.features import Anatomy, Tap

__all__ = ["Anatomy", "Batch", "Draws", "Game", "Loss", "Objective", "Outputs", "Partner", "Scene", "Tap", "is_game"]


class Loss(Protocol):
    """A pure function of tensors.

    What every one keeps (tests/test_objectives.py): finite; at its minimum 0 when student equals teacher (and both
    equal the data, where it looks at the data); gradient to the student and none to the teacher; a batch's loss is the
    mean of its examples' losses; bfloat16 inputs give nearly the float32 value.
    """

    @property
    def weight(self) -> float:
        """What its terms are multiplied by in the total."""
        ...

    @property
    def needs_null(self) -> bool:
        """Whether both sides must also be asked without a caption."""
        ...

    @property
    def needs_teacher(self) -> bool:
        """Whether it looks at the teacher at all."""
        ...

    def taps(self, student: Anatomy, teacher: Anatomy) -> tuple[Tap, ...]:
        """The layers whose outputs it compares; `Outputs.features` of both sides hold them under `Tap.key`.

        Where the two shapes differ the student's arrives projected to the teacher's shape by a layer that is trained
        with the student.

        Raises:
            NasError: the networks have no such layers in common.
        """
        ...

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> dict[str, Tensor]:
        """Named scalar terms, not yet weighted."""
        ...


@dataclass(frozen=True, kw_only=True)
class Partner:
    """A network that a game keeps beside the student.

    Attributes:
        module: it, on the student's device.
        lr: learning rate of its own AdamW; None for one that does not learn.
        betas: AdamW's.
        weight_decay: AdamW's.
        eps: AdamW's.
        clip: largest norm of its gradient, None for no limit.
        follows: decay of a running average of the student's weights that it is; None for one that does not follow.
    """

    module: nn.Module
    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    eps: float = 1e-8
    clip: float | None = None
    follows: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a game sees in one turn.

    Attributes:
        student: the network that is trained.
        teacher: frozen; asking it under `torch.no_grad` or not is the game's choice.
        partners: the game's own networks by the names of `partners`.
        batch: examples of this turn, fresh for every turn.
        draws: random numbers of this turn.
        schedule: the student's noise levels.
        step: from 0.
    """

    student: Denoiser
    teacher: Denoiser
    partners: Mapping[str, Any]
    batch: Batch
    draws: Draws
    schedule: Schedule
    step: int = 0


class Game(Protocol):
    """A loss that plays: it asks the networks itself and may train some of its own.

    In one step first the partners of `turns` move, each on fresh examples, then the student if `student_moves`.
    What every one keeps: finite losses; in a partner's turn no gradient reaches the student or the teacher, in the
    student's none is kept for the partners or the teacher; a batch's loss is the mean of its examples'.
    """

    @property
    def weight(self) -> float:
        """What its student's terms are multiplied by in the total."""
        ...

    @property
    def needs_images(self) -> bool:
        """Whether its batches must hold real images, or prompts are enough."""
        ...

    def partners(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> dict[str, Partner]:
        """Its own networks, made anew; `batch` is an example whose shapes they may need."""
        ...

    def turns(self, step: int) -> Sequence[str]:
        """Which partners learn in this step, in order."""
        ...

    def student_moves(self, step: int) -> bool:
        """Whether the student learns in this step; in a step where any game says no, it rests."""
        ...

    def partner_loss(self, name: str, scene: Scene) -> dict[str, Tensor]:
        """Named scalar terms of that partner's turn; their sum is minimised."""
        ...

    def student_loss(self, scene: Scene) -> dict[str, Tensor]:
        """Named scalar terms of the student's, not yet weighted."""
        ...


Objective = Loss | Game


@dataclass(frozen=True, kw_only=True)
class Common:
    """What a loss between outputs is unless it says otherwise.

    Attributes:
        weight: what its terms are multiplied by in the total.
    """

    weight: float = 1.0
    needs_null: bool = field(default=False, init=False)
    needs_teacher: bool = field(default=True, init=False)

    def taps(self, student: Anatomy, teacher: Anatomy) -> tuple[Tap, ...]:
        """None: it compares outputs only."""
        return ()


def is_game(objective: Objective) -> TypeIs[Game]:
    """Whether it plays rather than compares."""
    return hasattr(objective, "student_loss")


def objective(name: str, **settings: Any) -> Objective:
    """The objective of the file `name` with these settings.

    Raises:
        UsageError: no such objective or setting; the message offers the nearest.
    """
    plugin = registry.load("nas.objectives", name).Objective
    known = [each.name for each in fields(plugin) if each.init]
    for setting in settings:
        if setting not in known:
            raise unknown("setting", setting, known, where=f"the objective {name}")
    made: Objective = plugin(**settings)
    return made


def total(
    objectives: Sequence[Loss],
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    taps: Sequence[Sequence[Tap]] | None = None,
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The weighted sum of all terms, and the terms themselves by name.

    Args:
        objectives: the losses.
        student: what the student says.
        teacher: what the teacher says, None where no loss looks at it.
        batch: the examples.
        taps: each loss's own layers; None gives every loss all features.
    """
    terms: dict[str, Tensor] = {}
    weighted: list[Tensor] = []
    for number, each in enumerate(objectives):
        ours, theirs = student, teacher
        if taps is not None:
            keys = [tap.key for tap in taps[number]]
            ours = replace(ours, features={key: ours.features[key] for key in keys})
            if theirs is not None and each.needs_teacher:
                theirs = replace(theirs, features={key: theirs.features[key] for key in keys})
        found = each(ours, theirs, batch)
        terms |= found
        weighted += [each.weight * term for term in found.values()]
    return torch.stack(weighted).sum(), terms
