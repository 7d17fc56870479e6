"""What to try next: the sampler asked about the study as it stands under today's prices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from nas import sampler
from nas.evaluate import Evaluation, Evaluator, Pool
from nas.network import short_hash
from nas.space import SearchSpace
from nas.study.facts import LOST, RUNNING, Fact, Row, Snapshot
from nas.study.outcome import DUPLICATE, FAILED, FORBIDDEN, OVER, PROXIED, STOPPED
from nas.study.presence import Place

# Of a space that cannot be listed, this many candidates are priced for the sampler to choose from.
POOL = 100_000
_TELLING = 5  # scores


class _Ordinal(IntDistribution):
    """One that its copies are: Optuna's storage in memory copies every distribution of every trial it is given.

    It must not reach another storage, which writes a distribution down by the name of its class.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Ordinal:
        return self


class _Category(CategoricalDistribution):
    """Likewise."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Category:
        return self


def distributions(
    space: SearchSpace,
    ordinal: type[IntDistribution] = IntDistribution,
    category: type[CategoricalDistribution] = CategoricalDistribution,
) -> dict[str, BaseDistribution]:
    """Optuna's view of the choices: an ordinal is the integer index of its value, the others are categories."""
    return {
        choice.name: ordinal(0, len(choice.values) - 1) if choice.ordinal else category(list(choice.values))
        for choice in space.choices
    }


def to_params(space: SearchSpace, row: Row) -> dict[str, Any]:
    """A row as Optuna parameters."""
    return {c.name: i if c.ordinal else c.values[i] for c, i in zip(space.choices, row, strict=True)}


def to_row(space: SearchSpace, params: Mapping[str, Any]) -> list[int]:
    """Optuna parameters as a row."""
    return [int(params[c.name]) if c.ordinal else c.index(params[c.name]) for c in space.choices]


class Proposer:
    """Asks a sampler for rows.

    Args:
        evaluator: of the study.
        name: of the sampler.
        seed: of the study; each proposal has its own, made from it and the number of proposals before.
        scored: how many seeds of the proxy a score is the median of.
    """

    def __init__(self, evaluator: Evaluator, name: str, seed: int, scored: int = 1) -> None:
        self._evaluator, self._name, self._seed, self._scored = evaluator, name, seed, scored
        self._space = evaluator.space
        self._distributions = distributions(self._space, _Ordinal, _Category)
        self._pool: Pool | None = None
        self._problem: tuple[Place, sampler.Problem] | None = None

    def propose(
        self, snapshot: Snapshot, price: Callable[[Row], Evaluation], place: Place, at_random: bool
    ) -> tuple[Row | None, dict[str, Any]]:
        """The next row, canonical, and what the sampler wants to be kept with it; None where it has no more.

        Args:
            snapshot: of the study.
            price: of a row.
            place: of this worker among those at work.
            at_random: drawn uniformly instead.
        """
        count = snapshot.proposals
        seed = int(short_hash(f"{self._seed}:{count}" + (f":{place.number}" if place.number else "")), 16) % 2**31
        if at_random:
            return tuple(self._space.sample(1, seed)[0].tolist()), {}
        # Each proposal has a sampler of its own: what it draws then follows from the study alone, so it resumes.
        noise_sd = _noise_sd(snapshot, self._scored)
        chosen = sampler.make(self._name, seed=seed, problem=self._problem_for(place), noise_sd=noise_sd)
        study = memory(self._space, self._distributions, snapshot, price, self._evaluator.terms.budget.ms, chosen)
        try:
            trial = study.ask(self._distributions)
        except sampler.Exhausted:
            return None, {}
        kept = {k: v for k, v in study.get_trials(deepcopy=False)[-1].system_attrs.items() if k != "constraints"}
        row = self._space.canonical(np.array([to_row(self._space, trial.params)]))[0]
        return tuple(row.tolist()), kept

    def _problem_for(self, place: Place) -> sampler.Problem | None:
        """What the front's sampler may choose from: of several workers each has its own part of the candidates.

        The same trials would lead all of them to the same choice, and all but one would have to withdraw.
        """
        if self._name != "front":
            return None
        if self._problem is None or self._problem[0] != place:
            if self._pool is None:
                self._pool = self._evaluator.problem_pool(POOL, self._seed)
            rows, latency_ms, features = _part(self._pool, place)
            listed = self._space.size <= 2 * POOL  # otherwise the pool is a part of the space
            found = sampler.Problem(
                distributions=self._distributions,
                rows=rows,
                cost=latency_ms,
                features=features,
                references=tuple(self._space.reference(r.name).row for r in self._space.starting),
                more=None if listed else lambda rows: _part(self._evaluator.neighbours(rows, self._seed), place),
                price=self._evaluator.features,
            )
            self._problem = (place, found)
        return self._problem[1]


def _noise_sd(snapshot: Snapshot, seeds: int) -> float | None:
    """Standard deviation of one score, from how far its seeds lay apart; None where too few scores tell."""
    scores = [fact.outcome.score for fact in snapshot.chains if fact.outcome is not None and fact.state == PROXIED]
    spreads = [each.value_sd for each in scores if each is not None]
    if seeds < 2 or len(spreads) < _TELLING:
        return None
    wider = np.sqrt(np.pi / 2) if seeds > 2 else 1.0  # a median of many is so much less certain than their mean
    return float(np.sqrt(np.mean(np.square(spreads))) * wider / np.sqrt(seeds))


def _part(pool: Pool, place: Place) -> Pool:
    """Those of the pool that are one worker's, by a hash of the row; all where that would leave none."""
    rows, latency_ms, features = pool
    factors = np.random.default_rng(0).integers(1, 2**62, size=rows.shape[1], dtype=np.int64) * 2 + 1
    mine = ((rows.astype(np.int64) @ factors) >> 32) % place.of == place.number
    return (rows[mine], latency_ms[mine], features[mine]) if mine.any() else pool


def memory(
    space: SearchSpace,
    kinds: Mapping[str, BaseDistribution],
    snapshot: Snapshot,
    price: Callable[[Row], Evaluation],
    budget_ms: float,
    chosen: optuna.samplers.BaseSampler,
) -> optuna.Study:
    """The study as a sampler sees it: in memory, latency to be minimised and quality to be maximised, re-priced.

    What violates a budget or limit, a rule, or cannot be trained has a constraint above 0. Runs that are on their way,
    or wait for one, are running. What is known but says nothing (a duplicate) is left out, and so is a stopped run that
    is worth another.
    """
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=chosen)
    for fact in snapshot.chains:
        trial = _seen(space, kinds, fact, price(fact.row) if fact.state != FORBIDDEN else None, budget_ms)
        if trial is not None and (fact.state != STOPPED or snapshot.holds(fact)):
            study.add_trial(trial)
    return study


def _seen(
    space: SearchSpace, kinds: Mapping[str, BaseDistribution], fact: Fact, priced: Evaluation | None, budget_ms: float
) -> FrozenTrial | None:
    """One trial as a sampler sees it, or None."""
    state, values = TrialState.PRUNED, None
    constraints = {"forbidden": 1.0} if priced is None else {"over_budget": _excess(priced, budget_ms)}
    if fact.state == DUPLICATE or (fact.state == OVER and priced is not None and priced.feasible):
        return None
    if fact.state in (RUNNING, LOST):
        state, constraints = TrialState.RUNNING, {}
    elif fact.state == FAILED:
        state = TrialState.FAIL
    elif fact.state == PROXIED and priced is not None and fact.outcome is not None and fact.outcome.score is not None:
        state, values = TrialState.COMPLETE, [priced.latency_ms, fact.outcome.score.value]
    elif fact.state not in (OVER, FORBIDDEN, STOPPED):
        constraints["untrainable"] = 1.0
    return optuna.trial.create_trial(
        state=state,
        values=values,
        params=to_params(space, fact.row),
        distributions=dict(kinds),
        system_attrs=dict(fact.attributes),
        constraints=constraints or None,
    )


def _excess(priced: Evaluation, budget_ms: float) -> float:
    """Milliseconds over the first budget; at least 1 where another one or a limit is violated, at most 0 where none."""
    over = priced.latency_high_ms - budget_ms
    return min(over, 0.0) if priced.feasible else max(over, 1.0)
