"""What evaluations say of the kernel's hyperparameters: the most probable ones, and others that are as likely."""

from __future__ import annotations

import numpy as np
from scipy.linalg import cholesky, lapack, solve_triangular
from scipy.optimize import minimize

from nas.sampler.encoding import Inputs
from nas.sampler.kernel import Kernel

_LEAST_NOISE = 1e-6  # of the variance of the data
_JITTER = 1e-9
_FIRST_STEPS, _STEPS = 10, 25
_FORGOTTEN, _APART = 10, 4  # steps of the chain before the first draw, and from one draw to the next
_SHRINKS = 40


class Posterior:
    """The density of the hyperparameters given what was found.

    Args:
        inputs: of n evaluations.
        groups: `Encoding.groups`.
        values: what was found [n], of mean 0 and variance 1.
        known: variance of the noise in the same unit; None where it is not known.
    """

    def __init__(self, inputs: Inputs, groups: np.ndarray, values: np.ndarray, known: float | None) -> None:
        count = int(groups.max()) + 1
        self.values = values
        self._groups = groups
        n = len(values)
        self._upper = np.triu_indices(n, 1)
        coordinates = inputs.coordinates.astype(float)
        left, right = coordinates[self._upper[0]], coordinates[self._upper[1]]
        self._squares = np.zeros((count, len(self._upper[0])))
        for group in range(count):
            columns = groups == group
            self._squares[group] = np.square(left[:, columns] - right[:, columns]).sum(1)
        self._additive = inputs.additive.astype(float) @ inputs.additive.T
        self._linear = inputs.linear.astype(float) @ inputs.linear.T
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

    def most_probable(self) -> Kernel:
        """The hyperparameters of the greatest density that is found from a few starts, of which the best goes on."""
        begun = [self._descended(start, _FIRST_STEPS) for start in self.starts]
        _, at = min(begun, key=lambda each: each[0])
        return Kernel(values=self._descended(at, _STEPS)[1], groups=self._groups)

    def drawn(self, first: Kernel, count: int) -> list[Kernel]:
        """Draws from the density by elliptical slice sampling (Murray et al. 2010, arXiv 1001.0175).

        The prior is Gaussian, so a step needs no tuning: it always ends at another place of the density.

        Args:
            first: where the chain begins.
            count: of the draws.
        """
        if not count:
            return []
        generator = np.random.default_rng(0)
        low, high = np.array(self.bounds).T
        at = np.clip(first.values, low, high)
        level = self._likelihood(at)
        found = []
        for step in range(_FORGOTTEN + _APART * count):
            across = generator.normal(size=len(at)) * self.spread
            least = level + np.log(generator.random())
            angle = 2.0 * np.pi * generator.random()
            begin, end = angle - 2.0 * np.pi, angle
            for _ in range(_SHRINKS):  # towards where it stands, which always will do
                new = self.middle + (at - self.middle) * np.cos(angle) + across * np.sin(angle)
                reached = self._likelihood(new) if ((low <= new) & (new <= high)).all() else -np.inf
                if reached > least:
                    at, level = new, reached
                    break
                begin, end = (angle, end) if angle < 0 else (begin, angle)
                angle = begin + (end - begin) * generator.random()
            if step >= _FORGOTTEN and (step - _FORGOTTEN) % _APART == _APART - 1:
                found.append(Kernel(values=at, groups=self._groups))
        return found

    def _likelihood(self, at: np.ndarray) -> float:
        """The log likelihood of hyperparameters; minus infinity where their covariance has no factor."""
        try:
            factor = cholesky(self._covariance(at)[0], lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            return -np.inf
        half = solve_triangular(factor, self.values, lower=True, check_finite=False)
        return float(-0.5 * half @ half - np.log(np.diag(factor)).sum())

    def _covariance(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the evaluations [n, n]; its last part before its variance; and what that is made of, above the diagonal.

        Only the lower triangle of the latter two is filled.
        """
        additive, linear, rest, noise = np.exp(at[:4])
        closeness = 1.0 / (1.0 + 0.25 * (np.exp(-2.0 * at[4:]) @ self._squares))
        full = np.eye(len(self.values))
        full.T[self._upper] = np.square(closeness)
        covariance = additive * self._additive + linear * self._linear + rest * full
        covariance.flat[:: len(full) + 1] += noise + _JITTER
        return covariance, full, closeness

    def __call__(self, at: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the log density of hyperparameters, with its gradient."""
        additive, linear, rest, noise = np.exp(at[:4])
        covariance, full, closeness = self._covariance(at)
        factor = cholesky(covariance, lower=True, check_finite=False)
        full += np.tril(full, -1).T
        inverse = lapack.dpotri(factor, lower=True)[0]
        inverse += np.tril(inverse, -1).T
        weights = inverse @ self.values
        off = (at - self.middle) / self.spread
        density = 0.5 * self.values @ weights + np.log(np.diag(factor)).sum() + 0.5 * off @ off
        pull = 0.5 * (inverse - np.outer(weights, weights))  # derivative by the covariance
        lengths = 2.0 * rest * np.exp(-2.0 * at[4:]) * (self._squares @ (pull[self._upper] * closeness**3))
        gradient = np.array(
            [
                additive * (pull * self._additive).sum(),
                linear * (pull * self._linear).sum(),
                rest * (pull * full).sum(),
                noise * np.trace(pull),
                *lengths,
            ]
        )
        return float(density), gradient + off / self.spread

    def _descended(self, start: np.ndarray, steps: int) -> tuple[float, np.ndarray]:
        found = minimize(self, start, jac=True, method="L-BFGS-B", bounds=self.bounds, options={"maxiter": steps})
        return float(found.fun), np.asarray(found.x)
