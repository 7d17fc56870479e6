"""Whether anything in a space meets every constraint, and how much of it each one rejects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas.errors import UsageError
from nas.evaluate.constraints import Constraint, DeviceBudget
from nas.evaluate.pool import within
from nas.pricing import Pricer, Prices, lowest

_PROBE = 2_000


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """What one constraint keeps out of the search.

    Attributes:
        constraint: its name.
        share: of the space, that it rejects.
        alone: of the space, that it rejects and no other constraint does.
    """

    constraint: str
    share: float
    alone: float


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How much of a space is left by the constraints, from `sampled` candidates drawn uniformly.

    Attributes:
        feasible: the share that meets all of them.
        rejected: of each constraint.
    """

    feasible: float
    rejected: tuple[Rejection, ...]
    sampled: int


def shares(pricer: Pricer, constraints: Sequence[Constraint], n: int, seed: int) -> Shares:
    """The shares, of `n` candidates or of the whole space where that has fewer."""
    rows = pricer.space.sample(n, seed)
    parts = [
        np.stack([each.values(prices) > each.most for each in constraints], axis=1) for prices in pricer.chunks(rows)
    ]
    broken = np.concatenate(parts)
    count = broken.sum(axis=1)
    rejected = tuple(
        Rejection(
            constraint=each.name,
            share=float(broken[:, i].mean()),
            alone=float((broken[:, i] & (count == 1)).mean()),
        )
        for i, each in enumerate(constraints)
    )
    return Shares(feasible=float((count == 0).mean()), rejected=rejected, sampled=len(rows))


def reachable(pricer: Pricer, constraints: Sequence[Constraint]) -> np.ndarray:
    """A row [choices] that meets every constraint.

    Raises:
        UsageError: nothing found does; names the constraint that nothing meets, or those that nothing meets together,
            the candidate that comes nearest, by how much it misses, and what would have to change.
    """
    rows = pricer.space.sample(_PROBE, 0)
    if len(rows):
        good = rows[within(constraints, pricer.rows(rows))]
        if len(good):
            return np.asarray(good[0])
    least = [lowest(pricer, each.values) for each in constraints]
    for constraint, (row, value) in zip(constraints, least, strict=True):
        if value > constraint.most:
            raise _unmet(pricer, constraint, row, value)
    row, excess = lowest(pricer, lambda prices: _excess(constraints, prices), starts=[row for row, _ in least])
    if excess > 1:
        raise _contradictory(pricer, constraints, row)
    return row


def _excess(constraints: Sequence[Constraint], prices: Prices) -> np.ndarray:
    """[n]: the greatest of the values, each as a fraction of what is allowed."""
    return np.asarray(np.max([each.values(prices) / each.most for each in constraints], axis=0))


def _unmet(pricer: Pricer, constraint: Constraint, row: np.ndarray, value: float) -> UsageError:
    """What to say of a constraint that nothing meets."""
    space, key = pricer.space.name, pricer.space.from_row(row).key
    if not isinstance(constraint, DeviceBudget):
        return UsageError(
            f"no candidate of {space} meets {constraint.name}: the least found, {key}, has {constraint.words(value)}",
            hint=f"a limit from {constraint.words(value)}, or a space with smaller networks",
        )
    terms, ms = constraint.terms, float(constraint.expected_ms(pricer.rows(np.asarray(row)[None]))[0])
    return UsageError(
        f"no candidate of {space} meets {constraint.name} with probability {terms.confidence:g}: the fastest found,"
        f" {key}, takes {ms:.0f} ms and is below {value:.0f} ms with that probability, {value - constraint.most:.0f} ms"
        f" over ({terms.fixed_high_ms:.4g} ms of it fixed parts)",
        hint=f"a budget from {value:.0f} ms, a lower --confidence or --resolution, or a space with smaller networks",
    )


def _contradictory(pricer: Pricer, constraints: Sequence[Constraint], row: np.ndarray) -> UsageError:
    """What to say where each constraint can be met, but not all of them at once."""
    prices = pricer.rows(np.asarray(row)[None])
    values = [float(each.values(prices)[0]) for each in constraints]
    missed = [each.broken(value) for each, value in zip(constraints, values, strict=True) if value > each.most]
    return UsageError(
        f"no candidate of {pricer.space.name} was found that meets {' and '.join(each.name for each in constraints)}"
        f" together: the nearest is {pricer.space.from_row(row).key} ({'; '.join(missed)})",
        hint="loosen one of them; each alone can be met",
    )
