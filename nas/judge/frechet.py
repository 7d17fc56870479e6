"""The Fréchet distance between two sets of images, seen as Gaussians in the space of some network's features.

Heusel et al. 2017 (arXiv 1706.08500, equation 6), after Dowson and Landau 1982:

    d^2 = |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))

Which features is not decided here: with Inception's it is FID, with any other network's it is a distance of its own
that must be named as such and compared with nothing else. Legend: N images, F features.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.errors import NasError

_Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """Mean and covariance of a set of features, in float64.

    Attributes:
        count: N.
        mean: [F].
        covariance: [F, F], unbiased (divided by N - 1), as published FIDs have it.
    """

    count: int
    mean: _Array
    covariance: _Array


def statistics(batches: Iterable[Tensor]) -> Statistics:
    """Mean and covariance of features that arrive in batches [B, F]; nothing but their sums is kept.

    Each batch is joined by its own mean and scatter (Chan et al. 1983), so that a mean far from 0 costs no digits.

    Raises:
        NasError: fewer than two images, or a feature that is not finite.
    """
    count, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
    for batch in batches:
        if batch.dim() != 2 or len(batch) == 0:
            raise NasError(f"features come as [B, F] with B above 0, got {list(batch.shape)}")
        if not bool(torch.isfinite(batch).all()):
            raise NasError("a feature is not finite, so the images have no Fréchet distance")
        own = batch.detach().to("cpu", torch.float64).numpy()
        own_mean = own.mean(axis=0)
        own_scatter = (own - own_mean).T @ (own - own_mean)
        if count == 0:
            count, mean, scatter = len(own), own_mean, own_scatter
            continue
        apart, together = own_mean - mean, count + len(own)
        scatter = scatter + own_scatter + np.outer(apart, apart) * (count * len(own) / together)
        mean = mean + apart * (len(own) / together)
        count = together
    if count < 2:
        raise NasError(f"a covariance needs at least 2 images, got {count}")
    return Statistics(count=count, mean=mean, covariance=scatter / (count - 1))


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """d^2 of two sets, 0 or more; what publications call the distance is this square.

    The trace of (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric:
    no complex numbers arise, and eigenvalues that rounding left below 0 (fewer images than features) count as 0.

    Raises:
        NasError: they are of different features.
    """
    if one.mean.shape != other.mean.shape:
        raise NasError(f"features of different sizes have no distance: {one.mean.size} and {other.mean.size}")
    values, vectors = np.linalg.eigh(one.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    inner = root @ other.covariance @ root
    cross = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(min=0)).sum()
    between = float(np.square(one.mean - other.mean).sum())
    within = float(np.trace(one.covariance) + np.trace(other.covariance) - 2 * cross)
    return between + max(0.0, within)
