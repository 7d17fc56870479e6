"""Pareto sets in plain numpy. Every objective is minimised: a caller that maximises passes the negative.

Points are float arrays [n, d]. A point dominates another when it is nowhere worse and somewhere better; equal points
do not dominate each other, so repeats of a non-dominated point are all non-dominated.
"""

from __future__ import annotations

import numpy as np

from nas.errors import NasError

Reference = tuple[float, float] | np.ndarray


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Which points no other point dominates.

    Returns:
        bool [n].

    Raises:
        NasError: `points` is not [n, d] or holds a NaN or an infinity.
    """
    points = _checked(points)
    keep = np.ones(len(points), dtype=bool)
    for i, point in enumerate(points):
        nowhere_worse = (points <= point).all(axis=1)
        somewhere_better = (points < point).any(axis=1)
        keep[i] = not (nowhere_worse & somewhere_better).any()
    return keep


def front(points: np.ndarray) -> np.ndarray:
    """Indices of the non-dominated points, by the first objective and then by the second.

    Returns:
        int [m].
    """
    points = _checked(points)
    kept = np.flatnonzero(non_dominated(points))
    return kept[np.lexsort(points[kept].T[::-1])]


def hypervolume(points: np.ndarray, reference: Reference) -> float:
    """The area between the points and the reference point, in two dimensions.

    A point that is not better than the reference in both objectives adds nothing. Figures are comparable only under
    the same reference point.

    Raises:
        NasError: `points` is not [n, 2] or not finite.
    """
    points = _checked(points)
    if points.size and points.shape[1] != 2:
        raise NasError(f"the hypervolume is defined here for two objectives, got {points.shape[1]}")
    area, ceiling = 0.0, float(reference[1])
    inside = points[(points < np.asarray(reference)).all(axis=1)] if points.size else points
    # Left to right, each point adds the rectangle from itself to the reference that lies under those before it.
    for first, second in inside[np.lexsort(inside.T[::-1])]:
        if second < ceiling:
            area += (float(reference[0]) - first) * (ceiling - second)
            ceiling = second
    return float(area)


def hypervolumes(points: np.ndarray, reference: Reference) -> np.ndarray:
    """The hypervolume after each point in turn: what a search had found by then.

    Returns:
        float64 [n], never decreasing.
    """
    points = _checked(points)
    return np.array([hypervolume(points[: i + 1], reference) for i in range(len(points))])


def knee(points: np.ndarray) -> int:
    """The point of a two-objective set after which more of one objective buys the least of the other.

    Both objectives are scaled to [0, 1] over the front; the knee lies farthest below the straight line between the
    front's two ends. A front that bends nowhere below that line has no knee: then it is the end that is best in the
    second objective.

    Returns:
        The knee's index in `points`.

    Raises:
        NasError: `points` is empty, not [n, 2] or not finite.
    """
    points = _checked(points)
    if not len(points) or points.shape[1] != 2:
        raise NasError(f"a knee needs points [n, 2] with n at least 1, got {points.shape}")
    order = front(points)
    ends = points[order]
    span = ends.max(axis=0) - ends.min(axis=0)
    scaled = (ends - ends.min(axis=0)) / np.where(span > 0, span, 1.0)
    # The ends are (0, 1) and (1, 0), so the line is first + second = 1.
    depth = 1.0 - scaled.sum(axis=1)
    deepest = int(np.argmax(depth))
    return int(order[deepest if depth[deepest] > 1e-12 else -1])


def _checked(points: np.ndarray) -> np.ndarray:
    """`points` as float64 [n, d]; an empty list is [0, 2]."""
    array = np.asarray(points, dtype=np.float64)
    if array.size == 0:
        return array.reshape(0, array.shape[1] if array.ndim == 2 else 2)
    if array.ndim != 2:
        raise NasError(f"points must be an array [n, objectives], got shape {array.shape}")
    if not np.isfinite(array).all():
        raise NasError("points of a Pareto set must be finite numbers")
    return array
