"""Least squares with most unknowns non-negative, from the normal equations and a guess of which are zero.

A fit is repeated thousands of times with one network left out, and each time nearly the same unknowns end at zero. So
the active set of the last fit is the first guess here, and a few small symmetric systems replace a whole solver run.
The ridge of every fit keeps the normal equations well conditioned, which is what makes them safe to use.
"""

from __future__ import annotations

import numpy as np

from nas.errors import NasError

_TOLERANCE = 1e-11


def nonnegative(gram: np.ndarray, moment: np.ndarray, free: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Minimises x' gram x / 2 - moment' x with x >= 0 wherever it is not free (Lawson and Hanson, from a warm start).

    Args:
        gram: [p, p], positive definite.
        moment: [p].
        free: [p] bool, unknowns of either sign.
        positive: [p] bool, a guess of which of the others are above zero; it decides the time taken, not the answer.

    Raises:
        NasError: the active set did not settle, which a positive definite matrix cannot cause.
    """
    active = positive | free
    x = _on(gram, moment, active)
    while (below := active & ~free & (x <= 0)).any():
        active &= ~below
        x = _on(gram, moment, active)
    refused = np.zeros_like(free)
    for _ in range(10 * len(moment)):
        gain = np.where(active | refused, -np.inf, moment - gram @ x)
        best = int(np.argmax(gain))
        if gain[best] <= _TOLERANCE * np.abs(moment).max():
            return x
        active[best] = True
        x, active = _towards(gram, moment, free, x, active)
        # Rounding may take back at once what the gradient asked for; asked again, it would go on for ever.
        refused[best] = not active[best]
    raise NasError("the non-negative least squares of a latency fit did not settle")


def _towards(
    gram: np.ndarray, moment: np.ndarray, free: np.ndarray, x: np.ndarray, active: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Moves a feasible x to the best of its active set, leaving out what would become negative on the way."""
    while True:
        aim = _on(gram, moment, active)
        below = active & ~free & (aim <= 0)
        if not below.any():
            return aim, active
        step = float(np.min(x[below] / np.maximum(x[below] - aim[below], 1e-300)))
        x = x + min(1.0, step) * (aim - x)
        hit = below & (x <= _TOLERANCE * np.abs(x).max())
        if not hit.any():
            hit = below & (x == x[below].min())
        active = active & ~hit
        x = np.where(active, x, 0.0)


def _on(gram: np.ndarray, moment: np.ndarray, active: np.ndarray) -> np.ndarray:
    """The unconstrained optimum over the active unknowns, all others zero."""
    x = np.zeros(len(moment))
    kept = np.flatnonzero(active)
    if len(kept):
        x[kept] = np.linalg.solve(gram[np.ix_(kept, kept)], moment[kept])
    return x
