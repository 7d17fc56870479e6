"""Non-negative, ridge-shrunk regression of latency on operator features, with the uncertainty of its predictions.

The model of row i is  ms_i = exp(sum_e E_ie e) * sum_g F_ig p_g u_g  with u >= 0: p is a prior cost of one unit of
feature g (a roofline), u what the rows say it should be multiplied by, and exp(E e) the factor of the row's chip and of
blocks timed alone. Minimised is

    sum_i w_i (model_i / ms_i - 1)^2 + sum_k v_k (log(over_k / under_k) - log ratio_k)^2
        + ridge * sum_g (u_g - s)^2 + sum_e r_e (e - e0)^2

where over_k and under_k are the modelled times of the two networks of a published ratio, and the common scale s >= 0
is free: with no rows to say otherwise, features keep the prior's proportions.
(Shared MACs and bytes make features collinear, so that a single cost means little; sums over networks do.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nas.latency.nonnegative import nonnegative
from nas.op import FEATURES

_STEPS = 60
_LARGEST_STEP = 0.5  # of an effect, per iteration: exp() overshoots from far away
_SETTLED = 1e-7


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is fitted to.

    Attributes:
        features: [n, F] of `nas.op.features`.
        ms: [n], positive.
        effects: [n, E] design of the factors in log space; E may be 0.
        weights: [n]; 1 for a network.
    """

    features: np.ndarray
    ms: np.ndarray
    effects: np.ndarray
    weights: np.ndarray

    def take(self, keep: np.ndarray) -> Rows:
        """The rows of a mask or an index array."""
        return Rows(
            features=self.features[keep], ms=self.ms[keep], effects=self.effects[keep], weights=self.weights[keep]
        )


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Published quotients of two networks' latencies on one chip, where neither latency was published.

    What all rows of a chip share divides out, so a ratio says nothing about a scale, only about proportions.

    Attributes:
        over, under: [m, F] features of the two networks.
        log_ratio: [m] log of the quotient.
        weights: [m]; 1 for a quotient that is as certain as a row.
    """

    over: np.ndarray
    under: np.ndarray
    log_ratio: np.ndarray
    weights: np.ndarray

    @property
    def empty(self) -> bool:
        """Whether there are none."""
        return len(self.log_ratio) == 0

    def take(self, keep: np.ndarray) -> Ratios:
        """The ratios of a mask or an index array."""
        return Ratios(
            over=self.over[keep],
            under=self.under[keep],
            log_ratio=self.log_ratio[keep],
            weights=self.weights[keep],
        )


# What stands for what where rows are few: [F, K], 1 where feature f belongs to the coarse feature k.
_COARSE = {"few_macs": "macs", "read": "bytes", "written": "bytes", "far": "bytes"}
_NAMES = [f"{kind}.{_COARSE.get(measure, measure)}" for kind, _, measure in (name.partition(".") for name in FEATURES)]
_TIES = np.array([[name == coarse for coarse in dict.fromkeys(_NAMES)] for name in _NAMES], dtype=float)

_NONE = np.zeros((0, len(FEATURES)))
_NO_RATIOS = Ratios(over=_NONE, under=_NONE, log_ratio=np.zeros(0), weights=np.zeros(0))


@dataclass(frozen=True, kw_only=True)
class Shrinkage:
    """What the fit is pulled towards.

    Attributes:
        prior: [F] ms per unit of each feature, positive.
        ridge: squared ratio of a row's relative error to the relative uncertainty of one feature's cost.
        centre: [E] prior means of the effects.
        effect_ridge: [E] the same ratio for each effect, positive.
    """

    prior: np.ndarray
    ridge: float
    centre: np.ndarray
    effect_ridge: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Place:
    """A fit seen from one place: a chip, and a whole network or a block alone.

    Attributes:
        costs: [F] ms per unit of each feature there.
        unit: [F] what those costs are multiples of: the scaled prior there.
        covariance: [F+1, F+1] of (costs / unit, log factor of the place), in units of a row's squared relative error.
            The constraint costs >= 0 is left out of it, which errs towards wide intervals.
    """

    costs: np.ndarray
    unit: np.ndarray
    covariance: np.ndarray

    def ms(self, features: np.ndarray) -> np.ndarray:
        """Predicted ms [n] of feature vectors [n, F]."""
        return features @ self.costs

    def spread(self, features: np.ndarray) -> np.ndarray:
        """How uncertain the log of a prediction is, in units of one row's relative error.

        Args:
            features: [n, F].

        Returns:
            [n] sqrt(1 + g' C g), where g, the gradient of log ms, is each feature's share at its unit cost, and 1 for
            the place. It is 1 where everything is known and grows where a network leans on features that the rows say
            little about.
        """
        gradient = np.hstack([self.shares(features), np.ones((len(features), 1))])
        return np.sqrt(1.0 + self.doubt(gradient))

    def shares(self, features: np.ndarray) -> np.ndarray:
        """[n, F] the gradient of log ms with respect to costs / unit."""
        return features * self.unit / self.ms(features)[:, None]

    def doubt(self, gradient: np.ndarray) -> np.ndarray:
        """[n] variance, in units of one row's, of what has these gradients [n, F+1] over the fitted quantities."""
        return np.maximum(0.0, ((gradient @ self.covariance) * gradient).sum(axis=1))


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A fit.

    Attributes:
        costs: [F] ms per unit of each feature where every effect is 0.
        unit: [F] the prior at the one scale that fits the rows best; the fit is shrunk relative to it.
        effects: [E].
        covariance: [F+E, F+E] of (costs / unit, effects).
    """

    costs: np.ndarray
    unit: np.ndarray
    effects: np.ndarray
    covariance: np.ndarray

    def at(self, effects: np.ndarray) -> Place:
        """The fit at the place with this row [E] of the effects design."""
        n = len(self.unit)
        places = np.zeros((n + 1, len(self.covariance)))
        places[:n, :n] = np.eye(n)
        places[n, n:] = effects
        factor = np.exp(effects @ self.effects)
        return Place(costs=self.costs * factor, unit=self.unit * factor, covariance=places @ self.covariance @ places.T)


def solve(rows: Rows, shrinkage: Shrinkage, ratios: Ratios | None = None, near: Solution | None = None) -> Solution:
    """Fits by Gauss-Newton on effects and ratios; each step is one exact non-negative least squares problem.

    Without effects and ratios the problem is linear and the first step is the answer.

    Args:
        rows: what is fitted to.
        shrinkage: what the fit is pulled towards.
        ratios: published quotients of two networks, if any.
        near: a fit of nearly the same rows to start from; it decides the time taken, not the answer.
    """
    ratios = _NO_RATIOS if ratios is None else ratios
    unit = shrinkage.prior * _scale(rows, shrinkage.prior, shrinkage.centre)
    effects = (shrinkage.centre if near is None else near.effects).astype(float).copy()
    u = np.ones(len(unit)) if near is None else near.costs / unit
    penalty, pull = _penalty(shrinkage)
    n = len(unit)
    free = np.arange(n + 1 + len(effects)) > n
    for _ in range(_STEPS):
        design, wanted = _linear(rows, ratios, unit, u, effects)
        gram, moment = design.T @ design + penalty, design.T @ wanted + pull
        positive = np.concatenate([u > 0, [True], np.zeros(len(effects), bool)])
        solved = nonnegative(gram, moment, free, positive)
        change = np.clip(solved[n + 1 :] - effects, -_LARGEST_STEP, _LARGEST_STEP)
        # With ratios a step may overshoot; a step kept short moves the proportions as far as they can be trusted.
        moved = (solved[:n] - u) * (1.0 if ratios.empty else _trusted(ratios, unit, u, solved[:n]))
        settled = max(np.abs(change).max(initial=0.0), 0.0 if ratios.empty else _relative(moved, u)) < _SETTLED
        u, effects = np.maximum(u + moved, 0.0), effects + change
        if settled or (ratios.empty and not len(effects)):
            break
    kept = np.r_[0:n, n + 1 : n + 1 + len(effects)]
    covariance = np.linalg.inv(gram)[np.ix_(kept, kept)]
    return Solution(costs=u * unit, unit=unit, effects=effects, covariance=covariance)


def solve_tied(
    rows: Rows, shrinkage: Shrinkage, ratios: Ratios | None = None, near: Solution | None = None
) -> Solution:
    """Fits as `solve`, with one multiple of the prior for all that an operator kind moves, and one for all its MACs.

    Rows of few subjects cannot tell reads from writes; the prior's proportions within a kind stand. Arguments as there.
    """
    ratios = _NO_RATIOS if ratios is None else ratios
    columns = shrinkage.prior[:, None] * _TIES
    first = _TIES.argmax(axis=0)
    if near is not None:
        near = replace(near, costs=(near.costs / shrinkage.prior)[first])
    found = solve(
        replace(rows, features=rows.features @ columns),
        replace(shrinkage, prior=np.ones(columns.shape[1])),
        replace(ratios, over=ratios.over @ columns, under=ratios.under @ columns),
        near,
    )
    spread = np.zeros((len(columns) + len(found.effects), len(found.covariance)))
    spread[: len(columns), : columns.shape[1]] = _TIES
    spread[len(columns) :, columns.shape[1] :] = np.eye(len(found.effects))
    return Solution(
        costs=columns @ found.costs,
        unit=columns @ found.unit,
        effects=found.effects,
        covariance=spread @ found.covariance @ spread.T,
    )


def _linear(
    rows: Rows, ratios: Ratios, unit: np.ndarray, u: np.ndarray, effects: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The weighted rows of one Gauss-Newton step over the columns (u, s, effects), and what they should come to."""
    root = np.sqrt(rows.weights)[:, None]
    by_feature = np.exp(rows.effects @ effects)[:, None] * rows.features * unit / rows.ms[:, None]
    by_effect = (by_feature @ u)[:, None] * rows.effects
    wanted = (1.0 + by_effect @ effects) * root[:, 0]
    design = np.hstack([by_feature, np.zeros((len(wanted), 1)), by_effect]) * root
    if ratios.empty:
        return design, wanted
    over, under = ratios.over * unit, ratios.under * unit
    above, below = over @ u, under @ u
    weight = np.sqrt(ratios.weights)
    slope = np.zeros((len(above), design.shape[1]))
    slope[:, : len(u)] = (over / above[:, None] - under / below[:, None]) * weight[:, None]
    # The slope times u is zero (a common scale changes no ratio), so nothing but the residual stands on the right.
    aim = (ratios.log_ratio - np.log(above / below)) * weight
    return np.vstack([design, slope]), np.concatenate([wanted, aim])


def _trusted(ratios: Ratios, unit: np.ndarray, u: np.ndarray, aim: np.ndarray) -> float:
    """The part of a step after which no network of a ratio has changed by more than a factor of 1.6."""
    both = np.vstack([ratios.over, ratios.under]) * unit
    growth = (both @ aim) / (both @ u) - 1.0
    return float(min(1.0, 0.6 / max(growth.max(), -growth.min() * 1.6, 1e-9)))


def _relative(moved: np.ndarray, u: np.ndarray) -> float:
    return float(np.abs(moved).max() / np.abs(u).max())


def _scale(rows: Rows, prior: np.ndarray, effects: np.ndarray) -> float:
    """The factor on the prior that fits the rows best, so that a ridge means the same for a prior of any scale."""
    relative = np.exp(rows.effects @ effects) * (rows.features @ prior) / rows.ms
    return float((rows.weights * relative).sum() / (rows.weights * relative**2).sum())


def _penalty(shrinkage: Shrinkage) -> tuple[np.ndarray, np.ndarray]:
    """The shrinkage as a quadratic form over the columns (u, s, effects): its matrix and its linear part."""
    n, e = len(shrinkage.prior), len(shrinkage.centre)
    matrix = np.zeros((n + 1 + e, n + 1 + e))
    matrix[:n, :n] = shrinkage.ridge * np.eye(n)
    matrix[:n, n] = matrix[n, :n] = -shrinkage.ridge
    matrix[n, n] = shrinkage.ridge * n
    matrix[n + 1 :, n + 1 :] = np.diag(shrinkage.effect_ridge)
    return matrix, np.concatenate([np.zeros(n + 1), shrinkage.effect_ridge * shrinkage.centre])
