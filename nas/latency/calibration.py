"""How wrong a fit is on networks it has not seen: ridge, jackknife residuals and held-out rows all come from that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nas.latency.predictor import LatencyPredictor, kinds_of
from nas.latency.problem import CHIP_FACTORS, RIDGES, Problem
from nas.latency.regression import Place, Solution
from nas.op import FEATURES, KINDS

LEVELS = (0.8, 0.9)
FEW = 10  # networks up to which each is held out in turn; five folds beyond
_ALONE = 60  # networks up to which each is left out alone to calibrate the interval; beyond, twenty parts (CV+)
_PARTS = 20


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A row predicted by a complete fit that did not see its network: ridge, residuals and all.

    Attributes:
        subject: its key.
        intervals: level -> central interval (low, high) in ms.
        uppers: level -> one-sided bound in ms.
        unseen: operator kinds of the row that the fit had never seen and priced by the prior.
    """

    name: str
    subject: str
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


def folds(groups: Sequence[str], *, alone: int = FEW, parts: int = 5) -> tuple[tuple[str, ...], ...]:
    """The networks held out together: each alone where there are few, else in parts (shuffled with seed 0)."""
    if len(groups) <= alone:
        return tuple((group,) for group in groups)
    order = np.random.default_rng(0).permutation(len(groups))
    return tuple(tuple(groups[i] for i in part) for part in np.array_split(order, parts))


def trials(posed: Problem, keep: np.ndarray) -> tuple[tuple[np.ndarray, ...], ...]:
    """What is held out to learn how uncertain a fit of the rows `keep` is, by kind, as masks [n].

    Networks by their folds. Where several chips are pooled also single rows (a network known from other chips) and,
    where public figures price a chip without rows, whole chips, because each tries another part of the model:
    operators, a chip's fit to one network, the chip trend.
    """
    networks = keep & (posed.networks != "")
    kinds = [[networks & np.isin(posed.networks, fold) for fold in folds(posed.groups_in(keep))]]
    chips = sorted(set(posed.chips[networks]))
    if len(chips) > 1:
        several = [i for i in np.flatnonzero(networks) if (networks & (posed.networks == posed.networks[i])).sum() > 1]
        kinds.append([np.arange(len(keep)) == i for i in several])
    if len(chips) > 1 and posed.trend:
        kinds.append([networks & (posed.chips == chip) for chip in chips])
    asked = [[posed.testable(test, keep & ~test) for test in kind if (networks & ~test).any()] for kind in kinds]
    found = [tuple(test for test in kind if test.any()) for kind in asked]
    return tuple(kind for kind in found if kind)


def chosen(posed: Problem, keep: np.ndarray) -> Problem:
    """The same problem with the shrinkage under which what `trials` holds out is most likely.

    The ridge is chosen first, and with fewer subjects than features whether those of a kind are tied (of networks too
    few to tell, other targets tell the ridge, and features are tied), then, where chips are pooled, how freely a chip
    may leave the trend.
    """
    few = posed.borrowed.get(len(posed.groups_in(keep)))
    if few is not None:
        best = posed.shrunk(ridge=few.ridge, tied=True)
    else:
        ties = (False, True) if len(set(posed.subjects[keep])) < len(FEATURES) else (False,)
        best = _likeliest([posed.shrunk(ridge=ridge, tied=tied) for tied in ties for ridge in RIDGES], keep)
    # Without a trend there is nothing to leave: a chip's speed is its rows'.
    if len(set(posed.chips[keep])) > 1 and posed.trend:
        best = _likeliest([best.shrunk(chip_sd=factor) for factor in CHIP_FACTORS], keep)
    return best


def _likeliest(options: Sequence[Problem], keep: np.ndarray) -> Problem:
    """The problem with the greatest mean log density of what is held out; its common variance is fitted."""
    best, most, near = options[0], -np.inf, None
    for posed in options:
        near = posed.solve(keep, near)
        squares, spreads = _tried(posed, keep, near)
        likelihood = float(-0.5 * np.log(squares) - spreads)
        if likelihood > most:
            best, most = posed, likelihood
    return best


def _tried(posed: Problem, keep: np.ndarray, near: Solution) -> tuple[float, float]:
    """Mean squared normalised residual and mean log spread of what `trials` holds out; every kind counts the same."""
    squares, spreads = [], []
    for kind in trials(posed, keep):
        found = [missed(posed, test, posed.solve(keep & ~test, near)) for test in kind]
        squares.append(np.mean([np.mean(misses**2) for misses, _ in found]))
        spreads.append(np.mean([np.mean(np.log(spread)) for _, spread in found]))
    return (float(np.mean(squares)), float(np.mean(spreads))) if squares else (1.0, 0.0)


def missed(posed: Problem, test: np.ndarray, found: Solution) -> tuple[np.ndarray, np.ndarray]:
    """Normalised log residuals and spreads of the rows `test` (mask [n]) under a fit."""
    residuals, spreads = [], []
    places: dict[bytes, Place] = {}
    for i in np.flatnonzero(test):
        effects = posed.rows.effects[i]
        place = places.setdefault(effects.tobytes(), found.at(effects))
        x = posed.rows.features[i : i + 1]
        spreads.append(float(place.spread(x)[0]))
        residuals.append(float(np.log(posed.rows.ms[i] / place.ms(x)[0])) / spreads[-1])
    return np.array(residuals), np.array(spreads)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A fit with what it missed when networks were left out of it; a predictor for any place follows from it.

    Attributes:
        keep: [n] the rows that are fitted.
        whole: the fit of all of them.
        without: fits that left networks out.
        fold: [N] which of those left out each network; residuals: [N] its residual there, the root mean square over
            its rows with the sign of their mean.
        sd, degrees: as of `LatencyPredictor`.
    """

    posed: Problem
    keep: np.ndarray
    whole: Solution
    without: tuple[Solution, ...]
    fold: np.ndarray
    residuals: np.ndarray
    sd: float
    degrees: int

    def at(self, effects: np.ndarray) -> LatencyPredictor:
        """The predictor at the place `effects` [E], without a card."""
        place = self.whole.at(effects)
        features = self.posed.rows.features[self.keep]
        times = place.ms(features[self.posed.networks[self.keep] != ""])
        costs = np.array([found.at(effects).costs for found in self.without])
        return LatencyPredictor(
            target=self.posed.target,
            place=place,
            without=costs.reshape(-1, features.shape[1]),
            fold=self.fold,
            residuals=self.residuals,
            sd=self.sd,
            degrees=self.degrees,
            range_ms=(float(times.min()), float(times.max())),
            seen=tuple(kind for kind in KINDS if kind in kinds_of(features)),
        )


def calibrated(posed: Problem, keep: np.ndarray) -> Calibration:
    """Fits the rows `keep` (mask [n]) of a `chosen` problem and measures its residuals on what it did not see."""
    whole = posed.solve(keep)
    without, fold, residuals = _left_out(posed, keep, whole)
    few = posed.borrowed.get(len(posed.groups_in(keep)))
    square, degrees = _tried(posed, keep, whole)[0], len(residuals) - 1
    if few is not None:
        # The other targets' spread is a prior worth their number less one, the networks' own that of theirs.
        own = max(degrees, 0)
        degrees = few.degrees + own
        square = (few.degrees * few.sd**2 + own * square) / degrees
    return Calibration(
        posed=posed,
        keep=keep,
        whole=whole,
        without=without,
        fold=fold,
        residuals=residuals,
        sd=float(np.sqrt(square)),
        degrees=degrees,
    )


def _left_out(posed: Problem, keep: np.ndarray, near: Solution) -> tuple[tuple[Solution, ...], np.ndarray, np.ndarray]:
    """Fits that left networks out, which of those left out each network [N], and its residual there [N]."""
    groups = posed.groups_in(keep)
    without: list[Solution] = []
    fold, residuals = [], []
    for part in folds(groups, alone=_ALONE, parts=_PARTS) if len(groups) > 1 else ():
        out = keep & np.isin(posed.networks, part)
        found = posed.solve(keep & ~out, near)
        for group in part:
            test = posed.testable(out & (posed.networks == group), keep & ~out)
            if test.any():
                misses, _ = missed(posed, test, found)
                residuals.append(float(np.sign(misses.mean()) * np.sqrt(np.mean(misses**2))))
                fold.append(len(without))
        without.append(found)
    return tuple(without), np.array(fold, int), np.array(residuals)


def held_out(posed: Problem) -> Iterator[HeldOut]:
    """Every network row, predicted by a complete fit (shrinkage and interval included) without its network's fold."""
    for fold in folds(posed.groups):
        yield from _predicted(posed, np.isin(posed.networks, fold))


def held_out_chips(posed: Problem) -> Iterator[HeldOut]:
    """Every network row, predicted by a complete fit that saw no row of its chip; none where no trend prices chips."""
    chips = sorted(set(posed.chips))
    for chip in chips if len(chips) > 1 and posed.trend else ():
        yield from _predicted(posed, posed.chips == chip)


def _predicted(posed: Problem, out: np.ndarray) -> Iterator[HeldOut]:
    """The rows `out` (mask [n]) under a complete fit of the others."""
    if not posed.groups_in(~out):
        return
    seen = calibrated(chosen(posed, ~out), ~out)
    by_place: dict[bytes, LatencyPredictor] = {}
    for i in np.flatnonzero(posed.testable(out, ~out)):
        effects = posed.rows.effects[i]
        if effects.tobytes() not in by_place:
            by_place[effects.tobytes()] = seen.at(effects)
        yield _held_out_row(posed, int(i), by_place[effects.tobytes()])


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
        subject=str(posed.subjects[i]),
        network=str(posed.networks[i]),
        chip=str(posed.chips[i]),
        ms=float(posed.rows.ms[i]),
        predicted=predicted,
        intervals=intervals,
        uppers=uppers,
        unseen=tuple(sorted(kinds_of(x) - set(predictor.seen))),
    )
