"""Budgets in the terms of a space, and candidates priced against them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from nas import evaluate
from nas.device import Budget, Target
from nas.errors import UsageError
from nas.evaluate import Evaluator, terms
from nas.space import load_space
from nas.tables import FixedPart
from tests.toy_space import ToyPredictor, write_space

PARTS = (
    FixedPart(role="text_encoders", name="encoders", ms=5.0, source="s"),
    FixedPart(role="decoder", name="tiny", ms=2.0, source="s"),
)


@pytest.fixture
def space(tmp_path):
    return load_space(write_space(tmp_path))


@pytest.fixture
def sheet(monkeypatch):
    monkeypatch.setattr(evaluate, "fixed_parts", lambda slug, roles, px: [p for p in PARTS if p.role in roles])
    return SimpleNamespace(slug="toy--none--fp32", target=Target(device="toy", runtime="none", precision="fp32"))


def evaluator(space, sheet, budget, confidence=0.8):
    return Evaluator(
        space=space,
        sheet=sheet,
        predictor=ToyPredictor(),
        terms=terms(space, sheet, Budget.parse(budget), confidence),
    )


def test_a_budget_in_seconds_pays_for_the_fixed_parts_and_every_step(space, sheet):
    found = terms(space, sheet, Budget.parse("0.107s@toy"), 0.8)
    assert found.fixed_ms == 7.0
    assert found.calls == 4
    assert found.step_budget_ms == pytest.approx(25.0)
    assert found.total_ms(25.0) == pytest.approx(107.0)


def test_guidance_doubles_the_calls(space, sheet):
    guided = replace(space, pipeline=replace(space.pipeline, guidance=True))
    assert terms(guided, sheet, Budget.parse("107ms@toy"), 0.8).step_budget_ms == pytest.approx(12.5)


def test_a_step_budget_charges_nothing_else(space, sheet):
    found = terms(space, sheet, Budget.parse("25ms/step@toy"), 0.8)
    assert (found.fixed_ms, found.calls, found.step_budget_ms) == (0.0, 1, 25.0)


def test_a_budget_below_its_fixed_parts_says_what_they_cost(space, sheet):
    with pytest.raises(UsageError, match=r"encoders 5 ms \+ tiny 2 ms = 7 ms"):
        terms(space, sheet, Budget.parse("6ms@toy"), 0.8)


@pytest.mark.parametrize("confidence", [0.4, 1.0, -1.0])
def test_a_confidence_that_means_nothing_is_refused(space, sheet, confidence):
    with pytest.raises(UsageError, match="confidence"):
        terms(space, sheet, Budget.parse("1s@toy"), confidence)


def test_feasible_is_exactly_the_upper_bound_within_the_budget(space, sheet):
    candidates = list(space.enumerate())
    loose = evaluator(space, sheet, "10s@toy").price(candidates)
    budget_ms = float(np.median([e.latency_high_ms for e in loose]))
    found = evaluator(space, sheet, f"{budget_ms:.3f}ms@toy").price(candidates)
    assert [e.feasible for e in found] == [e.latency_high_ms <= round(budget_ms, 3) for e in found]
    assert any(e.feasible for e in found)
    assert not all(e.feasible for e in found)
    for one in found:
        assert one.latency_low_ms < one.latency_ms < one.latency_high_ms
        assert one.latency_ms == pytest.approx(7.0 + 4 * one.step_ms)
        assert one.latency_high_ms == pytest.approx(7.0 + 4 * 1.06 * one.step_ms)
        assert (one.reason == "") == one.feasible


def test_more_confidence_never_makes_more_feasible(space, sheet):
    candidates = list(space.enumerate())
    ms = float(np.median([e.latency_ms for e in evaluator(space, sheet, "10s@toy").price(candidates)]))
    shares = [
        np.mean([e.feasible for e in evaluator(space, sheet, f"{ms:.3f}ms@toy", c).price(candidates)])
        for c in (0.5, 0.8, 0.99)
    ]
    assert shares[0] >= shares[1] >= shares[2]
    assert shares[0] > shares[2]


def test_the_blocks_add_up_to_the_step(space, sheet):
    found = evaluator(space, sheet, "10s@toy")
    candidate = space.reference("known")
    parts = found.block_latencies(candidate)
    assert len(parts) > 10
    assert sum(ms for _, ms in parts) == pytest.approx(found.price([candidate])[0].step_ms)


def test_an_unreachable_budget_names_the_fastest_candidate_and_the_gap(space, sheet):
    everything = evaluator(space, sheet, "10s@toy").price(list(space.enumerate()))
    fastest = min(everything, key=lambda e: e.latency_ms)
    with pytest.raises(UsageError, match=fastest.key) as caught:
        evaluator(space, sheet, f"{fastest.latency_high_ms - 2:.3f}ms@toy").check_reachable()
    assert "2 ms over" in caught.value.message
    assert f"{fastest.latency_high_ms:.0f} ms" in str(caught.value.hint)
    evaluator(space, sheet, f"{fastest.latency_high_ms + 0.01:.3f}ms@toy").check_reachable()


def test_the_feasible_share_is_that_of_the_space(space, sheet):
    everything = evaluator(space, sheet, "10s@toy").price(list(space.enumerate()))
    middle = float(np.median([e.latency_high_ms for e in everything]))
    exact = np.mean([e.latency_high_ms <= round(middle, 3) for e in everything])
    assert evaluator(space, sheet, f"{middle:.3f}ms@toy").feasible_share() == pytest.approx(exact)
