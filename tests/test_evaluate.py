"""Budgets in the terms of a space, and candidates priced against them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from nas import components
from nas.components import Part
from nas.device import Budget, Target
from nas.errors import NasError, UsageError
from nas.evaluate import Evaluator, breakdown, terms, with_pipeline
from nas.space import load_space
from tests.toy_space import ToyPredictor, write_space


def part(role, name, ms, low=None, high=None):
    basis = "published" if low is None else "predicted"
    return Part(role=role, name=name, ms=ms, low_ms=low or ms, high_ms=high or ms, basis=basis, source="s")


PARTS = {
    "snapgen-text-encoders": part("text_encoders", "encoders", 5.0),
    "snapgen-tiny": part("decoder", "tiny", 2.0),
    "taesd": part("decoder", "guess", 4.0, 3.0, 6.0),
}


@pytest.fixture
def space(tmp_path):
    return load_space(write_space(tmp_path))


@pytest.fixture
def sheet(monkeypatch):
    monkeypatch.setattr(components, "charge", lambda component, px, *_: PARTS[component.name])
    return SimpleNamespace(
        slug="toy--none--fp32", chip="", target=Target(device="toy", runtime="none", precision="fp32")
    )


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


def test_a_predicted_part_is_charged_at_its_bounds(space, sheet):
    guessed = with_pipeline(space, decoder="taesd")
    found = terms(guessed, sheet, Budget.parse("0.107s@toy"), 0.8, ToyPredictor())
    assert (found.fixed_low_ms, found.fixed_ms, found.fixed_high_ms) == (8.0, 9.0, 11.0)
    assert found.step_budget_ms == pytest.approx((107 - 11) / 4)
    priced = evaluator(guessed, sheet, "10s@toy").price([space.reference("known")])[0]
    assert priced.latency_ms == pytest.approx(9.0 + 4 * priced.step_ms)
    assert priced.latency_low_ms == pytest.approx(8.0 + 4 * 0.94 * priced.step_ms)
    assert priced.latency_high_ms == pytest.approx(11.0 + 4 * 1.06 * priced.step_ms)
    # A budget at the upper bound is met with exactly the probability that was asked for.
    at = evaluator(guessed, sheet, f"{priced.latency_high_ms:.9f}ms@toy").price([space.reference("known")])[0]
    assert at.meets_budget_probability == pytest.approx(0.8)
    said = found.words(25.0)
    assert said == "encoders 5 ms (published) + 4 x the denoiser at 25 ms (predicted) + guess 4 ms (predicted, 3 to 6)"


def test_a_pipeline_can_be_set_and_says_so(space):
    changed = with_pipeline(space, steps=8, guidance=True, text_encoders=["clip-l", "t5-xxl"], decoder="sd-vae")
    assert (changed.pipeline.calls, changed.pipeline.decoder) == (16, "sd-vae")
    assert changed.pipeline.text_encoders == ("clip-l", "t5-xxl")
    assert "steps = 8, guidance = True, text_encoders = clip-l, t5-xxl, decoder = sd-vae" in changed.pipeline.source
    assert changed.hash == space.hash
    assert with_pipeline(space) is space
    assert with_pipeline(space, text_encoders=()).pipeline.text_encoders == ()
    with pytest.raises(UsageError, match="unknown decoder 'taesdd'; did you mean 'taesd'"):
        with_pipeline(space, decoder="taesdd")
    with pytest.raises(UsageError, match=r"unknown text encoder 'clipl'; did you mean 'clip-l'\? known: .*t5-xxl"):
        with_pipeline(space, text_encoders=("clipl",))
    with pytest.raises(UsageError, match="steps must be at least 1, got 0"):
        with_pipeline(space, steps=0)
    with pytest.raises(UsageError, match=r"space toy has no \[pipeline\], so its steps cannot be set"):
        with_pipeline(replace(space, pipeline=None), steps=3)


def test_a_space_without_a_pipeline_has_no_budget_in_seconds(space, sheet):
    bare = replace(space, pipeline=None)
    with pytest.raises(UsageError, match=r"space toy has no \[pipeline\]") as caught:
        terms(bare, sheet, Budget.parse("1s@toy"), 0.8)
    assert "1000ms/step@toy" in str(caught.value.hint)
    assert terms(bare, sheet, Budget.parse("1s/step@toy"), 0.8).calls == 1
    assert breakdown(bare.reference("known")) is None


def test_a_breakdown_is_the_whole_pipeline(space, sheet):
    candidate = with_pipeline(space, guidance=True).reference("known")
    bare = breakdown(candidate)
    assert [share.role for share in bare.parts] == ["text_encoders", "denoiser", "decoder"]
    assert [share.calls for share in bare.parts] == [1, 8, 1]
    assert bare.lacking == ("snapgen-text-encoders",)
    _, denoiser, decoder = bare.parts
    assert bare.params == denoiser.params + decoder.params
    assert bare.macs == 8 * denoiser.macs + decoder.macs
    assert (bare.ms, bare.high_ms) == (None, None)
    timed = breakdown(candidate, sheet=sheet, predictor=ToyPredictor(), confidence=0.8)
    priced = evaluator(candidate.space, sheet, "10s@toy").price([candidate])[0]
    assert (timed.low_ms, timed.ms, timed.high_ms) == pytest.approx(
        (priced.latency_low_ms, priced.latency_ms, priced.latency_high_ms)
    )
    assert [share.basis for share in timed.parts] == ["published", "predicted", "published"]
    assert timed.to_json()["total"]["ms"] == timed.ms


def test_a_breakdown_says_what_has_no_latency(space, sheet, monkeypatch):
    def refuse(component, *_):
        raise NasError(f"nobody timed {component.name}")

    monkeypatch.setattr(components, "charge", refuse)
    found = breakdown(space.reference("known"), sheet=sheet, predictor=ToyPredictor())
    assert found.ms is None
    assert (found.parts[2].ms, found.parts[2].source) == (None, "nobody timed snapgen-tiny")


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
