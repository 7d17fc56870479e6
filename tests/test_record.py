"""What a study writes down, and finding a candidate in it again."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest

from nas import record
from nas.errors import NasError, UsageError
from nas.evaluate import Evaluation
from nas.record import Trial, candidate_of, edges, front, hypervolumes, recommend, trials_frame
from nas.space import load_space
from tests.toy_space import write_space


def evaluation(key="a", latency_ms=100.0, quality=1.0, *, feasible=True, choices=None, sd=0.0):
    return Evaluation(
        key=key,
        choices=choices or {},
        params=1,
        macs=2,
        weight_bytes=3,
        peak_activation_bytes=4,
        step_ms=latency_ms / 4,
        latency_ms=latency_ms,
        latency_low_ms=latency_ms - 1,
        latency_high_ms=latency_ms + 1,
        meets_budget_probability=0.9,
        feasible=feasible,
        reason="",
        source="search",
        quality=quality,
        quality_sd=sd,
    )


def trials(*evaluations, state="proxied"):
    return [Trial(number=i, state=state, evaluation=e) for i, e in enumerate(evaluations)]


def test_the_front_is_feasible_proxied_and_not_beaten():
    found = front(
        [
            *trials(
                evaluation("slow", 200, 3.0),
                evaluation("fast", 100, 1.0),
                evaluation("beaten", 150, 0.5),
                evaluation("over", 90, 9.0, feasible=False),
            ),
            Trial(number=9, state="infeasible", evaluation=evaluation("never", 50, None)),
        ]
    )
    assert [e.key for e in found] == ["fast", "slow"]
    assert front([]) == []


def test_hypervolume_grows_by_hand_computed_areas_against_the_fixed_point():
    found = hypervolumes(
        trials(evaluation("a", 500, 2.0), evaluation("b", 250, 1.0), evaluation("c", 800, 1.5)), budget_ms=1000
    )
    assert found["values"] == pytest.approx([0.5 * 2.0, 0.5 * 2.0 + 0.25 * 1.0, 1.25])
    assert found["reference_point"] == {"latency_ms": 1000, "quality": 0.0}


def test_an_infeasible_reference_adds_no_hypervolume_but_counts_as_a_trial():
    found = hypervolumes(trials(evaluation("over", 500, 2.0, feasible=False), evaluation("a", 500, 2.0)), 1000)
    assert found["values"] == pytest.approx([0.0, 1.0])


def test_a_score_of_another_unit_is_measured_against_the_worst_of_its_own():
    found = hypervolumes(trials(evaluation("a", 500, -2.0), evaluation("b", 250, -3.0)), 1000, "log10")
    assert found["reference_point"] == {"latency_ms": 1000, "quality": -3.0}
    assert found["values"] == pytest.approx([0.5 * 1.0, 0.5 * 1.0])
    assert found["unit"] == "s·log10"
    assert hypervolumes([], 1000, "log10")["values"] == []


def test_a_stopped_trial_is_on_no_front_and_adds_no_hypervolume():
    found = [*trials(evaluation("a", 500, 2.0)), *trials(evaluation("b", 100, None), state="stopped")]
    assert [e.key for e in front(found)] == ["a"]
    assert hypervolumes(found, 1000)["values"] == pytest.approx([1.0])


def test_the_recommended_is_the_fastest_that_ties_with_the_best():
    members = [evaluation("low", 100, 1.0), evaluation("tie", 150, 2.95, sd=0.1), evaluation("best", 300, 3.0, sd=0.1)]
    assert recommend(members)["key"] == "tie"
    members[1] = evaluation("tie", 150, 2.7, sd=0.1)
    assert recommend(members)["key"] == "best"
    assert recommend([]) is None


def test_a_recommendation_says_when_no_candidate_learnt_text():
    blind = [evaluation("a", 100, 1.0)]
    assert recommend(blind)["why"].endswith("; text is not judged by this proxy")
    assert "no candidate follows captions by its proxy score" in recommend([replace(blind[0], text_quality=0.5)])["why"]
    assert "1.00 log10" in recommend(blind, "log10")["why"]
    assert "text" not in recommend([replace(blind[0], text_quality=3.0)])["why"]


def test_edges_are_ordinal_choices_at_an_end(tmp_path):
    space = load_space(write_space(tmp_path))
    chosen = evaluation(choices={"width_0": 64, "width_1": 128, "resnets_0": 2, "conv_0": "full", "depth_1": 1})
    assert [(e["choice"], e["at"]) for e in edges(chosen, space)] == [
        ("width_0", "low"),
        ("resnets_0", "high"),
        ("depth_1", "high"),
    ]
    assert edges(None, space) == []


@pytest.fixture
def folder(tmp_path):
    space = load_space(write_space(tmp_path))
    rows = [space.from_row(row) for row in space.sample(6, 0)]
    found = [evaluation(c.key, 100 + i, float(i), choices=c.choices) for i, c in enumerate(rows)]
    study = tmp_path / "reports" / "one"
    study.mkdir(parents=True)
    data = {"schema": 1, "space": "toy", "space_path": str(space.path), "resolution_px": 64}
    data["space_hash"] = space.at_resolution(64).hash
    data["recommended"] = {"key": rows[3].key}
    frame = trials_frame(trials(*found), space)
    record.write(study, data, {"trials.csv": frame, "front.csv": frame, "blocks.csv": frame[:0]})
    return study, rows


def test_a_candidate_is_found_again_by_key_prefix_and_recommendation(folder, tmp_path):
    study, rows = folder
    found = candidate_of(f"{study}#{rows[2].key}")[1]
    assert found.choices == rows[2].choices
    assert found.key == rows[2].key
    assert found.space.resolution_px == 64
    assert candidate_of(f"one#{rows[2].key[:8]}", tmp_path / "reports")[1].key == rows[2].key
    assert candidate_of("one", tmp_path / "reports")[1].key == rows[3].key


def test_an_unknown_study_or_key_offers_what_there_is(folder, tmp_path):
    study, rows = folder
    with pytest.raises(UsageError, match="did you mean 'one'"):
        candidate_of("onee#x", tmp_path / "reports")
    with pytest.raises(UsageError, match=rows[0].key):
        candidate_of(f"{study}#nope")


def test_a_candidate_of_an_edited_space_is_refused(folder):
    study, rows = folder
    path = rows[0].space.path
    path.write_text(path.read_text().replace("width_0 = [64, 128]", "width_0 = [64, 128, 192]"))
    with pytest.raises(NasError, match="another version of the space toy"):
        candidate_of(f"{study}#{rows[0].key}")


def test_a_study_of_another_schema_or_damaged_is_refused(folder):
    study, _ = folder
    data = json.loads((study / "study.json").read_text())
    (study / "study.json").write_text(json.dumps({**data, "schema": 99}))
    with pytest.raises(NasError, match="schema 99"):
        record.read_study(study)
    (study / "study.json").write_text("{half")
    with pytest.raises(NasError, match="not valid JSON"):
        record.read_study(study)


def elsewhere(evaluation, device, ms, probability):
    there = {"latency_ms": ms, "latency_low_ms": ms - 1, "latency_high_ms": ms + 1}
    return replace(evaluation, others={device: {**there, "meets_budget_probability": probability}})


def test_every_budget_has_its_latency_columns(tmp_path):
    space = load_space(write_space(tmp_path))
    found = [elsewhere(evaluation("a", 100), "slow", 250.0, 0.75), elsewhere(evaluation("b", 90), "slow", 260.0, 0.5)]
    frame = trials_frame(trials(*found), space)
    assert list(frame["latency_ms"]) == [100, 90]
    assert list(frame["latency_ms@slow"]) == [250.0, 260.0]
    assert list(frame["meets_budget_probability@slow"]) == [0.75, 0.5]
    names = list(frame.columns)
    assert names.index("latency_high_ms@slow") == names.index("latency_low_ms@slow") + 1 < names.index("choice.width_0")
    assert not {"others", "violated"} & set(names)
    assert not [name for name in trials_frame(trials(evaluation("a")), space).columns if "@" in name]


def test_a_recommendation_tells_the_chance_on_every_device():
    why = recommend([elsewhere(evaluation("a", 100), "slow", 250.0, 0.81)])["why"]
    assert "; 90% likely within the budget, 81% within that of slow" in why


def test_an_inactive_choice_is_an_empty_cell(folder):
    study, _ = folder
    frame = pd.read_csv(study / "trials.csv", keep_default_na=False)
    assert {"number", "key", "state", "latency_high_ms", "choice.width_0"} <= set(frame.columns)
    assert len(frame) == 6
