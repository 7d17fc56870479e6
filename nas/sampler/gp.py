"""The surrogate of quality: a Gaussian process over choices, cost and features.

The data decide how much of each part of the covariance there is. What the process says of a candidate is a mean and a
standard deviation; the latter is scaled by how well earlier evaluations were predicted from all others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.linalg import cho_solve, cholesky, get_blas_funcs, solve_triangular

from nas.sampler.encoding import Inputs
from nas.sampler.kernel import Kernel
from nas.sampler.posterior import Posterior

_FITTED = 100  # evaluations that lengths are fitted to; the prediction uses all
_ENTRIES = 1 << 17  # of a covariance at once: what a processor's cache holds
_JITTER = 1e-6
_CALIBRATION = 8.0  # evaluations' worth of belief that the spread is right as it is


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
    def fit(
        cls, inputs: Inputs, groups: np.ndarray, values: np.ndarray, noise_sd: float | None = None, drawn: int = 0
    ) -> list[Surrogate]:
        """The process of the most probable hyperparameters, and then those of others drawn as they are likely.

        Args:
            inputs: of n evaluations, n at least 1.
            groups: `Encoding.groups`.
            values: what was found [n], higher or lower being better alike.
            noise_sd: of one value; None where it is not known.
            drawn: how many others.
        """
        centre, unit = float(values.mean()), float(values.std())
        unit = unit if unit > 1e-12 * max(abs(centre), 1e-300) else max(abs(centre), 1.0) * 1e-6
        scaled = (values - centre) / unit
        known = None if noise_sd is None else (noise_sd / unit) ** 2
        some = np.sort(np.random.default_rng(0).permutation(len(values))[:_FITTED])
        posterior = Posterior(inputs[some], groups, scaled[some], known)
        first = posterior.most_probable()
        kernels = [first, *posterior.drawn(first, drawn)]
        return [cls._of(kernel, inputs, scaled, centre, unit, known) for kernel in kernels]

    @classmethod
    def _of(
        cls, kernel: Kernel, inputs: Inputs, values: np.ndarray, centre: float, unit: float, known: float | None
    ) -> Surrogate:
        """With these hyperparameters; `known` is the variance of the noise in units of the values."""
        factor, weights = _solved(kernel, inputs, values)
        inverse = np.square(solve_triangular(factor, np.eye(len(inputs)), lower=True)).sum(axis=0)
        missed = np.square(weights) / inverse  # squared errors of left-out predictions, in their own variances
        return cls(
            kernel=kernel,
            inputs=inputs,
            values=values,
            factor=factor,
            weights=weights,
            centre=centre,
            unit=unit,
            measured=0.5 * kernel.noise if known is None else min(known, kernel.noise),
            stretch=float(np.sqrt((_CALIBRATION + missed.sum()) / (_CALIBRATION + len(missed)))),
        )

    @cached_property
    def inverse(self) -> np.ndarray:
        """Of the factor [n, n], lower triangular."""
        return np.asarray(solve_triangular(self.factor, np.eye(len(self.factor)), lower=True))

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
        inverse: np.ndarray = np.asfortranarray(self.inverse, dtype=dtype)
        multiply = get_blas_funcs("trmm", dtype=inverse.dtype)
        weights: np.ndarray = self.weights.astype(dtype)
        step = max(_ENTRIES // len(self.inputs), 1)
        for start in range(0, len(inputs), step):
            part = slice(start, start + step)
            cross = self.kernel.covariance(inputs[part], self.inputs, dtype)
            mean[part] = cross @ weights
            cross = multiply(1.0, inverse, cross.T, lower=1, overwrite_b=1)  # half the work, for it is triangular
            explained[part] = np.einsum("ij,ij->j", cross, cross)
        nugget = self.kernel.noise - self.measured
        variance = np.maximum(self.kernel.diagonal(inputs) - explained, 0.0) + nugget
        return self.centre + self.unit * mean.astype(np.float64), self.unit * self.stretch * np.sqrt(variance)

    def imagined(self, generator: np.random.Generator) -> Surrogate:
        """A draw of what the evaluations' true values may be, and the process given these; itself without noise."""
        if not self.measured:
            return self
        n = len(self.values)
        covariance = self.measured * ((1.0 + _JITTER) * np.eye(n) - self.measured * self.inverse.T @ self.inverse)
        settled = self.values - self.measured * self.weights
        values = settled + cholesky(covariance, lower=True) @ generator.normal(size=n)
        kernel = self.kernel.with_noise(max(self.kernel.noise - self.measured, _JITTER))
        factor, weights = _solved(kernel, self.inputs, values)
        return replace(self, kernel=kernel, values=values, factor=factor, weights=weights, measured=0.0)

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
    covariance = kernel.covariance(inputs, inputs) + kernel.noise * np.eye(len(inputs))
    factor = cholesky(covariance, lower=True)
    return factor, cho_solve((factor, True), values)
