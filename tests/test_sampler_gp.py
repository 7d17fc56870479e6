"""The surrogate: exact where the data are, honest where they are not, and never in want of special cases."""

from __future__ import annotations

import numpy as np
import pytest

from nas.sampler.encoding import Choice, Encoding
from nas.sampler.gp import Surrogate

CHOICES = (
    Choice(size=5, ordered=True),
    Choice(size=3, ordered=False),
    Choice(size=4, ordered=True),
    Choice(size=1, ordered=True),
)


def drawn(count, seed=0):
    """Rows, with a cost and two features that follow from them."""
    generator = np.random.default_rng(seed)
    rows = np.column_stack([generator.integers(0, choice.size, count) for choice in CHOICES])
    cost = rows[:, 0] + 0.5 * rows[:, 2]
    return rows, cost, np.column_stack([np.log1p(rows[:, 0]), cost**2])


def quality(rows):
    return 2.0 * rows[:, 0] - np.array([0.0, 3.0, 1.0])[rows[:, 1]] + np.sin(rows[:, 0] * rows[:, 2])


@pytest.fixture(scope="module")
def pool():
    rows, cost, features = drawn(400)
    encoding = Encoding.of(CHOICES, cost, features)
    return rows, encoding, encoding.inputs(rows, cost, features)


def fitted(pool, count, values=None, noise_sd=None):
    rows, encoding, inputs = pool
    keep = np.arange(count)
    values = quality(rows[keep]) if values is None else values
    return Surrogate.fit(inputs[keep], encoding.groups, values, noise_sd)[0]


def test_distances_are_between_values_not_codes(pool):
    encoding = pool[1]
    rows = np.array([[0, 0, 0, 0], [0, 1, 0, 0], [0, 2, 0, 0], [4, 0, 0, 0], [2, 0, 0, 0]])
    at = encoding.inputs(rows, np.zeros(5), np.zeros((5, 2))).coordinates
    apart = np.square(at[:, None] - at).sum(2)
    np.testing.assert_allclose(apart[0, 1:], [1.0, 1.0, 1.0, 0.25])
    assert apart[1, 2] == pytest.approx(1.0)


def test_it_learns_a_function_of_the_choices(pool):
    rows, _, inputs = pool
    mean, sd = fitted(pool, 60).predict(inputs)
    left = quality(rows) - mean
    assert np.var(left[60:]) < 0.1 * np.var(quality(rows))
    assert (sd >= 0).all()
    # Within two standard deviations, but for a few.
    assert (np.abs(left[60:]) <= 2 * sd[60:] + 1e-3).mean() > 0.8


def test_the_prediction_is_that_of_the_textbook(pool):
    inputs = pool[2]
    found = fitted(pool, 40)
    cross = found.kernel.covariance(inputs, found.inputs)
    whole = found.kernel.covariance(found.inputs, found.inputs) + found.kernel.noise * np.eye(40)
    mean = found.centre + found.unit * cross @ np.linalg.solve(whole, found.values)
    variance = found.kernel.diagonal(inputs) - np.einsum("ij,ji->i", cross, np.linalg.solve(whole, cross.T))
    variance = np.maximum(variance, 0) + 0.5 * found.kernel.noise
    close, spread = found.predict(inputs)
    np.testing.assert_allclose(close, mean, atol=2e-3 * found.unit)
    wanted = found.unit * found.stretch * np.sqrt(variance)
    np.testing.assert_allclose(spread, wanted, atol=0.02 * found.unit)


def test_noise_that_is_known_is_not_taken_for_quality(pool):
    rows = pool[0]
    noisy = quality(rows[:80]) + np.random.default_rng(2).normal(0, 1.0, 80)
    settled = fitted(pool, 80, noisy, noise_sd=1.0).settled
    assert np.square(settled - quality(rows[:80])).mean() < 0.6 * np.square(noisy - quality(rows[:80])).mean()


def test_without_noise_what_was_found_stands(pool):
    rough = np.random.default_rng(3).normal(size=50)  # nothing explains it
    np.testing.assert_allclose(fitted(pool, 50, rough, noise_sd=0.0).settled, rough)


def test_spread_grows_where_left_out_values_were_missed(pool):
    """Heavy tails, which no covariance foresees."""
    surprising = np.random.default_rng(4).standard_cauchy(60)
    assert fitted(pool, 60, surprising, noise_sd=0.0).stretch > 0.9
    assert fitted(pool, 60).stretch < 1.3


def test_a_pending_candidate_is_believed_and_then_certain(pool):
    inputs = pool[2]
    found = fitted(pool, 25)
    far = np.argsort(-found.predict(inputs)[1])[:1]
    before = found.predict(inputs[far])
    after = found.with_believed(inputs[far]).predict(inputs[far])
    np.testing.assert_allclose(after[0], before[0], atol=1e-2 * found.unit)
    assert after[1][0] < 0.9 * before[1][0]
    assert found.with_believed(inputs[far[:0]]) is found


@pytest.mark.parametrize("values", [[1.5], [2.0, 2.0, 2.0], [0.0, 0.0], [-1e9, 1e9], [1e-12, 2e-12, 5e-12]])
def test_few_or_equal_values_are_no_special_case(pool, values):
    found = fitted(pool, len(values), np.array(values))
    mean, sd = found.predict(pool[2])
    assert np.isfinite(mean).all()
    assert np.isfinite(sd).all()
    low, high = min(values), max(values)
    assert (mean >= low - 2 * (high - low) - 1e-3 * abs(low)).all()
    assert (mean <= high + 2 * (high - low) + 1e-3 * abs(high)).all()


def test_a_row_evaluated_twice_tells_the_noise(pool):
    rows, encoding, inputs = pool
    twice = np.repeat(np.arange(30), 2)
    values = quality(rows[twice]) + np.tile([0.7, -0.7], 30)
    found = Surrogate.fit(inputs[twice], encoding.groups, values)[0]
    assert found.unit * np.sqrt(found.kernel.noise) == pytest.approx(0.7, rel=0.4)


def test_many_evaluations_fit_their_relevances_to_some_of_them(pool):
    rows, encoding, inputs = pool
    found = Surrogate.fit(inputs, encoding.groups, quality(rows))[0]
    assert len(found.weights) == 400
    assert np.square(found.predict(inputs)[0] - quality(rows)).mean() < 0.05 * quality(rows).var()


def test_imagined_values_spread_as_the_posterior_of_the_true_ones(pool):
    rows = pool[0]
    noisy = quality(rows[:50]) + np.random.default_rng(5).normal(0, 1.0, 50)
    found = fitted(pool, 50, noisy, noise_sd=1.0)
    generator = np.random.default_rng(0)
    draws = np.array([found.imagined(generator).settled for _ in range(400)])
    np.testing.assert_allclose(draws.mean(0), found.settled, atol=0.2)
    _, sd = found.predict(pool[2][np.arange(50)])  # of the same candidates' true values
    np.testing.assert_allclose(draws.std(0), sd / found.stretch, rtol=0.2, atol=0.02)


def test_given_imagined_values_they_are_certain(pool):
    found = fitted(pool, 40, quality(pool[0][:40]) + np.random.default_rng(5).normal(0, 1.0, 40), noise_sd=1.0)
    world = found.imagined(np.random.default_rng(0))
    mean, sd = world.predict(pool[2][np.arange(40)])
    np.testing.assert_allclose(mean, world.settled, atol=0.05)
    assert (sd < 0.1 * found.predict(pool[2][np.arange(40)])[1].mean() + 0.05).all()


@pytest.mark.parametrize("values", [[1.5], [2.0, 2.0, 2.0], [-1e9, 1e9]])
@pytest.mark.parametrize("noise_sd", [None, 0.0, 1.0])
def test_few_or_equal_values_can_be_imagined(pool, values, noise_sd):
    world = fitted(pool, len(values), np.array(values), noise_sd).imagined(np.random.default_rng(0))
    assert np.isfinite(world.settled).all()
    assert all(np.isfinite(each).all() for each in world.predict(pool[2]))
