"""Budgets in the terms of a space, and candidates priced against them."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from nas import components
from nas.components import Part
from nas.device import Budget, Target
from nas.errors import NasError, UsageError
from nas.evaluate import DeviceBudget, Evaluator, Limits, breakdown, terms, with_pipeline
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
        slug="toy--none--fp32", alias="toy", chip="", target=Target(device="toy", runtime="none", precision="fp32")
    )


def evaluator(space, sheet, budget, confidence=0.8):
    return Evaluator(space=space, budgets=(device_budget(space, sheet, budget, confidence),))


def device_budget(space, sheet, budget, confidence=0.8, scale=1.0):
    return DeviceBudget(
        sheet=sheet,
        predictor=ToyPredictor(scale=scale),
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


def test_the_first_budget_is_the_axis_and_every_budget_must_be_met(space, sheet):
    slow = SimpleNamespace(slug="slow--none--int8", alias="slow", target=replace(sheet.target, precision="int8"))
    candidates = list(space.enumerate())
    alone = evaluator(space, sheet, "10s@toy").price(candidates)
    ms = float(np.median([e.latency_high_ms for e in alone]))
    first, second = f"{ms:.3f}ms@toy", f"{2 * ms:.3f}ms@slow"
    both = Evaluator(
        space=space,
        budgets=(device_budget(space, sheet, first), device_budget(space, slow, second, scale=4.0)),
    )
    found = both.price(candidates)
    assert [e.latency_ms for e in found] == [e.latency_ms for e in alone]
    for each in found:
        there = each.others["slow"]
        assert there["latency_ms"] == pytest.approx(7.0 + 4 * 4 * each.step_ms)
        assert there["latency_low_ms"] < there["latency_ms"] < there["latency_high_ms"]
        fits = (each.latency_high_ms <= both.budgets[0].most, there["latency_high_ms"] <= both.budgets[1].most)
        assert each.feasible == all(fits)
        assert each.violated == tuple(b.name for b, fit in zip(both.budgets, fits, strict=True) if not fit)
        assert (there["meets_budget_probability"] >= 0.8) == fits[1]
    assert {e.violated for e in found} > {(), (both.budgets[1].name,)}
    reason = next(e.reason for e in found if len(e.violated) == 2)
    assert reason.count("latency bound") == 2
    assert f"ms over {both.budgets[0].name}; latency bound" in reason


def test_limits_are_met_beside_the_budget(space, sheet):
    candidates = list(space.enumerate())
    found = evaluator(space, sheet, "10s@toy").price(candidates)
    params = sorted(e.params for e in found)
    limited = Evaluator(
        space=space,
        budgets=(device_budget(space, sheet, "10s@toy"),),
        limits=Limits(max_params=params[len(params) // 2]),
    )
    for before, after in zip(found, limited.price(candidates), strict=True):
        assert after.feasible == (before.params <= params[len(params) // 2])
        assert after.violated == (() if after.feasible else (limited.constraints[1].name,))


def test_what_may_change_in_a_study_is_told_apart_by_the_identity(space, sheet):
    one = evaluator(space, sheet, "10s@toy")
    others = [
        evaluator(space, sheet, "9s@toy"),
        evaluator(space, sheet, "10s@toy", 0.9),
        replace(one, limits=Limits(max_params=5)),
        replace(one, space=with_pipeline(space, steps=8)),
        replace(one, budgets=(device_budget(space, sheet, "10s@toy", scale=2.0),)),
        replace(one, budgets=(*one.budgets, *one.budgets)),
    ]
    identities = [json.dumps(each.identity(), sort_keys=True) for each in (one, *others)]
    assert len(set(identities)) == len(identities)
    assert evaluator(space, sheet, "10s@toy").identity() == one.identity()
    assert json.loads(identities[0]) == one.identity()
    changed = {name for name, value in others[0].identity().items() if value != one.identity()[name]}
    assert changed == {"budgets"}


def test_the_pool_is_the_feasible_part_of_a_small_space_with_its_latencies(space, sheet):
    candidates = list(space.enumerate())
    ms = float(np.median([e.latency_high_ms for e in evaluator(space, sheet, "10s@toy").price(candidates)]))
    bounded = evaluator(space, sheet, f"{ms:.3f}ms@toy")
    priced = {c.row: e for c, e in zip(candidates, bounded.price(candidates), strict=True)}
    rows, latency_ms, features = bounded.problem_pool(1000, seed=3)
    assert {tuple(row) for row in rows} == {row for row, e in priced.items() if e.feasible}
    assert latency_ms == pytest.approx([priced[tuple(row)].latency_ms for row in rows])
    assert np.ptp(features, axis=0).min() > 0
    assert features[:, 0] == pytest.approx(np.log2([priced[tuple(row)].params for row in rows]))
    again_ms, again = bounded.features(rows)
    assert np.array_equal(again, features)
    assert again_ms == pytest.approx(latency_ms)
    near, near_ms, near_features = bounded.neighbours(rows[:1], seed=0)
    assert {tuple(row) for row in near} <= {tuple(row) for row in rows[1:]}
    assert (near_ms.shape, near_features.shape[1]) == ((len(near),), features.shape[1])
