"""The Fréchet distance against closed forms, against scipy, and where numbers are bad."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import linalg

from nas.errors import NasError
from nas.judge.frechet import Statistics, frechet_distance, statistics


def gaussian(mean: NDArray[np.float64], covariance: NDArray[np.float64]) -> Statistics:
    return Statistics(count=100, mean=mean, covariance=covariance)


def random_covariance(size: int, seed: int, rank: int | None = None) -> NDArray[np.float64]:
    root = np.random.default_rng(seed).normal(size=(size, rank or size))
    return root @ root.T / size


def test_one_dimension_in_closed_form() -> None:
    # (m1 - m2)^2 + (s1 - s2)^2
    one, other = gaussian(np.array([1.0]), np.array([[4.0]])), gaussian(np.array([-2.0]), np.array([[0.25]]))
    assert frechet_distance(one, other) == pytest.approx(9 + 1.5**2)


def test_commuting_covariances_in_closed_form() -> None:
    # Covariances with the same axes: the sum of (sqrt l1 - sqrt l2)^2.
    axes = linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    first, second = np.arange(1.0, 7), np.linspace(5, 0.01, 6)
    one = gaussian(np.zeros(6), axes @ np.diag(first) @ axes.T)
    other = gaussian(np.full(6, 0.5), axes @ np.diag(second) @ axes.T)
    wanted = 6 * 0.25 + np.square(np.sqrt(first) - np.sqrt(second)).sum()
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-12)


def test_any_covariances_as_scipys_root_has_it() -> None:
    first, second = random_covariance(12, 1), random_covariance(12, 2)
    mean = np.random.default_rng(3).normal(size=12)
    wanted = mean @ mean + np.trace(first + second - 2 * linalg.sqrtm(first @ second).real)
    one, other = gaussian(mean, first), gaussian(np.zeros(12), second)
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(other, one) == pytest.approx(wanted, rel=1e-9)


def test_singular_covariances_are_no_obstacle() -> None:
    # Fewer images than features: scipy's root of such a product is full of rounding, or not real.
    one = gaussian(np.zeros(40), random_covariance(40, 4, rank=5))
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6 * np.trace(one.covariance))
    point = gaussian(np.ones(40), np.zeros((40, 40)))
    assert frechet_distance(one, point) == pytest.approx(40 + np.trace(one.covariance))


def test_it_is_never_negative_and_grows_with_the_distance() -> None:
    base = random_covariance(20, 5)
    found = [
        frechet_distance(gaussian(np.zeros(20), base), gaussian(np.zeros(20), base * scale))
        for scale in (1, 1 + 1e-9, 1.1, 2)
    ]
    assert all(each >= 0 for each in found)
    assert found[0] < found[2] < found[3]


def test_statistics_of_batches_are_those_of_the_whole() -> None:
    # A mean a million times the spread: sums of squares in one pass would keep no digit of the covariance.
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1000, 7, generator=generator, dtype=torch.float64) * 1e-3 + 1e3
    found = statistics(features.split([1, 300, 2, 697]))
    assert found.count == 1000
    np.testing.assert_allclose(found.mean, features.mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, torch.cov(features.T).numpy(), rtol=1e-6, atol=1e-12)


def test_a_sample_of_a_gaussian_is_as_far_as_the_gaussian() -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor([1.0, 2.0, 0.5])
    samples = torch.randn(200_000, 3, generator=generator) * scale + torch.tensor([0.0, 1.0, 0.0])
    other = gaussian(np.zeros(3), np.eye(3))
    assert frechet_distance(statistics([samples]), other) == pytest.approx(1 + 1 + 0.25, rel=0.02)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(NasError, match="not finite"):
        statistics([torch.tensor([[1.0, float("nan")], [0.0, 0.0]])])
    with pytest.raises(NasError, match="at least 2 images, got 1"):
        statistics([torch.zeros(1, 4)])
    with pytest.raises(NasError, match="at least 2 images, got 0"):
        statistics([])
    with pytest.raises(NasError, match=r"\[B, F\]"):
        statistics([torch.zeros(2, 3, 4)])
    with pytest.raises(NasError, match="different sizes"):
        frechet_distance(gaussian(np.zeros(2), np.eye(2)), gaussian(np.zeros(3), np.eye(3)))
