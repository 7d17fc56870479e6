"""The fastest candidate of a space under a latency predictor."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from nas.errors import NasError
from nas.pricing.pricer import Pricer
from nas.space import SearchSpace

_SAMPLES = 2_000
_STARTS = 3


class Predictor(Protocol):
    """What a latency predictor must answer here."""

    def predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Milliseconds, and the bounds of their interval, [n] each, of features [n, F]."""


def fastest(
    pricer: Pricer, predictor: Predictor, *, samples: int = _SAMPLES, seed: int = 0
) -> tuple[np.ndarray, float]:
    """The candidate with the lowest predicted latency that a search over all single changes can find.

    Starts from the best of random candidates and references; changes one choice at a time to its fastest value until
    no change helps. Latency is a sum over positions that mostly falls with each choice, so this finds the optimum of
    such a space; it is not a proof for one where two choices must change together.

    Args:
        pricer: of the space.
        predictor: its predicted milliseconds are minimised.
        samples: random candidates looked at first.
        seed: of these candidates.

    Returns:
        The row [choices] and its milliseconds per denoiser call.

    Raises:
        NasError: the rules of the space allow no candidate.
    """
    space = pricer.space
    references = [space.reference(reference.name).row for reference in space.references]
    rows = np.concatenate([space.sample(samples, seed), np.array(references).reshape(-1, len(space.choices))]).astype(
        int
    )
    if not len(rows):
        raise NasError(
            f"the rules of space {space.name} allow no candidate", hint=f"check the [[rules]] in {space.path}"
        )
    ms = _milliseconds(pricer, predictor, rows)
    found = [_descend(pricer, predictor, rows[i], float(ms[i])) for i in np.argsort(ms, kind="stable")[:_STARTS]]
    return min(found, key=lambda pair: pair[1])


def _milliseconds(pricer: Pricer, predictor: Predictor, rows: np.ndarray) -> np.ndarray:
    return np.asarray(predictor.predict(pricer.rows(rows).features)[0])


def _descend(pricer: Pricer, predictor: Predictor, row: np.ndarray, ms: float) -> tuple[np.ndarray, float]:
    while True:
        changed = _changed(pricer.space, row)
        if not len(changed):
            return row, ms
        times = _milliseconds(pricer, predictor, changed)
        best = int(np.argmin(times))
        if times[best] >= ms:
            return row, ms
        row, ms = changed[best], float(times[best])


def _changed(space: SearchSpace, row: np.ndarray) -> np.ndarray:
    """Every allowed row [n, choices] that differs from `row` in one choice."""
    rows = []
    for column, choice in enumerate(space.choices):
        for value in range(len(choice.values)):
            if value != row[column]:
                rows.append([*row[:column], value, *row[column + 1 :]])
    changed = space.canonical(np.array(rows, dtype=np.int64).reshape(-1, len(space.choices)))
    return changed[space.allowed(changed)]
