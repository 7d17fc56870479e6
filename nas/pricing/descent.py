"""The candidate of a space that has the least of something: milliseconds, parameters, bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from nas.errors import NasError
from nas.pricing.pricer import Pricer, Prices
from nas.space import SearchSpace

Measure = Callable[[Prices], np.ndarray]

_SAMPLES = 2_000
_STARTS = 3


def lowest(
    pricer: Pricer,
    measure: Measure,
    *,
    samples: int = _SAMPLES,
    seed: int = 0,
    starts: Sequence[np.ndarray] = (),
) -> tuple[np.ndarray, float]:
    """The candidate with the lowest measure that a search over all single changes can find.

    Starts from the best of random candidates, references and `starts`; changes one choice at a time to its lowest value
    until no change helps. What is measured is mostly a sum over positions that falls with each choice, so this finds
    the optimum of such a space; it is not a proof for one where two choices must change together.

    Args:
        pricer: of the space.
        measure: what is minimised, [n] of the prices of n candidates.
        samples: random candidates looked at first.
        seed: of these candidates.
        starts: rows [choices] that are looked at first too.

    Returns:
        The row [choices] and its measure.

    Raises:
        NasError: the rules of the space allow no candidate.
    """
    space = pricer.space
    known = [*(space.reference(reference.name).row for reference in space.references), *starts]
    rows = np.concatenate([space.sample(samples, seed), np.array(known).reshape(-1, len(space.choices))]).astype(int)
    if not len(rows):
        raise NasError(
            f"the rules of space {space.name} allow no candidate", hint=f"check the [[rules]] in {space.path}"
        )
    values = _measured(pricer, measure, rows)
    found = [_descend(pricer, measure, rows[i], float(values[i])) for i in np.argsort(values, kind="stable")[:_STARTS]]
    return min(found, key=lambda pair: pair[1])


def changed(space: SearchSpace, rows: np.ndarray) -> np.ndarray:
    """Every allowed row [m, choices], canonical, that differs from one of `rows` [n, choices] in one choice."""
    found = [np.empty((0, len(space.choices)), dtype=np.int64)]
    for column, choice in enumerate(space.choices):
        for value in range(len(choice.values)):
            other = rows[rows[:, column] != value].copy()
            other[:, column] = value
            found.append(other)
    canonical = space.canonical(np.concatenate(found))
    return canonical[space.allowed(canonical)]


def _measured(pricer: Pricer, measure: Measure, rows: np.ndarray) -> np.ndarray:
    return np.asarray(measure(pricer.rows(rows)))


def _descend(pricer: Pricer, measure: Measure, row: np.ndarray, value: float) -> tuple[np.ndarray, float]:
    while True:
        rows = changed(pricer.space, row[None])
        if not len(rows):
            return row, value
        values = _measured(pricer, measure, rows)
        best = int(np.argmin(values))
        if values[best] >= value:
            return row, value
        row, value = rows[best], float(values[best])
