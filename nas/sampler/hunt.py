"""Which candidate is expected to push the front out furthest, given what has been evaluated."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas.sampler.gp import Surrogate
from nas.sampler.history import History
from nas.sampler.improvement import Staircase, best
from nas.sampler.problem import Candidates, Problem, among

_CLIMBERS = 8  # candidates whose neighbours are looked at, where there are more than the listed
_CLIMBS = 4
_MARGIN = 0.1  # how far the reference point lies beyond what is known, as a share of its range
_FAR = 5.0  # interquartile ranges below the lower quartile: a value beyond says no more than one there
_LEAST_HOPE = 0.01
_SHORTLIST, _SHARE = 512, 100  # looked at closely: so many, or one in so many
_NEAR = 64  # of neighbours
_DRAWN = 8  # beliefs over which the improvement is the mean
_DOUBT, _SURE = 50, 100  # each has a kernel of its own up to 50 evaluations; from 100 on all have the likeliest
_USED = 600  # evaluations that the surrogate is given: its work grows with their cube


@dataclass(frozen=True, kw_only=True, eq=False)
class Belief:
    """A surrogate with one set of hyperparameters and true values, and the front as it sees it."""

    surrogate: Surrogate
    staircase: Staircase


class Hunt:
    """One proposal: the surrogates, fitted, and the front as it is believed to be.

    Args:
        problem: the candidates.
        history: with at least one finished evaluation.
        noise_sd: of one evaluation; None where it is to be learned.
    """

    def __init__(self, problem: Problem, history: History, noise_sd: float | None = None) -> None:
        self.problem = problem
        self.history = history
        groups = problem.encoding.groups
        used = _used(history)
        done = history.done[used]
        values = _without_outliers(history.quality[used])
        drawn = min(_DRAWN, _DRAWN * _DOUBT // len(values)) if len(values) < _SURE else 0
        fitted = Surrogate.fit(done.inputs, groups, values, noise_sd, drawn)
        tried = done.joined(history.pending)
        counted = np.flatnonzero([*history.feasible[used], *[True] * len(history.pending)])
        # What the noisy evaluations truly are is drawn too (noisy EHVI; Daulton et al. 2021, arXiv 2105.08195).
        generator = np.random.default_rng(0)
        kinds = itertools.islice(itertools.cycle(fitted[1:] or fitted), _DRAWN)
        self.likeliest, *self._beliefs = [
            _belief(each.with_believed(history.pending.inputs), problem, tried.cost, counted)
            for each in (fitted[0], *[kind.imagined(generator) for kind in kinds])
        ]
        self.front_rows = tried.rows[counted[self.likeliest.staircase.members]]
        self.survival: Surrogate | None = None
        if len(history.failed):
            failed = history.failed[np.arange(len(history.failed))[-_USED:]]
            both = done.inputs.joined(failed.inputs)
            lived = np.repeat([1.0, 0.0], [len(done), len(failed)])
            self.survival = Surrogate.fit(both, groups, lived)[0]

    def best(self, candidates: Candidates, count: int, looked: int = _SHORTLIST) -> tuple[np.ndarray, np.ndarray]:
        """Which untried candidates have the greatest expected improvement.

        Where none is expected to improve anything, the least certain come first.

        Args:
            candidates: among which.
            count: how many.
            looked: how many at least are looked at closely.

        Returns:
            Their places, best first, at most `count`, and their gains.
        """
        untried = np.flatnonzero(~among(candidates.keys, self.history.keys))
        # All as the likeliest kernel has it and in single precision, then what may matter by every belief in double.
        some = max(count, looked, len(untried) // _SHARE)
        places = self._ranked([self.likeliest], candidates, untried, some, np.float32)[0]
        return self._ranked(self._beliefs, candidates, places, count, np.float64)

    def _ranked(
        self, beliefs: Sequence[Belief], candidates: Candidates, some: np.ndarray, count: int, dtype: type
    ) -> tuple[np.ndarray, np.ndarray]:
        """`best` among some places, as the mean of some beliefs."""
        most = 2 * len(some) > len(candidates)  # then copying them would take longer than predicting all
        inputs, of = (candidates.inputs, some) if most else (candidates.inputs[some], slice(None))
        hope = np.ones(len(some))
        if self.survival is not None:
            hope = np.clip(self.survival.predict(inputs, dtype)[0][of], _LEAST_HOPE, 1.0)
        predicted = [[each[of] for each in belief.surrogate.predict(inputs, dtype)] for belief in beliefs]
        staircases = [belief.staircase for belief in beliefs]
        places, gains = best(staircases, candidates.cost[some], predicted, hope, count)
        if not len(gains) or gains[0] <= 0.0:
            sd = np.mean([sd for _, sd in predicted], axis=0)
            places = np.argsort(-sd * hope, kind="stable")[:count]
            gains = np.zeros(len(places))
        return some[places], gains

    def chosen(self) -> Candidates:
        """The best of all candidates that were not tried, as the first of a few; empty where all were tried."""
        places, gains = self.best(self.problem.pool, _CLIMBERS)
        found = self.problem.pool[places]
        return found if self.problem.more is None else self._climbed(found, gains)

    def _climbed(self, found: Candidates, gains: np.ndarray) -> Candidates:
        """Goes on from these and the front to better neighbours for as long as one is better than all before."""
        assert self.problem.more is not None
        sources = np.concatenate([found.rows, self.front_rows])
        for _ in range(_CLIMBS):
            near = self.problem.candidates(*self.problem.more(sources))
            near = near[np.unique(near.keys, return_index=True)[1]]
            near = near[np.flatnonzero(~among(near.keys, found.keys))]
            places, theirs = self.best(near, _CLIMBERS, _NEAR)
            every, gains = found.joined(near[places]), np.concatenate([gains, theirs])
            order = np.argsort(-gains, kind="stable")[:_CLIMBERS]
            new = order[order >= len(found)]
            improved = order[0] >= len(found)
            found, gains, sources = every[order], gains[order], every.rows[new]
            if not improved:
                break
        return found


def _belief(surrogate: Surrogate, problem: Problem, cost: np.ndarray, counted: np.ndarray) -> Belief:
    """What a surrogate makes of the candidates that were tried, of these costs [n]; some count for the front."""
    settled = surrogate.settled
    reference = (_cost_reference(problem.cost), _quality_reference(cost, settled))
    return Belief(surrogate=surrogate, staircase=Staircase.of(cost[counted], settled[counted], reference))


def _used(history: History) -> np.ndarray:
    """Which evaluations the surrogate is given: all, or of very many those nearest the front and as many others."""
    count = len(history.done)
    if count <= _USED:
        return np.arange(count)
    cost, quality = history.done.cost, history.quality
    order = np.argsort(cost, kind="stable")
    behind = np.empty(count)
    behind[order] = np.maximum.accumulate(quality[order]) - quality[order]
    ranked = np.lexsort([np.random.default_rng(0).permutation(count), behind])
    others = np.random.default_rng(0).permutation(ranked[_USED // 2 :])[: _USED // 2]
    return np.sort(np.concatenate([ranked[: _USED // 2], others]))


def _without_outliers(quality: np.ndarray) -> np.ndarray:
    """Values that are bad beyond measure drawn in, so that one of them does not decide the scale of all."""
    low, high = np.quantile(quality, [0.25, 0.75])
    return quality if high <= low else np.maximum(quality, low - _FAR * (high - low))


def _cost_reference(cost: np.ndarray) -> float:
    """A little beyond the greatest cost, so that the best quality is worth something there too."""
    low, high = float(cost.min()), float(cost.max())
    return high + _MARGIN * ((high - low) or abs(high) or 1.0)


def _quality_reference(cost: np.ndarray, quality: np.ndarray) -> float:
    """A little below the least quality found, but no lower under the front than the front is high."""
    high, low = float(quality.max()), float(quality.min())
    foot = float(quality[np.lexsort([-quality, cost])[0]])
    floor = max(low, foot - max(high - foot, 0.5 * (high - low)))
    return floor - _MARGIN * ((high - floor) or abs(high) or 1.0)
