"""How well a score ranks candidates: agreement with long training, overall and between candidates of equal latency.

Kendall's tau-b counts pairs of candidates, so it can be asked of the pairs that matter: a search with a budget decides
between networks of similar latency, where size explains least, and pairs of different spaces are never compared at all.
Every interval is a percentile bootstrap over candidates (drawn within each group), not over pairs, which share
candidates; a resample's tau-b is computed exactly from how often each candidate was drawn.

Legend: n candidates, R resamples. Higher is better for scores and truths; a score that is missing (nan) is the lowest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.9
BAND = 0.15  # latencies that differ by less are one band: about the mean error of the predictors themselves
TOP = 5
_RESAMPLES = 2000
_DRAWS = 300  # of seed noise, for the ceiling
_HALVES = 500
_MUTE = 0.1  # share of resamples that may separate no pair
_TIE_SDS = 2.0  # a gap of fewer seed standard deviations is a tie


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with the bounds of its interval; nan where the data cannot say."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What candidates came to when trained long.

    Attributes:
        runs: of each candidate, one value per seed; equal settings throughout.
        latency_ms: predicted, of each [n].
        groups: candidates are compared only within their group, such as a space [n]; None for one group.
        seed: of the bootstrap.
    """

    runs: tuple[tuple[float, ...], ...]
    latency_ms: np.ndarray
    groups: np.ndarray | None = None
    seed: int = 0

    def __len__(self) -> int:
        return len(self.runs)

    @cached_property
    def values(self) -> np.ndarray:
        """The mean over seeds [n]."""
        return np.array([float(np.mean(each)) for each in self.runs])

    @cached_property
    def seed_sd(self) -> float:
        """Standard deviation of one run's value between seeds; nan where no candidate was trained twice."""
        twice = [each for each in self.runs if len(each) > 1]
        return math.sqrt(float(np.mean([np.var(each, ddof=1) for each in twice]))) if twice else math.nan

    @cached_property
    def same_group(self) -> np.ndarray:
        """Pairs that are compared at all [n, n]; nobody is compared with itself."""
        groups = self._groups
        return (groups[:, None] == groups[None]) & ~np.eye(len(self), dtype=bool)

    @cached_property
    def same_band(self) -> np.ndarray:
        """Pairs of one group whose latencies differ by less than `BAND` [n, n].

        Pairs rather than bins, so that no edge separates neighbours and every candidate meets all that are as fast.
        """
        gap = np.abs(np.log(self.latency_ms)[:, None] - np.log(self.latency_ms)[None])
        return self.same_group & (gap < math.log1p(BAND))

    @cached_property
    def distinct(self) -> np.ndarray:
        """Pairs whose truths differ, by two standard deviations of a seed or more where that is known [n, n]."""
        gap: np.ndarray = np.abs(self.values[:, None] - self.values[None])
        least = 0.0 if math.isnan(self.seed_sd) else _TIE_SDS * self.seed_sd
        return (gap > 0) & (gap >= least)

    @cached_property
    def draws(self) -> np.ndarray:
        """How often each candidate is drawn in each resample [R, n]."""
        generator = np.random.default_rng(self.seed)
        counts = np.zeros((_RESAMPLES, len(self)))
        for group in np.unique(self._groups):
            members = np.flatnonzero(self._groups == group)
            counts[:, members] = generator.multinomial(
                len(members), np.full(len(members), 1 / len(members)), _RESAMPLES
            )
        return counts

    @cached_property
    def known_taus(self) -> dict[tuple[bytes, bool], tuple[np.ndarray, np.ndarray]]:
        """What was computed so far, by score and whether within bands."""
        return {}

    @property
    def _groups(self) -> np.ndarray:
        return np.zeros(len(self), dtype=int) if self.groups is None else np.asarray(self.groups)

    def members(self) -> list[np.ndarray]:
        """The indices of each group."""
        return [np.flatnonzero(self._groups == group) for group in np.unique(self._groups)]


def kendall(score: ArrayLike, truth: ArrayLike, pairs: np.ndarray, draws: np.ndarray | None = None) -> np.ndarray:
    """Kendall's tau-b over some of the pairs (Kendall 1945, "The treatment of ties in ranking problems").

    Concordant minus discordant pairs, over the geometric mean of the pairs that either ranking separates.

    Args:
        score: [n]; nan is the lowest.
        truth: [n].
        pairs: which pairs count, symmetric [n, n].
        draws: how often each candidate is drawn [R, n]; None for once each.

    Returns:
        [R], or [1] without draws; nan where one of the rankings separates no pair. A candidate that is drawn twice is a
        tie with itself in both rankings, which tau-b does not count: this is tau-b of the resampled arrays.
    """
    left, right = _signs(score) * pairs, _signs(truth) * pairs
    drawn = np.ones((1, len(left))) if draws is None else draws

    def total(matrix: np.ndarray) -> np.ndarray:
        found: np.ndarray = ((drawn @ matrix) * drawn).sum(1)
        return found

    agreed = total(left * right)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = agreed / np.sqrt(total(np.abs(left)) * total(np.abs(right)))
    return found


def tau(score: ArrayLike, truth: Truth, *, band: bool = False) -> Interval:
    """Kendall's tau-b with the truth.

    Args:
        score: [n].
        truth: of the same candidates.
        band: of pairs of similar latency only.
    """
    return _interval(*_resampled(score, truth, band))


def tau_without_ties(score: ArrayLike, truth: Truth, *, band: bool = False) -> float:
    """The same, of the pairs whose truths are no tie: gaps of two standard deviations of a seed or more."""
    pairs = (truth.same_band if band else truth.same_group) & truth.distinct
    return float(kendall(score, truth.values, pairs)[0])


def difference(score: ArrayLike, other: ArrayLike, truth: Truth, *, band: bool = False) -> Interval:
    """By how much the tau of `score` exceeds that of `other`: a paired bootstrap, both on the same resamples."""
    ours, others = (_resampled(each, truth, band) for each in (score, other))
    return _interval(ours[0] - others[0], ours[1] - others[1])


def spearman(score: ArrayLike, truth: Truth) -> Interval:
    """Spearman's rank correlation; with several groups, of the ranks within each, as shares of its size."""
    return _interval(
        _spearman(score, truth, np.ones((1, len(truth)))),
        _spearman(score, truth, truth.draws),
    )


def regret(score: ArrayLike, truth: Truth, top: int = TOP) -> float:
    """What is lost by training only the score's `top` best: truth of the best minus the best truth among them.

    In the truth's unit, >= 0; the mean over groups. Equal scores at the edge count against the score.
    """
    value = _filled(score)
    lost = []
    for members in truth.members():
        order = np.lexsort((truth.values[members], -value[members]))
        lost.append(truth.values[members].max() - truth.values[members][order[:top]].max())
    return float(np.mean(lost))


def chosen_fairly(scores: Mapping[str, ArrayLike], truth: Truth, *, band: bool = True) -> tuple[float, float]:
    """The tau of the best of several scores, as it looks where it was chosen and as it is elsewhere.

    The best of many scores on the same candidates looks better than it is. Here the candidates are halved at random
    time and again, the best score is chosen on one half and read on the other.

    Args:
        scores: by name [n] each.
        truth: of the same candidates.
        band: tau of pairs of similar latency.

    Returns:
        Mean tau of the chosen score on the half it was chosen on, and on the other.
    """
    pairs, generator = (truth.same_band if band else truth.same_group), np.random.default_rng(truth.seed)
    half = np.argsort(generator.random((_HALVES, len(truth))), axis=1) < len(truth) // 2
    here, there = (
        np.array([kendall(each, truth.values, pairs, part.astype(float)) for each in scores.values()])
        for part in (half, ~half)
    )
    best = np.where(np.isnan(here), -np.inf, here).argmax(0)
    picked = [each[best, np.arange(_HALVES)] for each in (here, there)]
    return float(np.nanmean(picked[0])), float(np.nanmean(picked[1]))


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """How well the truth agrees with itself.

    Attributes:
        twice: candidates trained from two initialisations.
        seed_sd: standard deviation of one run between initialisations.
        between_sd: standard deviation between candidates, within groups.
        tau: between the first and the second runs of those trained twice.
        ceiling: the tau that a score would reach on average if it knew each candidate's noise-free truth.
        ceiling_band: the same among pairs of similar latency.
        ties: share of all pairs whose truths differ by less than two seed standard deviations.
        ties_band: the same among pairs of similar latency.
    """

    twice: int
    seed_sd: float
    between_sd: float
    tau: Interval
    ceiling: float
    ceiling_band: float
    ties: float
    ties_band: float


def reliability(truth: Truth) -> Reliability:
    """What noise between initialisations leaves to be predicted.

    The ceiling takes the observed truths, shrunk towards their group's mean by the share of their variance that is not
    noise, as noise-free, adds normal noise of the seeds' standard deviation again, and ranks the one by the other.
    Where no candidate was trained twice all that is unknown is nan.
    """
    twice = np.array([len(each) > 1 for each in truth.runs])
    nan = Interval(value=math.nan, low=math.nan, high=math.nan)
    between = math.sqrt(
        sum(((truth.values[m] - truth.values[m].mean()) ** 2).sum() for m in truth.members()) / len(truth)
    )
    again = nan
    if twice.sum() > 2:
        # The second runs as truth, the first as score.
        second = Truth(
            runs=tuple((each[1],) for each, is_double in zip(truth.runs, twice, strict=True) if is_double),
            latency_ms=truth.latency_ms[twice],
            groups=None if truth.groups is None else np.asarray(truth.groups)[twice],
            seed=truth.seed,
        )
        again = tau([each[0] for each in truth.runs if len(each) > 1], second)
    ceilings = [_ceiling(truth, band) for band in (False, True)]
    return Reliability(
        twice=int(twice.sum()),
        seed_sd=truth.seed_sd,
        between_sd=between,
        tau=again,
        ceiling=ceilings[0],
        ceiling_band=ceilings[1],
        ties=_tied(truth, truth.same_group),
        ties_band=_tied(truth, truth.same_band),
    )


def _tied(truth: Truth, pairs: np.ndarray) -> float:
    return float((pairs & ~truth.distinct).sum() / pairs.sum()) if pairs.any() else math.nan


def _ceiling(truth: Truth, band: bool) -> float:
    if math.isnan(truth.seed_sd):
        return math.nan
    noise = truth.seed_sd / np.sqrt([len(each) for each in truth.runs])
    clean = truth.values.copy()
    for members in truth.members():
        spread = float(np.var(truth.values[members]))
        real = max(0.0, 1 - float(np.mean(noise[members] ** 2)) / spread) if spread > 0 else 0.0
        mean = truth.values[members].mean()
        clean[members] = mean + math.sqrt(real) * (truth.values[members] - mean)
    pairs = truth.same_band if band else truth.same_group
    noisy = clean + noise * np.random.default_rng(truth.seed).standard_normal((_DRAWS, len(truth)))
    ranked = _signs(clean) * pairs  # noise leaves no ties, so each pair that the clean truth separates counts once
    agreed = np.array([(ranked * np.sign(each[:, None] - each[None])).sum() for each in noisy])
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.mean(agreed) / math.sqrt(np.abs(ranked).sum() * pairs.sum())) if pairs.any() else math.nan


def _resampled(score: ArrayLike, truth: Truth, band: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tau-b of all candidates [1] and of each resample [R]; kept, since costs are compared with every score."""
    key = (np.asarray(score, dtype=float).tobytes(), band)
    if key not in truth.known_taus:
        pairs = truth.same_band if band else truth.same_group
        truth.known_taus[key] = (
            kendall(score, truth.values, pairs),
            kendall(score, truth.values, pairs, truth.draws),
        )
    return truth.known_taus[key]


def _filled(score: ArrayLike) -> np.ndarray:
    value = np.asarray(score, dtype=float)
    return np.where(np.isnan(value), -np.inf, value)


def _signs(values: ArrayLike) -> np.ndarray:
    """Whether each candidate is above (1), below (-1) or level with each other [n, n]."""
    value = _filled(values)
    return (value[:, None] > value[None]).astype(float) - (value[:, None] < value[None])


def _spearman(score: ArrayLike, truth: Truth, draws: np.ndarray) -> np.ndarray:
    together = truth.same_group | np.eye(len(truth), dtype=bool)
    size = draws @ together

    def ranks(values: ArrayLike) -> np.ndarray:
        """Mid-ranks within the group as shares of its drawn size, from -1/2 to 1/2 [R, n]."""
        value = _filled(values)
        below = ((value[None] < value[:, None]) & together).astype(float)
        level = ((value[None] == value[:, None]) & together).astype(float)
        found: np.ndarray = (draws @ below.T + draws @ level.T / 2) / np.maximum(size, 1) - 0.5
        return found

    first, second = ranks(score), ranks(truth.values)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = (draws * first * second).sum(1) / np.sqrt(
            (draws * first**2).sum(1) * (draws * second**2).sum(1)
        )
    return found


def _interval(whole: np.ndarray, drawn: np.ndarray) -> Interval:
    """The estimate of all candidates, with percentiles of the resamples; no interval where many of them say nothing."""
    value, mute = float(whole[0]), np.isnan(drawn)
    drawn = drawn[~mute]
    if math.isnan(value) or mute.mean() > _MUTE:
        return Interval(value=value, low=math.nan, high=math.nan)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value=value, low=float(low), high=float(high))
