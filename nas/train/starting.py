"""What each stage starts from: the first student's network and weights, and what later stages take out of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nas.build import Network, build
from nas.edit import Edited
from nas.errors import NasError, UsageError
from nas.inherit import Report, inherit
from nas.network import NetworkSpec
from nas.train.recipe import Recipe
from nas.train.reshaping import guided, removed
from nas.train.sources import Source, Subject


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The student's networks, known before anything is trained.

    Attributes:
        first: the first stage's network; of the teacher's own, with the blocks of the teacher that it keeps.
        stages: per stage, what it makes of the network before.
    """

    first: Edited
    stages: tuple[Edited, ...]

    @property
    def specs(self) -> tuple[NetworkSpec, ...]:
        """The network of each stage."""
        return tuple(edited.spec for edited in self.stages)


def plan(recipe: Recipe, subject: Subject, source: Source) -> Plan:
    """Which network each stage trains.

    Raises:
        UsageError: a candidate where the recipe takes the teacher's network or none where it needs one, or a block to
            remove that is not there.
        NasError: the candidate does not fit the teacher.
    """
    settings = recipe.student
    if settings.from_teacher:
        if subject.candidate is not None:
            raise UsageError(
                f"recipe {recipe.name} makes its student of the teacher's own network, so it takes no candidate",
                hint="leave out the study and --space, or set student.from_teacher=false",
            )
        first = removed(source.network().spec, settings.remove, f"recipe {recipe.name} [student]")
    elif subject.candidate is None:
        raise UsageError(
            f"recipe {recipe.name} needs a network to train", hint="name STUDY#CANDIDATE, or --space with --reference"
        )
    else:
        spec = source.spec(subject.candidate, settings)
        first = Edited.nothing(removed(spec, settings.remove, f"recipe {recipe.name} [student]").spec)
    stages, now = [], first.spec
    for stage in recipe.stages:
        where = f"recipe {recipe.name}, stage {stage.name!r}"
        after = removed(now, stage.remove, where)
        if stage.guidance_width:
            after = guided(after, stage.guidance_width, where)
        stages.append(after)
        now = after.spec
    return Plan(first=first, stages=tuple(stages))


def first_network(recipe: Recipe, planned: Plan, source: Source, seed: int) -> tuple[Network, Report | None]:
    """The first stage's network with the weights it starts from, and what of them is the teacher's.

    Raises:
        NasError: the recipe inherits, and nothing of the teacher fits.
    """
    settings, spec = recipe.student, planned.first.spec
    network = build(spec, seed=seed)
    report = None
    if settings.inherit or settings.from_teacher:
        teacher = source.network()
        origin = planned.first.origin if settings.from_teacher else None
        layers = planned.first.kept_layers if settings.from_teacher else None
        with torch.no_grad():
            state, report = inherit(
                spec,
                teacher.spec,
                {name: tensor.cpu() for name, tensor in teacher.state_dict().items()},
                widths=settings.inherit_widths,
                seed=seed,
                origin=origin,
                kept_layers=layers,
            )
        if not report.params("copied") and not report.params("sliced"):
            raise NasError(
                f"recipe {recipe.name} inherits, and no tensor of the teacher fits a block of {spec.name}",
                hint="set student.inherit=false, or give a teacher of the same family",
            )
        network.load_state_dict(state)
    return reshaped(network, planned.stages[0], seed), report


def reshaped(network: Network, edited: Edited, seed: int = 0) -> Network:
    """The network after blocks were taken out or inputs put in, with its own weights in what is left."""
    if edited.spec == network.spec:
        return network
    with torch.no_grad():
        state, _ = inherit(
            edited.spec,
            network.spec,
            {name: tensor.cpu() for name, tensor in network.state_dict().items()},
            seed=seed,
            origin=edited.origin,
            kept_layers=edited.kept_layers,
        )
    made = build(edited.spec, "meta")
    made.load_state_dict(state, assign=True)
    return made.train(network.training).requires_grad_(True)
