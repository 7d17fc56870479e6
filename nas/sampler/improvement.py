"""Expected hypervolume improvement where one objective is known: a sum over the steps of the front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

_FIRST_LOOK = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class Staircase:
    """The best quality at each cost: cost is minimised, quality maximised.

    Attributes:
        starts, ends: float [k]: cost at which each step begins and ends, ascending; the first begins at minus infinity.
        levels: float [k]: best quality within each step, ascending; the first is the reference's.
        members: int [k - 1]: which point makes each step but the first.
    """

    starts: np.ndarray
    ends: np.ndarray
    levels: np.ndarray
    members: np.ndarray

    @classmethod
    def of(cls, cost: np.ndarray, quality: np.ndarray, reference: tuple[float, float]) -> Staircase:
        """The steps of points [n] that are better than the reference (cost, quality) in both."""
        members: list[int] = []
        level = reference[1]
        for i in np.lexsort([-quality, cost]).tolist():  # of equal cost the best comes first
            if cost[i] < reference[0] and quality[i] > level:
                members.append(i)
                level = quality[i]
        return cls(
            starts=np.array([-np.inf, *cost[members]]),
            ends=np.array([*cost[members], reference[0]]),
            levels=np.array([reference[1], *quality[members]]),
            members=np.array(members, dtype=np.int64),
        )

    def expected(self, cost: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
        """Expected growth of the hypervolume by candidates with these costs and Gaussian qualities, [n]."""
        gain = np.zeros(len(cost))
        for start, end, level in zip(self.starts, self.ends, self.levels, strict=True):
            width = np.maximum(end - np.maximum(cost, start), 0.0)
            reached = width > 0
            if reached.any():
                gain[reached] += width[reached] * _above(mean[reached], sd[reached], level)
        return gain

    def bound(self, cost: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
        """What `expected` does not exceed, [n], for the price of one step: all to the right are taken as low."""
        level = self.levels[np.maximum(np.searchsorted(self.starts, cost, side="right") - 1, 0)]
        return np.maximum(self.ends[-1] - cost, 0.0) * _above(mean, sd, level)


def _above(mean: np.ndarray, sd: np.ndarray, level: np.ndarray | float) -> np.ndarray:
    """The mean of max(x - level, 0) for Gaussian x, [n]."""
    sure = sd <= 1e-12 * np.maximum(np.abs(mean), 1e-300)
    z = (mean - level) / np.where(sure, 1.0, sd)
    density = np.exp(-0.5 * np.square(np.clip(z, -40.0, 40.0))) / np.sqrt(2.0 * np.pi)
    open_ended = np.maximum(sd * (density + z * ndtr(z)), 0.0)
    return np.where(sure, np.maximum(mean - level, 0.0), open_ended)


def best(
    staircases: Sequence[Staircase],
    cost: np.ndarray,
    predicted: Sequence[Sequence[np.ndarray]],
    factor: np.ndarray,
    count: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The candidates of the greatest expected improvement times `factor` (at most 1 each), a mean over beliefs.

    The exact sum is worked out only where the bound leaves a chance.

    Args:
        staircases: one per belief.
        cost: of the candidates [n].
        predicted: per belief, mean and standard deviation of their qualities, [n] each.
        factor: [n].
        count: how many.

    Returns:
        Their indices, best first, at most `count`, and their gains.
    """
    beliefs = list(zip(staircases, predicted, strict=True))
    bound = np.mean([steps.bound(cost, mean, sd) for steps, (mean, sd) in beliefs], axis=0) * factor
    looked = _FIRST_LOOK
    while True:
        some = np.arange(len(bound)) if looked >= len(bound) else np.argpartition(-bound, looked)[: looked + 1]
        expected = [steps.expected(cost[some], mean[some], sd[some]) for steps, (mean, sd) in beliefs]
        gains = np.mean(expected, axis=0) * factor[some]
        kept = np.argsort(-gains, kind="stable")[:count]
        # The last of a partition has the greatest bound of all that were not looked at, or more.
        if len(some) == len(bound) or gains[kept[-1]] >= bound[some[-1]]:
            return some[kept], gains[kept]
        looked *= 4
