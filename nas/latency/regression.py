"""Non-negative, ridge-shrunk regression of latency on operator features, with the uncertainty of its predictions.

The model of row i is  ms_i = exp(sum_e E_ie e) * sum_g F_ig p_g u_g  with u >= 0: p is a prior cost of one unit of
feature g (a roofline), u what the rows say it should be multiplied by, and exp(E e) the factor of the row's chip and of
blocks timed alone. Minimised is

    sum_i w_i (model_i / ms_i - 1)^2 + ridge * sum_g (u_g - s)^2 + sum_e r_e (e - e0)^2

where the common scale s >= 0 is free: with no rows to say otherwise, features keep the prior's proportions.
(Shared MACs and bytes make features collinear, so that a single cost means little; sums over networks do.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_STEPS = 60
_LARGEST_STEP = 0.5  # of an effect, per iteration: exp() overshoots from far away
_SETTLED = 1e-10


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
        shares = features * self.unit / self.ms(features)[:, None]
        gradient = np.hstack([shares, np.ones((len(features), 1))])
        return np.sqrt(1.0 + np.maximum(0.0, ((gradient @ self.covariance) * gradient).sum(axis=1)))


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


def solve(rows: Rows, shrinkage: Shrinkage) -> Solution:
    """Fits by Gauss-Newton on the effects; each step is one exact non-negative least squares problem.

    Without effects the problem is linear and the first step is the answer.
    """
    n_features, n_effects = rows.features.shape[1], rows.effects.shape[1]
    root = np.sqrt(rows.weights)[:, None]
    effects = shrinkage.centre.astype(float).copy()
    unit = shrinkage.prior * _scale(rows, shrinkage.prior, effects)
    u = np.ones(n_features)
    ridge_rows, ridge_target = _penalty(shrinkage)
    for _ in range(_STEPS):
        by_feature = np.exp(rows.effects @ effects)[:, None] * rows.features * unit / rows.ms[:, None]
        by_effect = (by_feature @ u)[:, None] * rows.effects
        wanted = 1.0 + by_effect @ effects
        fitted = np.hstack([by_feature, np.zeros((len(wanted), 1)), by_effect]) * root
        information = np.vstack([fitted, ridge_rows])
        solved = _mixed_nnls(information, np.concatenate([wanted * root[:, 0], ridge_target]), n_free=n_effects)
        u = solved[:n_features]
        change = np.clip(solved[n_features + 1 :] - effects, -_LARGEST_STEP, _LARGEST_STEP)
        effects = effects + change
        if not n_effects or np.abs(change).max() < _SETTLED:
            break
    covariance = np.linalg.inv(information.T @ information)
    kept = np.r_[0:n_features, n_features + 1 : n_features + 1 + n_effects]
    return Solution(costs=u * unit, unit=unit, effects=effects, covariance=covariance[np.ix_(kept, kept)])


def _scale(rows: Rows, prior: np.ndarray, effects: np.ndarray) -> float:
    """The factor on the prior that fits the rows best, so that a ridge means the same for a prior of any scale."""
    relative = np.exp(rows.effects @ effects) * (rows.features @ prior) / rows.ms
    return float((rows.weights * relative).sum() / (rows.weights * relative**2).sum())


def _penalty(shrinkage: Shrinkage) -> tuple[np.ndarray, np.ndarray]:
    """The shrinkage as extra rows over the columns (u, s, effects), and their targets."""
    n, e = len(shrinkage.prior), len(shrinkage.centre)
    rows = np.zeros((n + e, n + 1 + e))
    rows[:n, :n] = np.sqrt(shrinkage.ridge) * np.eye(n)
    rows[:n, n] = -np.sqrt(shrinkage.ridge)
    rows[n:, n + 1 :] = np.diag(np.sqrt(shrinkage.effect_ridge))
    return rows, np.concatenate([np.zeros(n), np.sqrt(shrinkage.effect_ridge) * shrinkage.centre])


def _mixed_nnls(design: np.ndarray, target: np.ndarray, *, n_free: int) -> np.ndarray:
    """Least squares with all but the last `n_free` unknowns non-negative: a free one is a difference of two."""
    # Reading a predictor needs no solver, and this import is the slowest part of it.
    from scipy.optimize import nnls

    bounded = design.shape[1] - n_free
    solved, _ = nnls(np.hstack([design, -design[:, bounded:]]), target, maxiter=100 * design.shape[1])
    return np.concatenate([solved[:bounded], solved[bounded : bounded + n_free] - solved[bounded + n_free :]])
