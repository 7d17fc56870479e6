"""Tries fits of few networks where many were timed: what `spread.json` tells targets that have only few."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from nas.latency.calibration import missed
from nas.latency.problem import RIDGES, Problem
from nas.latency.spread import FEW

_DRAWS = 24
_TESTED = 40


def tried(posed: Problem, seed: int = 0) -> dict[str, dict[str, dict[str, float]]]:
    """How far fits of one to four of a target's networks miss its others.

    Blocks are left out: the targets that this is for have none.

    Returns:
        number of networks -> ridge -> mean squared normalised log residual ("square") and mean log spread ("spread").
    """
    networks = posed.networks != ""
    whole = _only(posed, networks)
    rng = np.random.default_rng(seed)
    return {
        str(n): {f"{ridge:g}": _misses(whole.shrunk(ridge=ridge, tied=True), draws) for ridge in RIDGES}
        for n in FEW
        if n < len(whole.groups) and (draws := list(_draws(whole, n, rng)))
    }


def _only(posed: Problem, keep: np.ndarray) -> Problem:
    return replace(
        posed,
        names=posed.names[keep],
        subjects=posed.subjects[keep],
        networks=posed.networks[keep],
        chips=posed.chips[keep],
        rows=posed.rows.take(keep),
        borrowed={},
    )


def _draws(posed: Problem, n: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Masks of what is fitted and what is then predicted, with something in each."""
    groups = posed.groups
    if math.comb(len(groups), n) <= _DRAWS:
        chosen = [list(some) for some in itertools.combinations(groups, n)]
    else:
        chosen = [list(rng.choice(groups, n, replace=False)) for _ in range(_DRAWS)]
    for some in chosen:
        train = np.isin(posed.networks, some)
        others = [group for group in groups if group not in some]
        tested = others if len(others) <= _TESTED else list(rng.choice(others, _TESTED, replace=False))
        test = posed.testable(np.isin(posed.networks, tested), train)
        if test.any():
            yield train, test


def _misses(posed: Problem, draws: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    squares, spreads = [], []
    for train, test in draws:
        residuals, spread = missed(posed, test, posed.solve(train))
        squares.append(np.mean(residuals**2))
        spreads.append(np.mean(np.log(spread)))
    return {"square": float(np.mean(squares)), "spread": float(np.mean(spreads))}
