"""How wrong a fit is on networks it has not seen: ridge, jackknife residuals and card all come from that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas.latency.predictor import EMPIRICAL_FROM, LatencyPredictor, kinds_of
from nas.latency.problem import CHIP_FACTORS, RIDGES, Problem
from nas.latency.regression import solve
from nas.op import KINDS

LEVELS = (0.8, 0.9)
_FEW = 10  # networks up to which each is held out in turn; five folds beyond


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A row predicted by a complete fit that did not see its network: ridge, residuals and all.

    Attributes:
        intervals: level -> central interval (low, high) in ms.
        uppers: level -> one-sided bound in ms.
        unseen: operator kinds of the row that the fit had never seen and priced by the prior.
    """

    name: str
    network: str
    chip: str
    ms: float
    predicted: float
    intervals: Mapping[float, tuple[float, float]]
    uppers: Mapping[float, float]
    unseen: tuple[str, ...]

    @property
    def error(self) -> float:
        """Signed relative error."""
        return self.predicted / self.ms - 1


def folds(groups: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The networks held out together: each alone where there are few, else five parts (shuffled with seed 0)."""
    if len(groups) <= _FEW:
        return tuple((group,) for group in groups)
    order = np.random.default_rng(0).permutation(len(groups))
    return tuple(tuple(groups[i] for i in part) for part in np.array_split(order, 5))


def trials(posed: Problem, keep: np.ndarray) -> tuple[tuple[np.ndarray, ...], ...]:
    """What is held out to learn how uncertain a fit of the rows `keep` is, by kind, as masks [n].

    Networks by their folds. Where several chips are pooled also single rows (a network known from other chips) and
    whole chips, because each tries another part of the model: operators, a chip's fit to one network, the chip trend.
    """
    networks = keep & (posed.networks != "")
    kinds = [tuple(networks & np.isin(posed.networks, fold) for fold in folds(_groups(posed, keep)))]
    chips = sorted(set(posed.chips[networks]))
    if len(chips) > 1:
        several = [i for i in np.flatnonzero(networks) if (networks & (posed.networks == posed.networks[i])).sum() > 1]
        kinds.append(tuple(np.arange(len(keep)) == i for i in several))
        kinds.append(tuple(networks & (posed.chips == chip) for chip in chips))
    return tuple(kind for kind in kinds if kind)


def chosen(posed: Problem, keep: np.ndarray) -> Problem:
    """The same problem with the shrinkage under which what `trials` holds out is most likely.

    The ridge is chosen first, then, where chips are pooled, how freely a chip may leave the trend.
    """
    ridges = [posed.shrunk(ridge=ridge) for ridge in RIDGES]
    best = max(ridges, key=lambda p: _likelihood(p, keep))
    if len(set(posed.chips)) > 1:
        best = max((best.shrunk(chip_sd=factor) for factor in CHIP_FACTORS), key=lambda p: _likelihood(p, keep))
    return best


def _likelihood(posed: Problem, keep: np.ndarray) -> float:
    """Mean log density of what is held out, up to a constant; its common variance is fitted."""
    squares, spreads = _tried(posed, keep)
    return float(-0.5 * np.log(squares) - spreads)


def _tried(posed: Problem, keep: np.ndarray) -> tuple[float, float]:
    """Mean squared normalised residual and mean log spread of what `trials` holds out; every kind counts the same."""
    squares, spreads = [], []
    for kind in trials(posed, keep):
        found = [_misses(posed, test, keep & ~test) for test in kind]
        squares.append(np.mean([np.mean(misses**2) for misses, _ in found]))
        spreads.append(np.mean([np.mean(np.log(spread)) for _, spread in found]))
    return float(np.mean(squares)), float(np.mean(spreads))


def _misses(posed: Problem, test: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalised log residuals and spreads of the rows `test` under a fit of the rows `train`."""
    found = solve(posed.rows.take(train), posed.shrinkage)
    residuals, spreads = [], []
    for i in np.flatnonzero(test):
        place, x = found.at(posed.rows.effects[i]), posed.rows.features[i : i + 1]
        spreads.append(float(place.spread(x)[0]))
        residuals.append(float(np.log(posed.rows.ms[i] / place.ms(x)[0])) / spreads[-1])
    return np.array(residuals), np.array(spreads)


def _groups(posed: Problem, keep: np.ndarray) -> tuple[str, ...]:
    return tuple(sorted(set(posed.networks[keep]) - {""}))


def calibrated(posed: Problem, keep: np.ndarray, effects: np.ndarray) -> LatencyPredictor:
    """Fits the rows `keep` (mask [n]) of a `chosen` problem and measures its residuals on what it did not see.

    Returns:
        The predictor at the place `effects` [E], without a card.
    """
    without, residuals = [], []
    for group in _groups(posed, keep):
        test = keep & (posed.networks == group)
        without.append(solve(posed.rows.take(keep & ~test), posed.shrinkage).at(effects).costs)
        misses, _ = _misses(posed, test, keep & ~test)
        residuals.append(float(np.sign(misses.mean()) * np.sqrt(np.mean(misses**2))))
    place = solve(posed.rows.take(keep), posed.shrinkage).at(effects)
    features = posed.rows.features[keep]
    times = place.ms(features[posed.networks[keep] != ""])
    return LatencyPredictor(
        target=posed.target,
        place=place,
        without=np.array(without),
        residuals=np.array(residuals),
        sd=float(np.sqrt(_tried(posed, keep)[0])),
        range_ms=(float(times.min()), float(times.max())),
        seen=tuple(kind for kind in KINDS if kind in kinds_of(features)),
    )


def held_out(posed: Problem) -> Iterator[HeldOut]:
    """Every network row, predicted by a complete fit (shrinkage and interval included) without its network's fold."""
    for fold in folds(posed.groups):
        yield from _predicted(posed, np.isin(posed.networks, fold))


def held_out_chips(posed: Problem) -> Iterator[HeldOut]:
    """Every network row, predicted by a complete fit that saw no row of its chip; none where chips are not pooled."""
    chips = sorted(set(posed.chips))
    for chip in chips if len(chips) > 1 else ():
        yield from _predicted(posed, posed.chips == chip)


def _predicted(posed: Problem, out: np.ndarray) -> Iterator[HeldOut]:
    """The rows `out` (mask [n]) under a complete fit of the others."""
    seen = chosen(posed, ~out)
    by_place: dict[tuple[float, ...], LatencyPredictor] = {}
    for i in np.flatnonzero(out):
        effects = posed.rows.effects[i]
        if tuple(effects) not in by_place:
            by_place[tuple(effects)] = calibrated(seen, ~out, effects)
        yield _held_out_row(posed, int(i), by_place[tuple(effects)])


def _held_out_row(posed: Problem, i: int, predictor: LatencyPredictor) -> HeldOut:
    x = posed.rows.features[i : i + 1]
    intervals, uppers, predicted = {}, {}, 0.0
    for level in LEVELS:
        ms, low, high = predictor.predict(x, level, unseen="prior")
        predicted = float(ms[0])
        intervals[level] = (float(low[0]), float(high[0]))
        uppers[level] = float(predictor.upper(x, level, unseen="prior")[0])
    return HeldOut(
        name=str(posed.names[i]),
        network=str(posed.networks[i]),
        chip=str(posed.chips[i]),
        ms=float(posed.rows.ms[i]),
        predicted=predicted,
        intervals=intervals,
        uppers=uppers,
        unseen=tuple(sorted(kinds_of(x) - set(predictor.seen))),
    )


def card(posed: Problem, predictor: LatencyPredictor) -> dict[str, Any]:
    """What is known about a predictor of a `chosen` problem, as plain data; errors are fractions (0.018 = 1.8 %)."""
    rows = list(held_out(posed))
    blocks = posed.networks == ""
    solution = solve(posed.rows, posed.shrinkage)
    n = len(predictor.residuals)
    few = n < EMPIRICAL_FROM
    return {
        "target": posed.target,
        "rows": len(rows),
        "networks": n,
        "blocks": int(blocks.sum()),
        "held_out": summary(rows, "each network in turn" if len(posed.groups) <= _FEW else "five-fold"),
        "never_seen": [kind for kind in KINDS if kind not in predictor.seen],
        "fitted_range_ms": list(predictor.range_ms),
        "ridge": posed.shrinkage.ridge,
        "block_scale": float(np.exp(solution.effects[-1])) if blocks.any() else None,
        "chips": chip_factors(posed),
        "interval": {
            "method": f"Student-t with {n - 1} degrees of freedom" if few else "jackknife+",
            "networks": n,
            "sd": predictor.sd,
        },
    }


def chip_factors(posed: Problem) -> dict[str, float]:
    """How many times longer each chip takes than the target's; empty where chips are not pooled."""
    found = solve(posed.rows, posed.shrinkage)
    factors: dict[str, float] = {}
    if len(set(posed.chips)) > 1:
        for i in np.flatnonzero(posed.networks != ""):
            log = (posed.rows.effects[i] - posed.target_effects) @ found.effects
            factors[str(posed.chips[i])] = float(np.exp(log))
    return dict(sorted(factors.items()))


def summary(rows: Sequence[HeldOut], method: str) -> dict[str, Any]:
    """Errors and measured coverage of held-out rows."""
    # Only a fit needs these, and they take longer to import than a predictor takes to load.
    from scipy.stats import kendalltau, spearmanr

    errors = np.array([row.error for row in rows])
    truth, predicted = np.array([row.ms for row in rows]), np.array([row.predicted for row in rows])
    worst = rows[int(np.argmax(np.abs(errors)))]
    coverage = {}
    for level in LEVELS:
        inside = [row.intervals[level][0] <= row.ms <= row.intervals[level][1] for row in rows]
        below = [row.ms <= row.uppers[level] for row in rows]
        coverage[f"{level:g}"] = {"nominal": level, "measured": float(np.mean(inside)), "rows": len(rows)}
        coverage[f"upper {level:g}"] = {"nominal": level, "measured": float(np.mean(below)), "rows": len(rows)}
    return {
        "method": method,
        "rows": len(rows),
        "mape": float(np.mean(np.abs(errors))),
        "within_5": float(np.mean(np.abs(errors) <= 0.05)),
        "within_10": float(np.mean(np.abs(errors) <= 0.10)),
        "spearman": float(spearmanr(truth, predicted).statistic),
        "kendall": float(kendalltau(truth, predicted).statistic),
        "worst": {"subject": worst.name, "chip": worst.chip, "error": worst.error},
        "coverage": coverage,
    }
