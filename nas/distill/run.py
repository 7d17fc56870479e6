"""A run's state, and how it is put together."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from nas.batches import Batches, Part
from nas.distill.asking import predict
from nas.distill.engine import Engine
from nas.distill.settings import Progress, TrainSettings
from nas.errors import NasError
from nas.features import Tap, anatomy, captured, projections
from nas.objectives import Game, Loss, Objective, Partner, is_game

STUDENT = "student"


@dataclass
class Player:
    """A network that learns, with its optimiser."""

    module: nn.Module
    optimiser: torch.optim.Optimizer
    lr: float
    clip: float | None


@dataclass
class Run:
    """A run's state between two steps: all that a checkpoint holds, and what it is made with.

    Attributes:
        student: the network that is trained.
        average: its average.
        teacher: frozen, None where the batches bring its answers.
        losses: objectives between outputs.
        games: the others, by name.
        partners: a game's networks, by "game.partner".
        players: what learns, by the same names, and the student.
        taps: layers that the losses compare.
        own_taps: those of each loss.
        step: steps done.
        turn: turns taken; each has fresh examples.
        seconds: so far.
        history: of the run.
        resumed_from: the step it was taken up at.
    """

    student: nn.Module
    average: nn.Module
    teacher: nn.Module | None
    losses: tuple[Loss, ...]
    games: dict[str, Game]
    engine: Engine
    settings: TrainSettings
    data: Batches
    partners: dict[str, Partner] = field(default_factory=dict)
    players: dict[str, Player] = field(default_factory=dict)
    taps: tuple[Tap, ...] = ()
    own_taps: tuple[tuple[Tap, ...], ...] = ()
    step: int = 0
    turn: int = 0
    seconds: float = 0.0
    history: list[Progress] = field(default_factory=list)
    resumed_from: int | None = None


def start(
    student: nn.Module,
    data: Batches,
    objectives: tuple[Objective, ...],
    settings: TrainSettings,
    teacher: nn.Module | None,
    engine: Engine,
) -> Run:
    """The run before its first step."""
    if not objectives:
        raise NasError("training needs at least one objective")
    average = copy.deepcopy(student).requires_grad_(False)
    games = [each for each in objectives if is_game(each)]
    named = {_name(each, number, games): each for number, each in enumerate(games)}
    # Before anything is sharded: games copy the student, and a sharded network cannot be copied.
    partners = {name: _partners(game, student, need(teacher), data, settings.seed) for name, game in named.items()}
    run = Run(
        student=engine.shard(student),
        average=engine.shard(average),
        teacher=teacher,
        losses=tuple(each for each in objectives if not is_game(each)),
        games=named,
        engine=engine,
        settings=settings,
        data=data,
    )
    Part(count=engine.world * settings.accumulate).rows(data.size)  # refuses a batch that cannot be cut
    heads = _tapped(run)
    learner = nn.ModuleList([run.student, heads]) if len(heads) else run.student
    run.players[STUDENT] = Player(
        module=learner,
        optimiser=_adamw(learner, settings.lr, settings.betas, settings.weight_decay, settings.eps),
        lr=settings.lr,
        clip=settings.clip,
    )
    for name, made in partners.items():
        for each, partner in made.items():
            _add_partner(run, f"{name}.{each}", partner)
    return run


def _partners(game: Game, student: nn.Module, teacher: nn.Module, data: Batches, seed: int) -> dict[str, Partner]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return game.partners(student, teacher, data.batch(0, Part(count=data.size)))


def _name(game: Game, number: int, games: Sequence[Game]) -> str:
    """A game's name: its file's; with its place where a file is played twice."""
    name = type(game).__module__.rpartition(".")[2]
    same = [each for each in games if type(each) is type(game)]
    return name if len(same) == 1 else f"{name}-{number}"


def need(teacher: nn.Module | None) -> nn.Module:
    """The teacher, where something asks it."""
    if teacher is None:
        raise NasError("these objectives ask a teacher, and there is none", hint="give one with --teacher")
    return teacher


def _tapped(run: Run) -> nn.ModuleDict:
    """Chooses the layers that are compared, and makes the projections where their shapes differ."""
    run.own_taps = ((),) * len(run.losses)
    student = anatomy(run.student)
    if not any(each.needs_teacher for each in run.losses):
        return nn.ModuleDict()
    theirs = student if run.teacher is None else anatomy(run.teacher)
    run.own_taps = tuple(each.taps(student, theirs) for each in run.losses)
    run.taps = tuple({tap.key: tap for own in run.own_taps for tap in own}.values())
    if not run.taps:
        return nn.ModuleDict()
    one = run.data.batch(0, Part(count=run.data.size))
    mode = run.student.training
    asked: Any = run.student.eval()
    with torch.no_grad(), captured(run.student, [tap.student for tap in run.taps]) as ours:
        predict(asked, one, with_null=False)
    run.student.train(mode)
    teacher: Any = need(run.teacher)
    with torch.no_grad(), captured(teacher, [tap.teacher for tap in run.taps]) as wanted:
        predict(teacher, one, with_null=False)
    return projections(run.taps, ours, wanted, run.settings.seed).to(one.text.device)


def _adamw(
    module: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float, eps: float
) -> torch.optim.Optimizer:
    learning = [each for each in module.parameters() if each.requires_grad]
    return torch.optim.AdamW(learning, lr=lr, betas=betas, weight_decay=weight_decay, eps=eps, fused=True)


def _add_partner(run: Run, name: str, partner: Partner) -> None:
    module = run.engine.shard(partner.module)
    run.partners[name] = Partner(**{**vars(partner), "module": module})
    if partner.lr is None:
        module.requires_grad_(False).eval()
        return
    module.train()
    optimiser = _adamw(module, partner.lr, partner.betas, partner.weight_decay, partner.eps)
    run.players[name] = Player(module=module, optimiser=optimiser, lr=partner.lr, clip=partner.clip)
