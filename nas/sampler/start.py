"""The first candidates, before there is anything to learn from: spread over the cost and over the choices."""

from __future__ import annotations

import numpy as np

_DRAWN = 512


def next_start(
    cost: np.ndarray,
    coordinates: np.ndarray,
    open_: np.ndarray,
    tried_cost: np.ndarray,
    tried_coordinates: np.ndarray,
    bands: int,
    generator: np.random.Generator,
) -> int:
    """The candidate to try next: of the cost band that was tried least, the one least like what was tried.

    Bands are of equal width between the least and the greatest cost, as the hypervolume counts them.

    Args:
        cost: of the candidates [n].
        coordinates: of the candidates [n, C].
        open_: bool [n]: which may be proposed, at least one.
        tried_cost: of what was tried or is being tried [m].
        tried_coordinates: of the same [m, C].
        bands: how many.
        generator: draws among bands that were tried alike, and the candidates that are looked at.
    """
    edges = np.linspace(cost.min(), cost.max(), bands + 1)[1:-1]
    band = np.searchsorted(edges, cost, side="right")
    tried = np.bincount(np.searchsorted(edges, tried_cost, side="right"), minlength=bands)
    left = np.unique(band[open_])
    left = left[tried[left] == tried[left].min()]
    members = np.flatnonzero(open_ & (band == generator.choice(left)))
    drawn = generator.choice(members, size=min(_DRAWN, len(members)), replace=False)
    if not len(tried_cost):
        return int(drawn[0])
    apart = np.square(coordinates[drawn][:, None] - tried_coordinates).sum(axis=2).min(axis=1)
    return int(drawn[np.argmax(apart)])
