"""The closed form of expected hypervolume improvement: equal to the integral, never above its bound."""

from __future__ import annotations

import numpy as np
import pytest

from nas import pareto
from nas.sampler.improvement import Staircase, best

REFERENCE = (10.0, -1.0)


def points(seed, count=12):
    # A coarse grid, so that ties in either objective occur.
    generator = np.random.default_rng(seed)
    return generator.integers(0, 11, size=count).astype(float), generator.integers(-2, 6, size=count).astype(float)


def area(cost, quality):
    """The hypervolume by the package's own, which minimises."""
    return pareto.hypervolume(np.column_stack([cost, -quality]), (REFERENCE[0], -REFERENCE[1]))


def integrated(cost, quality, at, mean, sd):
    """Expected growth of the hypervolume by 4,001 quantiles' worth of a normal density."""
    z = np.linspace(-8, 8, 4001)
    density = np.exp(-0.5 * z**2)
    before = area(cost, quality)
    grown = [area(np.append(cost, at), np.append(quality, mean + sd * each)) - before for each in z[::40]]
    return float(np.average(np.interp(z, z[::40], grown), weights=density))


@pytest.mark.parametrize("seed", range(5))
def test_the_closed_form_is_the_integral(seed):
    cost, quality = points(seed)
    stairs = Staircase.of(cost, quality, REFERENCE)
    generator = np.random.default_rng(seed + 100)
    at, mean, sd = generator.uniform(-2, 12, 6), generator.normal(2, 3, 6), generator.uniform(0.3, 3, 6)
    found = stairs.expected(at, mean, sd)
    wanted = [integrated(cost, quality, *each) for each in zip(at, mean, sd, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("seed", range(10))
def test_a_certain_candidate_gains_just_what_it_adds(seed):
    cost, quality = points(seed)
    at, sure = points(seed + 50)
    found = Staircase.of(cost, quality, REFERENCE).expected(at, sure, np.zeros(len(at)))
    before = area(cost, quality)
    grown = [area(np.append(cost, a), np.append(quality, q)) - before for a, q in zip(at, sure, strict=True)]
    np.testing.assert_allclose(found, grown, atol=1e-12)


def test_the_members_are_the_front():
    cost, quality = np.array([3.0, 1.0, 1.0, 2.0, 12.0]), np.array([4.0, 1.0, 2.0, 2.0, 9.0])
    stairs = Staircase.of(cost, quality, REFERENCE)
    assert stairs.members.tolist() == [2, 0]  # 3 is no better than 2, and 4 lies beyond the reference


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 8])
def test_the_short_cut_finds_what_the_whole_sum_finds(seed, count):
    generator = np.random.default_rng(seed)
    cost, mean, sd = generator.uniform(0, 11, 9000), generator.normal(0, 2, 9000), generator.uniform(0, 1, 9000)
    hope = generator.uniform(0, 1, 9000)
    stairs = Staircase.of(*points(seed), REFERENCE)
    whole = stairs.expected(cost, mean, sd) * hope
    assert (stairs.bound(cost, mean, sd) >= stairs.expected(cost, mean, sd) - 1e-12).all()
    places, gains = best([stairs], cost, [(mean, sd)], hope, count)
    assert places.tolist() == np.argsort(-whole, kind="stable")[:count].tolist()
    np.testing.assert_array_equal(gains, whole[places])


@pytest.mark.parametrize("seed", range(5))
def test_of_several_beliefs_the_mean_counts(seed):
    generator = np.random.default_rng(seed)
    cost, hope = generator.uniform(0, 11, 5000), generator.uniform(0, 1, 5000)
    beliefs = [(generator.normal(0, 2, 5000), generator.uniform(0, 1, 5000)) for _ in range(3)]
    stairs = [Staircase.of(*points(seed + 10 * i), REFERENCE) for i in range(3)]
    each = [steps.expected(cost, *belief) for steps, belief in zip(stairs, beliefs, strict=True)]
    places, gains = best(stairs, cost, beliefs, hope, 4)
    assert places.tolist() == np.argsort(-np.mean(each, axis=0) * hope, kind="stable")[:4].tolist()
    np.testing.assert_allclose(gains, (np.mean(each, axis=0) * hope)[places])


def test_without_a_front_all_above_the_reference_counts():
    nothing = np.empty(0)
    stairs = Staircase.of(nothing, nothing, REFERENCE)
    assert stairs.expected(np.array([4.0]), np.array([1.0]), np.zeros(1)).tolist() == [12.0]
    places, gains = best([stairs], nothing, [(nothing, nothing)], nothing, 3)
    assert len(places) == len(gains) == 0
