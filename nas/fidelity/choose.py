"""Which candidates a score is tested on: the references, and others from all over the space's latencies."""

from __future__ import annotations

import numpy as np

from nas.space import Candidate, SearchSpace

_POOL = 4000


def spread_out(space: SearchSpace, count: int, seed: int, latency_ms: np.ndarray, pool: np.ndarray) -> list[Candidate]:
    """The starting references, then one candidate from each of as many equally full bands of latency as are wanted.

    Args:
        space: to choose from.
        count: how many in all.
        seed: of the draw within a band.
        latency_ms: of each row of `pool` [n].
        pool: rows to draw from [n, choices], as `pool_of` gives them.
    """
    chosen = [space.reference(reference.name) for reference in space.starting][:count]
    known = {candidate.key for candidate in chosen}
    generator = np.random.default_rng(seed)
    for band in np.array_split(np.argsort(latency_ms, kind="stable"), count - len(chosen)):
        for index in generator.permutation(band):
            candidate = space.from_row(pool[index])
            if candidate.key not in known:
                chosen.append(candidate)
                known.add(candidate.key)
                break
    return chosen


def pool_of(space: SearchSpace, seed: int) -> np.ndarray:
    """Rows to choose from [n, choices]."""
    return space.sample(_POOL, seed)
