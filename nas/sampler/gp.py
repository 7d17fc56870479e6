"""The surrogate of quality: a Gaussian process over choices, cost and features.

Its covariance has three parts, and the data decide how much of each: effects that add up over the choices, effects
linear in cost and features, and a rational quadratic term with a length per choice for all that is left. What it says
of a candidate is a mean and a standard deviation; the latter is scaled by how well earlier evaluations were predicted
from all others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import cho_solve, cholesky, lapack, solve_triangular
from scipy.optimize import minimize

from nas.sampler.encoding import Inputs

_LEAST_NOISE = 1e-6  # of the variance of the data
_FITTED = 120  # evaluations that lengths are fitted to; the prediction uses all
_FIRST_STEPS, _STEPS = 10, 25
_ENTRIES = 1 << 17  # of a covariance at once: what a processor's cache holds
_CALIBRATION = 8.0  # evaluations' worth of belief that the spread is right as it is


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """Hyperparameters, all logarithms of variances relative to the data's, and of lengths.

    Attributes:
        values: [additive, linear, rest, noise, lengths...], one length per group of coordinates.
        groups: int [C]: which length each coordinate has.
    """

    values: np.ndarray
    groups: np.ndarray

    @property
    def noise(self) -> float:
        """Variance of what no part explains."""
        return float(np.exp(self.values[3]))

    def diagonal(self, inputs: Inputs) -> np.ndarray:
        """Prior variance [n]."""
        additive, linear, rest = np.exp(self.values[:3])
        return np.asarray(inputs.sizes @ np.array([additive, linear]) + rest)


@dataclass(frozen=True, kw_only=True, eq=False)
class Surrogate:
    """A fitted Gaussian process.

    Attributes:
        kernel: fitted hyperparameters.
        inputs: of the n evaluations.
        values: [n], less `centre`, in units of `unit`: the mean and the standard deviation of what was found.
        factor: lower Cholesky factor of their covariance [n, n].
        weights: the inverse covariance times the values [n].
        measured: share of the kernel's noise that is the measurement's, as a variance; the rest are true differences
            between candidates that look alike. Where the noise is not known, nothing tells them apart: half each.
        stretch: what the spread is multiplied by so that left-out evaluations were predicted honestly.
    """

    kernel: Kernel
    inputs: Inputs
    values: np.ndarray
    factor: np.ndarray
    weights: np.ndarray
    centre: float
    unit: float
    measured: float
    stretch: float

    @classmethod
    def fit(cls, inputs: Inputs, groups: np.ndarray, values: np.ndarray, noise_sd: float | None = None) -> Surrogate:
        """The most probable hyperparameters given the values [n], and the process that they make.

        Args:
            inputs: of n evaluations, n at least 1.
            groups: `Encoding.groups`.
            values: what was found, higher or lower being better alike.
            noise_sd: of one value; None where it is not known.
        """
        centre, unit = float(values.mean()), float(values.std())
        unit = unit if unit > 1e-12 * max(abs(centre), 1e-300) else max(abs(centre), 1.0) * 1e-6
        scaled = (values - centre) / unit
        known = None if noise_sd is None else (noise_sd / unit) ** 2
        some = np.sort(np.random.default_rng(0).permutation(len(values))[:_FITTED])
        kernel = _fitted(inputs[some], groups, scaled[some], known)
        factor, weights = _solved(kernel, inputs, scaled)
        inverse = np.square(solve_triangular(factor, np.eye(len(inputs)), lower=True)).sum(axis=0)
        missed = np.square(weights) / inverse  # squared errors of left-out predictions, in their own variances
        return cls(
            kernel=kernel,
            inputs=inputs,
            values=scaled,
            factor=factor,
            weights=weights,
            centre=centre,
            unit=unit,
            measured=0.5 * kernel.noise if known is None else min(known, kernel.noise),
            stretch=float(np.sqrt((_CALIBRATION + missed.sum()) / (_CALIBRATION + len(missed)))),
        )

    @property
    def settled(self) -> np.ndarray:
        """What the evaluations are believed to be without the noise of their measurement, [n]."""
        return self.centre + self.unit * (self.values - self.measured * self.weights)

    def predict(self, inputs: Inputs, dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the true values of candidates, [n] each.

        In float32 it takes half the time, and means are off by up to a hundredth of the evaluations' spread where these
        are many, smooth and without noise.
        """
        mean: np.ndarray = np.empty(len(inputs), dtype=dtype)
        explained: np.ndarray = np.empty(len(inputs), dtype=dtype)
        inverse = solve_triangular(self.factor, np.eye(len(self.inputs)), lower=True).T.astype(dtype)
        weights: np.ndarray = self.weights.astype(dtype)
        step = max(_ENTRIES // len(self.inputs), 1)
        for start in range(0, len(inputs), step):
            part = slice(start, start + step)
            cross = _covariance(self.kernel, inputs[part], self.inputs, dtype)
            mean[part] = cross @ weights
            cross = cross @ inverse
            explained[part] = np.einsum("ij,ij->i", cross, cross)
        nugget = self.kernel.noise - self.measured
        variance = np.maximum(self.kernel.diagonal(inputs) - explained, 0.0) + nugget
        return self.centre + self.unit * mean.astype(np.float64), self.unit * self.stretch * np.sqrt(variance)

    def with_believed(self, pending: Inputs) -> Surrogate:
        """The same process as if candidates had been found to be just as it predicts (the "kriging believer")."""
        if not len(pending):
            return self
        believed = (self.predict(pending)[0] - self.centre) / self.unit
        inputs, values = self.inputs.joined(pending), np.concatenate([self.values, believed])
        factor, weights = _solved(self.kernel, inputs, values)
        return replace(self, inputs=inputs, values=values, factor=factor, weights=weights)


def _solved(kernel: Kernel, inputs: Inputs, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Cholesky factor of the evaluations' covariance [n, n], and its inverse times their values [n]."""
    covariance = _covariance(kernel, inputs, inputs) + kernel.noise * np.eye(len(inputs))
    factor = cholesky(covariance, lower=True)
    return factor, cho_solve((factor, True), values)


def _covariance(kernel: Kernel, left: Inputs, right: Inputs, dtype: type = np.float64) -> np.ndarray:
    """[n, m] between two lists of candidates."""
    additive, linear, rest = np.exp(kernel.values[:3]).astype(dtype)
    scale = (0.5 * np.exp(-kernel.values[4:])[kernel.groups]).astype(dtype)
    a, b = left.coordinates * scale, right.coordinates * scale
    # 1 + |a|^2 + |b|^2 - 2 ab as one product, and the rest in place: this is where a proposal spends its time.
    a_size, b_size = 1.0 + np.square(a).sum(1), np.square(b).sum(1)
    found = np.column_stack([a, a_size, np.ones_like(a_size)]) @ np.vstack([-2.0 * b.T, np.ones_like(b_size), b_size])
    np.maximum(found, 1.0, out=found)
    np.square(found, out=found)
    np.divide(rest, found, out=found)
    sums = np.vstack([additive * right.additive.T, linear * right.linear.T])
    found += np.column_stack([left.additive, left.linear]).astype(dtype) @ sums
    return np.asarray(found)


class _Likelihood:
    """Minus the log posterior density of the hyperparameters, with its gradient."""

    def __init__(self, inputs: Inputs, groups: np.ndarray, values: np.ndarray, known: float | None) -> None:
        count = int(groups.max()) + 1
        self.values = values
        n = len(values)
        self.upper = np.triu_indices(n, 1)
        coordinates = inputs.coordinates.astype(float)
        left, right = coordinates[self.upper[0]], coordinates[self.upper[1]]
        self.squares = np.zeros((count, len(self.upper[0])))
        for group in range(count):
            columns = groups == group
            self.squares[group] = np.square(left[:, columns] - right[:, columns]).sum(1)
        self.additive = inputs.additive.astype(float) @ inputs.additive.T
        self.linear = inputs.linear.astype(float) @ inputs.linear.T
        # Lengths grow with the square root of their number, so that all distances together stay of one size (Hvarfner
        # et al. 2024, arXiv 2402.02229). Noise may be nearly nothing or nearly all: its prior is the widest.
        least = _LEAST_NOISE if known is None else max(known, _LEAST_NOISE)
        lengths = 0.5 * np.log(count)
        self.middle = np.array([-1.0, -1.0, -1.0, np.log(max(least, 1e-2)), *[np.sqrt(2.0) - 1.0 + lengths] * count])
        # What looks like noise may be a finer function: both are tried.
        self.starts = [
            np.array([-1.0, -1.0, -1.0, np.log(max(least, noise)), *[lengths] * count]) for noise in (1e-1, 1e-4)
        ]
        self.spread = np.array([1.5, 1.5, 1.5, 3.0, *[np.sqrt(3.0)] * count])
        self.bounds = [(-9.0, 4.0)] * 3 + [(np.log(least), max(np.log(least), 0.0) + 1e-9)] + [(-3.0, 7.0)] * count

    def __call__(self, at: np.ndarray) -> tuple[float, np.ndarray]:
        n = len(self.values)
        additive, linear, rest, noise = np.exp(at[:4])
        relevance = np.exp(-2.0 * at[4:])
        closeness = 1.0 / (1.0 + 0.25 * (relevance @ self.squares))
        full = np.eye(n)
        full[self.upper] = np.square(closeness)
        full.T[self.upper] = full[self.upper]
        covariance = additive * self.additive + linear * self.linear + rest * full
        covariance.flat[:: n + 1] += noise + 1e-9
        factor = cholesky(covariance, lower=True, check_finite=False)
        inverse = lapack.dpotri(factor, lower=True)[0]
        inverse += np.tril(inverse, -1).T
        weights = inverse @ self.values
        off = (at - self.middle) / self.spread
        density = 0.5 * self.values @ weights + np.log(np.diag(factor)).sum() + 0.5 * off @ off
        pull = 0.5 * (inverse - np.outer(weights, weights))  # derivative by the covariance
        lengths = 2.0 * rest * relevance * (self.squares @ (pull[self.upper] * closeness**3))
        gradient = np.array(
            [
                additive * (pull * self.additive).sum(),
                linear * (pull * self.linear).sum(),
                rest * (pull * full).sum(),
                noise * np.trace(pull),
                *lengths,
            ]
        )
        return float(density), gradient + off / self.spread


def _fitted(inputs: Inputs, groups: np.ndarray, values: np.ndarray, known: float | None) -> Kernel:
    """The kernel of the greatest posterior density that is found from a few starts, of which the best goes on."""
    target = _Likelihood(inputs, groups, values, known)
    begun = [_descended(target, start, _FIRST_STEPS) for start in target.starts]
    _, at = min(begun, key=lambda each: each[0])
    return Kernel(values=_descended(target, at, _STEPS)[1], groups=groups)


def _descended(target: _Likelihood, start: np.ndarray, steps: int) -> tuple[float, np.ndarray]:
    found = minimize(target, start, jac=True, method="L-BFGS-B", bounds=target.bounds, options={"maxiter": steps})
    return float(found.fun), np.asarray(found.x)
