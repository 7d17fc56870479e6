"""The covariance of quality between candidates.

It has three parts: effects that add up over the choices, effects linear in cost and features, and a rational quadratic
term with a length per choice for all that is left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import get_blas_funcs

from nas.sampler.encoding import Inputs


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

    def with_noise(self, noise: float) -> Kernel:
        """The same but for the variance of what no part explains."""
        values = self.values.copy()
        values[3] = np.log(noise)
        return replace(self, values=values)

    def diagonal(self, inputs: Inputs) -> np.ndarray:
        """Prior variance [n]."""
        additive, linear, rest = np.exp(self.values[:3])
        return np.asarray(inputs.sizes @ np.array([additive, linear]) + rest)

    def covariance(self, left: Inputs, right: Inputs, dtype: type = np.float64) -> np.ndarray:
        """[n, m] between two lists of candidates; of the left there may be many, so they are not copied."""
        additive, linear, rest = np.exp(self.values[:3]).astype(dtype)
        scale = (0.25 * np.exp(-2.0 * self.values[4:])[self.groups]).astype(dtype)
        a: np.ndarray = left.coordinates.astype(dtype, copy=False)
        b: np.ndarray = right.coordinates.astype(dtype, copy=False)
        multiply = get_blas_funcs("gemm", dtype=np.dtype(dtype))
        # Everything is transposed, for BLAS counts by columns. First 1 + |a|^2 + |b|^2 - 2 ab.
        found = multiply(-2.0, np.asfortranarray(b * scale), a.T)
        found += np.square(a) @ scale
        found += (1.0 + np.square(b) @ scale)[:, None]
        np.square(found, out=found)
        np.divide(rest, found, out=found)
        for variance, mine, theirs in ((additive, left.additive, right.additive), (linear, left.linear, right.linear)):
            if theirs.shape[1]:
                mine, theirs = (each.astype(dtype, copy=False) for each in (mine, theirs))
                found = multiply(variance, np.asfortranarray(theirs), mine.T, beta=1.0, c=found, overwrite_c=True)
        return np.asarray(found).T
