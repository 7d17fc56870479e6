"""The steps of a run: whose turn it is, its loss, and what the record says of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nas.batches import Batch, Draws, Outputs, Part, stream
from nas.diffusion import FLOW
from nas.distill.asking import answer, predict
from nas.distill.run import STUDENT, Run, need
from nas.distill.settings import Progress
from nas.errors import DIVERGED, UntrainableError
from nas.features import Tap, captured, module_key
from nas.objectives import Scene, total

_SALT = 7301  # apart from the streams of the data, which are of a seed and a step too

Record = tuple[int, Tensor | None, dict[str, Tensor], Tensor]  # step, the student's loss, terms, gradient norms


def step(run: Run) -> Record:
    """One step: every partner's turn that is due, then the student's; nothing waits for the device."""
    terms: dict[str, Tensor] = {}
    norms: list[Tensor] = []
    loss: Tensor | None = None
    for name, game in run.games.items():
        for each in game.turns(run.step):
            found, norm = _turn(run, f"{name}.{each}")
            terms |= {f"{name}.{each}.{term}": value for term, value in found.items()}
            norms.append(norm)
    if all(game.student_moves(run.step) for game in run.games.values()):
        found, norm = _turn(run, STUDENT)
        loss = found.pop("")
        terms |= found
        norms.append(norm)
        _average(run.average, run.student, run.settings.ema_weight(run.step))
        for partner in run.partners.values():
            if partner.follows is not None:
                _average(partner.module, run.student, partner.follows)
    run.step += 1
    return run.step, loss, terms, torch.stack(norms)


def _turn(run: Run, who: str) -> tuple[dict[str, Tensor], Tensor]:
    """One network's turn on fresh examples, in as many pieces as the settings say; the student's loss is term ""."""
    player, pieces = run.players[who], run.settings.accumulate
    for group in player.optimiser.param_groups:
        group["lr"] = player.lr * run.settings.rate_share(run.step)
    found: dict[str, Tensor] = {}
    with _only(run, who):
        for piece in range(pieces):
            part = Part(index=run.engine.rank * pieces + piece, count=run.engine.world * pieces)
            loss, terms = _loss(run, who, run.data.batch(run.turn, part), part)
            run.engine.backward(loss / pieces)
            for name, value in {**terms, **({"": loss} if who == STUDENT else {})}.items():
                found[name] = found.get(name, 0) + value.detach() / pieces
    norm = run.engine.move(player.optimiser, player.module.parameters(), player.clip)
    player.optimiser.zero_grad(set_to_none=True)
    run.turn += 1
    return found, norm


@contextmanager
def _only(run: Run, who: str) -> Iterator[None]:
    """Gradients go to one player's weights only; through the others they pass, but none is kept."""
    held = [
        each
        for name, player in run.players.items()
        if name != who
        for each in player.module.parameters()
        if each.requires_grad
    ]
    for each in held:
        each.requires_grad_(False)
    try:
        yield
    finally:
        for each in held:
            each.requires_grad_(True)


def _loss(run: Run, who: str, batch: Batch, part: Part) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one piece of a turn, and its terms."""
    game, _, partner = who.partition(".")
    draws = _draws(run, batch, part)
    if partner:
        with run.engine.autocast(batch.text.device):
            terms = run.games[game].partner_loss(partner, _scene(run, game, batch, draws))
        return torch.stack(list(terms.values())).sum(), terms
    loss = torch.zeros((), device=batch.text.device)
    found: dict[str, Tensor] = {}
    if run.losses:
        with_null = any(each.needs_null for each in run.losses)
        outputs, teacher = _asked(run, batch, with_null)
        loss, mapping = total(run.losses, outputs, teacher, batch, run.own_taps)
        found = dict(mapping)
    for name, each in run.games.items():
        with run.engine.autocast(batch.text.device):
            terms = each.student_loss(_scene(run, name, batch, draws))
        loss = loss + each.weight * torch.stack(list(terms.values())).sum()
        found |= {f"{name}.{term}": value for term, value in terms.items()}
    return loss, found


def _asked(run: Run, batch: Batch, with_null: bool) -> tuple[Outputs, Outputs | None]:
    """The student's and the teacher's outputs on a batch, features in the teacher's shapes."""
    teacher: Outputs | None = None
    student: Any = run.student
    with run.engine.autocast(batch.text.device):
        if any(each.needs_teacher for each in run.losses):
            if batch.teacher is None or run.taps:
                teacher = answer(need(run.teacher), batch, with_null=with_null, taps=run.taps)
            else:
                teacher = batch.teacher
        with captured(student, [tap.student for tap in run.taps]) as features:
            said = predict(student, batch, with_null=with_null)
        matched = {tap.key: _projected(run, tap, features[tap.student]) for tap in run.taps}
    return Outputs(velocity=said.velocity, null_velocity=said.null_velocity, features=matched), teacher


def _projected(run: Run, tap: Tap, feature: Tensor) -> Tensor:
    learner = run.players[STUDENT].module
    if isinstance(learner, nn.ModuleList):
        heads: Any = learner[1]
        if module_key(tap) in heads:
            projected: Tensor = heads[module_key(tap)](feature)
            return projected
    return feature


def _scene(run: Run, game: str, batch: Batch, draws: Draws) -> Scene:
    prefix = f"{game}."
    student: Any = run.student
    teacher: Any = need(run.teacher)
    return Scene(
        student=student,
        teacher=teacher,
        partners={
            name.removeprefix(prefix): partner.module
            for name, partner in run.partners.items()
            if name.startswith(prefix)
        },
        batch=batch,
        draws=draws,
        schedule=getattr(run.student, "schedule", FLOW),
        step=run.step,
    )


def _draws(run: Run, batch: Batch, part: Part) -> Draws:
    return Draws(
        generator=stream(_SALT, run.settings.seed, run.turn),
        total=run.data.size,
        part=part,
        device=batch.text.device,
    )


@torch.no_grad()
def _average(average: nn.Module, live: nn.Module, kept: float) -> None:
    averaged: list[Tensor] = list(average.parameters())
    now: list[Tensor] = list(live.parameters())
    torch._foreach_lerp_(averaged, now, 1 - kept)
    for old, new in zip(average.buffers(), live.buffers(), strict=True):
        old.copy_(new)


def line(run: Run, pending: Sequence[Record]) -> Progress:
    """The means since the last line.

    Raises:
        UntrainableError: something was not finite; says the first step at which.
    """
    settings = run.settings
    for step, loss, terms, norms in pending:
        bad = [name for name, value in terms.items() if not math.isfinite(float(value))]
        if bad or not bool(norms.isfinite().all()) or (loss is not None and not math.isfinite(float(loss))):
            what = f"the loss {', '.join(bad)}" if bad else "a gradient"
            raise UntrainableError(
                f"{what} is not finite at step {step} of {settings.steps} (batch {step - 1}) at learning rate"
                f" {settings.lr:g}",
                DIVERGED,
                hint="checkpoints from before it are kept; train with a lower learning rate, or with --precision fp32"
                " if it is a lower one",
            )
    losses = [loss for _, loss, _, _ in pending if loss is not None]
    names = dict.fromkeys(name for _, _, terms, _ in pending for name in terms)
    values = {name: torch.stack([terms[name] for _, _, terms, _ in pending if name in terms]).mean() for name in names}
    if losses:
        values[""] = torch.stack(losses).mean()
    means = dict(zip(values, run.engine.mean(torch.stack(list(values.values()))).tolist(), strict=True))
    return Progress(
        step=run.step,
        steps=settings.steps,
        lr=settings.learning_rate(run.step - 1),
        loss=means.pop("", math.nan),
        terms=means,
        seconds=run.seconds,
    )
