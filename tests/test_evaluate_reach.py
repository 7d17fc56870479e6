"""Whether constraints can be met, and how much of the space each one rejects."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from nas.device import Budget, Target
from nas.errors import UsageError
from nas.evaluate import DeviceBudget, Evaluator, Limits, terms
from nas.space import load_space
from tests.toy_space import ToyPredictor, write_space


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    return load_space(write_space(tmp_path_factory.mktemp("space")))


def evaluator(space, *budgets, limits=None, predictors=None):
    made = []
    for text, predictor in zip(budgets, predictors or [ToyPredictor(scale=100.0)] * len(budgets), strict=True):
        budget = Budget.parse(text)
        target = Target(device=budget.device, runtime="none", precision="fp32")
        sheet = SimpleNamespace(slug=target.slug, alias=budget.device, target=target)
        made.append(DeviceBudget(sheet=sheet, predictor=predictor, terms=terms(space, sheet, budget, 0.8)))
    return Evaluator(space=space, budgets=tuple(made), limits=limits or Limits())


@pytest.fixture(scope="module")
def priced(space):
    return evaluator(space, "10s/step@toy").price(list(space.enumerate()))


def test_the_shares_are_those_of_the_space(space, priced):
    ms = round(float(np.median([e.latency_high_ms for e in priced])), 3)
    params = sorted(e.params for e in priced)[len(priced) // 3]
    found = evaluator(space, f"{ms}ms/step@toy", limits=Limits(max_params=params)).shares()
    slow = np.array([e.latency_high_ms > ms for e in priced])
    big = np.array([e.params > params for e in priced])
    assert found.sampled == len(priced)
    assert found.feasible == pytest.approx(np.mean(~slow & ~big))
    assert [each.constraint for each in found.rejected] == [f"{ms:g}ms/step@toy", f"--max-params {params / 1e6:.4g}M"]
    assert [each.share for each in found.rejected] == pytest.approx([slow.mean(), big.mean()])
    assert [each.alone for each in found.rejected] == pytest.approx([(slow & ~big).mean(), (big & ~slow).mean()])
    assert found.rejected[1].alone > 0


def test_constraints_that_something_meets_are_passed(space, priced):
    least = min(e.latency_high_ms for e in priced)
    evaluator(space, f"{least + 0.01:.3f}ms/step@toy").check_reachable()
    evaluator(space, "10s/step@toy", limits=Limits(max_params=min(e.params for e in priced))).check_reachable()


def test_an_unreachable_budget_names_the_fastest_candidate_and_the_gap(space, priced):
    fastest = min(priced, key=lambda e: e.latency_ms)
    with pytest.raises(UsageError, match=fastest.key) as caught:
        evaluator(space, f"{fastest.latency_high_ms - 2:.3f}ms/step@toy").check_reachable()
    assert "2 ms over" in caught.value.message
    assert f"{fastest.latency_high_ms:.0f} ms" in str(caught.value.hint)


def test_the_second_budget_is_named_where_only_it_cannot_be_met(space):
    with pytest.raises(UsageError, match=r"no candidate of toy meets 0.01ms/step@slow with probability 0.8"):
        evaluator(space, "10s/step@toy", "0.01ms/step@slow").check_reachable()


def test_a_limit_that_nothing_meets_names_the_least_there_is(space, priced):
    least = min(priced, key=lambda e: e.params)
    said = f"no candidate of toy meets --max-params .*: the least found, {least.key}, has {least.params / 1e3:.4g}K"
    with pytest.raises(UsageError, match=said) as caught:
        evaluator(space, "10s/step@toy", limits=Limits(max_params=least.params // 2)).check_reachable()
    assert "a limit from" in str(caught.value.hint)


class Contrary(ToyPredictor):
    """A device on which what is fast elsewhere is slow."""

    def predict(self, features, confidence=0.8):
        ms = 1000.0 / (features @ self._costs)
        return ms, ms, ms

    def upper(self, features, confidence=0.8):
        return self.predict(features)[0]


def test_constraints_that_cannot_be_met_together_are_told_as_such(space, priced):
    high = [e.latency_high_ms for e in priced]
    first = float(np.quantile(high, 0.2))
    slowest_allowed = first / 1.06  # what a candidate at the first budget is predicted to take
    second = 0.9 * 1000.0 / slowest_allowed
    texts = (f"{first:.3f}ms/step@toy", f"{second:.3f}ms/step@slow")
    both = evaluator(space, *texts, predictors=[ToyPredictor(scale=100.0), Contrary(scale=100.0)])
    for budget in both.budgets:
        replace(both, budgets=(budget,)).check_reachable()
    with pytest.raises(UsageError, match="together: the nearest is") as caught:
        both.check_reachable()
    for text in texts:
        assert str(Budget.parse(text)) in caught.value.message
    assert "latency bound" in caught.value.message
