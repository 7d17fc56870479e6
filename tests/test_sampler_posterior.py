"""What is believed of the hyperparameters: the gradient is right, and draws are as likely as the density says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import check_grad

from nas.sampler.encoding import Choice, Encoding
from nas.sampler.posterior import Posterior

CHOICES = (Choice(size=6, ordered=True), Choice(size=3, ordered=False))


def posterior(count, values=None, known=None):
    generator = np.random.default_rng(0)
    rows = np.column_stack([generator.integers(0, choice.size, count) for choice in CHOICES])
    cost = rows[:, 0] + generator.normal(0, 0.3, count)
    encoding = Encoding.of(CHOICES, np.arange(10.0), None)
    values = np.sin(rows[:, 0]) + (rows[:, 1] == 1) if values is None else values
    scaled = (values - values.mean()) / (values.std() or 1.0)
    return Posterior(encoding.inputs(rows, cost, None), encoding.groups, scaled, known)


def test_the_gradient_is_the_densitys():
    target = posterior(30)
    generator = np.random.default_rng(1)
    for _ in range(3):
        at = target.starts[0] + generator.normal(0, 0.5, len(target.middle))
        wrong = check_grad(lambda x: target(x)[0], lambda x: target(x)[1], at, epsilon=1e-6)
        assert wrong < 1e-3 * np.linalg.norm(target(at)[1])


def test_the_most_probable_is_more_so_than_the_starts_and_its_surroundings():
    target = posterior(30)
    at = target.most_probable().values
    generator = np.random.default_rng(1)
    low, high = np.array(target.bounds).T
    others = [*target.starts, *np.clip(at + generator.normal(0, 1.0, (20, len(at))), low, high)]
    assert all(target(at)[0] <= target(each)[0] for each in others)


def test_without_evidence_draws_are_of_the_prior(monkeypatch):
    target = posterior(10)
    monkeypatch.setattr(target, "_likelihood", lambda at: 0.0)
    draws = np.array([each.values for each in target.drawn(target.most_probable(), 400)])
    low, high = np.array(target.bounds).T
    wide = (low < target.middle - 2 * target.spread) & (high > target.middle + 2 * target.spread)  # hardly cut off
    assert wide.sum() >= 3
    np.testing.assert_allclose(draws.mean(0)[wide], target.middle[wide], atol=0.5)
    np.testing.assert_allclose(draws.std(0)[wide] / target.spread[wide], 1.0, atol=0.3)
    assert ((draws >= low) & (draws <= high)).all()


def test_draws_are_about_as_likely_as_the_density_says():
    """Of a Gaussian density in d dimensions minus its logarithm lies d / 2 above the least, on average."""
    target = posterior(60, known=0.01)
    first = target.most_probable()
    draws = target.drawn(first, 100)
    above = np.mean([target(each.values)[0] for each in draws]) - target(first.values)[0]
    assert 0.2 < above / (0.5 * len(first.values)) < 3.0
    assert len({each.values.tobytes() for each in draws}) > 90


def test_draws_differ_less_as_evaluations_grow():
    spread = []
    for count in (6, 100):
        target = posterior(count)
        spread.append(np.std([each.noise for each in target.drawn(target.most_probable(), 60)]))
    assert spread[1] < 0.5 * spread[0]


@pytest.mark.parametrize("count", [0, 3])
def test_the_same_values_give_the_same_draws(count):
    target = posterior(20)
    first = target.most_probable()
    once, again = (target.drawn(first, count) for _ in range(2))
    assert [each.values.tolist() for each in once] == [each.values.tolist() for each in again]
    assert len(once) == count
