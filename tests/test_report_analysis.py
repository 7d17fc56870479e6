"""What the report works out from the trials together, against figures worked out by hand or by brute force."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from synthetic_study import BUDGET_MS, edited, make_study

from nas import pareto
from nas.report import analysis, build_report, data, explorer, findings
from nas.report.files import read_files


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("reports") / "2026-01-02-snapgen_unet-iphone")


@pytest.fixture(scope="module")
def files(study):
    return read_files(study)


def with_trials(files, change):
    trials = files.trials.copy()
    return dataclasses.replace(files, trials=trials if (changed := change(trials)) is None else changed)


def recorded(files, **fields):
    return dataclasses.replace(files, record={**files.record, **fields})


# How sure the front is


def test_front_membership_of_each_draw_equals_the_definition():
    generator = np.random.default_rng(3)
    latency = np.sort(generator.integers(0, 12, 30)).astype(float)  # with equal latencies
    quality = generator.integers(0, 9, (40, 30)).astype(float)  # and equal qualities
    found = analysis._on_front(latency, quality)
    for drawn, members in zip(quality, found, strict=True):
        assert members.tolist() == pareto.non_dominated(np.column_stack([latency, -drawn])).tolist()


def test_the_chance_of_two_close_candidates_is_that_of_their_difference(files):
    """A slower one is on the front where its score is above the faster one's: a normal's tail."""
    first, second = files.trials[files.trials["state"] == "proxied"]["key"].iloc[:2]

    def two(trials):
        pair = trials[trials["key"].isin([first, second])].drop_duplicates("key")
        return pair.assign(feasible="True", latency_ms=[500.0, 600.0], quality=[10.0, 10.1], quality_sd=[0.1, 0.1])

    chance = analysis.front_probability(with_trials(files, two))
    assert chance.index.tolist() == [first, second]
    # P(normal > -0.1 / (0.1 * sqrt(2))) = 0.760
    assert chance.tolist() == [1.0, pytest.approx(0.760, abs=0.02)]


def test_the_chances_are_the_same_each_time_and_there_are_none_without_a_spread(files):
    chance = analysis.front_probability(files)
    pd.testing.assert_series_equal(chance, analysis.front_probability(files))
    assert chance.between(0, 1).all()
    front = data.front_table(files)["key"]
    assert chance[front].mean() > chance.drop(front).mean()

    def exact(trials):
        trials["quality_sd"] = 0.0

    without = with_trials(files, exact)
    assert analysis.front_probability(without).empty
    assert findings.stability(without) == ""
    assert all("on the front" not in fact for fact in explorer.answers(without)["facts"])


# The knee, and what is usual at a latency


def test_the_knee_is_a_member_between_the_ends_and_there_is_none_on_a_straight_front(files):
    table = data.front_table(files)
    assert analysis.knee(files) in table["key"].tolist()[1:-1]

    straight = files.front.drop_duplicates("key").iloc[:4].copy()
    straight["latency_ms"] = straight["quality"] = [100.0, 200.0, 300.0, 400.0]
    assert analysis.knee(dataclasses.replace(files, front=straight)) == ""
    assert findings.knee_words(dataclasses.replace(files, front=straight)) == ""


def test_a_quality_that_latency_decides_leaves_nothing_over(files):
    def decided(trials):
        at = np.log(trials["latency_ms"])
        trials["quality"] = (3.0 + 2.0 * at - 0.1 * at**2).where(trials["quality"].notna())

    found = analysis.relative_quality(with_trials(files, decided))
    assert len(found) == len(data.scored(files))
    np.testing.assert_allclose(found, 0.0, atol=1e-9)
    assert abs(analysis.relative_quality(files).mean()) < 1e-9  # a least-squares fit with a constant


def test_each_candidate_is_listed_once_under_each_choice_that_is_active_in_it(files):
    scored = data.scored(files).set_index("key")
    lines = analysis.by_value(files, scored["quality"])
    assert not lines.duplicated(["choice", "key"]).any()
    inactive = scored.index[scored["choice.depth_1"] == "0"]
    assert len(inactive)
    assert not set(inactive) & set(lines.loc[lines["choice"] == "self_attention_1", "key"])
    assert lines.loc[lines["choice"] == "width_2", "value"].drop_duplicates().tolist() == [
        "512", "640", "768", "896", "1024",
    ]  # fmt: skip


# The edge of the space


def test_the_edge_is_a_warning_only_where_the_front_crowds_too(files):
    front = files.front.drop_duplicates("key").sort_values("latency_ms").iloc[:4].copy()
    front["choice.width_0"], front["choice.depth_2"] = ["320", "320", "128", "128"], ["1", "2", "4", "6"]
    edges = [{"choice": "width_0", "value": 320, "at": "high"}, {"choice": "depth_2", "value": 6, "at": "high edge"}]
    edged = dataclasses.replace(recorded(files, edges=edges), front=front)
    found = analysis.edges(edged)
    assert found[["members", "of", "crowded"]].to_numpy().tolist() == [[2, 4, True], [1, 4, False]]
    assert "in 1 choice (highest value: width 0 = 320)" in findings.edge_words(edged)
    assert "depth" not in findings.edge_words(edged)
    assert "depth 2" in findings.edge_table(edged)
    assert findings.edge_words(recorded(files, edges=[])) == ""


# Proxy time


def test_seconds_add_up_and_scores_of_earlier_studies_cost_none(files):
    curve = data.hypervolume_curve(files)
    np.testing.assert_allclose(curve["seconds"], 7.5 * curve["trial"])

    def reuse(trials):
        trials.loc[trials.index[trials["state"] == "proxied"][1], "source"] = data.REUSED
        trials.loc[trials.index[trials["state"] == "infeasible"][0], ["state", "seconds"]] = ["stopped", 2.0]

    seconds = data.hypervolume_curve(with_trials(files, reuse))["seconds"]
    assert seconds.iloc[:2].tolist() == [seconds.iloc[0]] * 2
    assert seconds.iloc[-1] == pytest.approx(7.5 * (len(curve) - 1) + 2.0)
    fewer = recorded(files, hypervolume={**files.record["hypervolume"], "values": [1.0, 2.0]})
    assert data.hypervolume_curve(fewer)["seconds"].isna().all()


# Budgets, limits, reuse


def test_every_limit_stands_with_the_share_that_it_rejects(files):
    text = findings.limits(files)
    assert "<td>1.4s@iphone</td>" in text
    assert "one image on galaxy-s24--tflite--fp16, with 80 % confidence" in text
    assert "--max-params 600M" in text
    for share in ("62 %", "31 %", "8.0 %", "32 %", "1.5 %"):
        assert share in text
    one = recorded(files, budgets=files.record["budgets"][:1], limits={"max_params": None})
    assert findings.limits(one) == ""
    assert (files.limited, one.limited) == (True, False)


def test_over_a_limit_is_not_taken_for_untrainable(files):
    """Within the budget by latency, but over another device's budget or over a size: no quality was bought."""
    index = files.trials.index[files.trials["state"] == "infeasible"][:3]

    def over(trials):
        trials.loc[index, "latency_high_ms"] = BUDGET_MS - 1
        trials.loc[index, "reason"] = [
            "latency bound 12 ms over 0.9s@galaxy-s24",
            "812MB, over --max-size 700MB",
            "diverged",
        ]

    standing = data.points(with_trials(files, over)).set_index("key")["standing"]
    keys = files.trials.loc[index, "key"]
    assert standing[keys].tolist() == [data.UNPROXIED, data.UNPROXIED, data.UNTRAINABLE]


def test_reused_scores_are_counted(files):
    said = findings.reused(files)
    assert said == (
        " 12 of 31 kept scores were taken over from earlier studies with the same proxy settings, which saved"
        " 1 min 30 s of proxy time."
    )
    assert findings.reused(recorded(files, reuse={"available": 0, "used": 0, "seconds_saved": 0.0})) == ""
    assert findings.reused(recorded(files, reuse=None)) == ""


def test_the_latency_on_a_further_device_stands_in_table_card_and_comparison(study, files):
    assert files.elsewhere == ["galaxy-s24"]
    fastest = data.front_table(files).iloc[0]
    assert fastest["latency_ms@galaxy-s24"] == pytest.approx(0.55 * fastest["latency_ms"])
    text = build_report(study).read_text()
    assert ">on galaxy-s24</button>" in text
    assert "<dt>latency on galaxy-s24</dt>" in text
    assert "latency on galaxy-s24" in explorer.answers(files)["facts"]
    assert "budget 1.2s@iphone is now 1.4s@iphone" in text


# The slider's data


def test_the_slider_reaches_the_budget_and_its_first_position_is_where_the_fastest_fits(files):
    found = explorer.answers(files)
    bounds = [c["high_ms"] for c in found["candidates"]]
    step = (found["budget_ms"] - found["from_ms"]) / found["positions"]
    assert found["from_ms"] <= min(bounds) < found["from_ms"] + step
    assert max(bounds) <= found["budget_ms"] == BUDGET_MS
    assert 80 <= found["positions"] <= 200
    assert {c["key"] for c in found["candidates"]} == set(
        data.points(files).query("standing in ['front', 'dominated']")["key"]
    )
    assert all(len(c["facts"]) == len(found["facts"]) for c in found["candidates"])


@pytest.mark.parametrize(("span", "step"), [(1000.0, 5.0), (200.0, 1.0), (399.0, 2.0), (0.0, 5e-9), (4.1e5, 5e3)])
def test_a_position_is_a_round_number_of_milliseconds(span, step):
    assert explorer._step(span) == pytest.approx(step)


def test_one_candidate_needs_no_slider(files):
    def one(trials):
        good = trials[(trials["state"] == "proxied") & (trials["feasible"] == "True")]
        return trials.drop(good.index[1:])

    assert explorer.answers(with_trials(files, one)) is None
    assert explorer.around(with_trials(files, one), "the figure") == "the figure"


# Studies of earlier versions


def test_a_study_of_the_first_version_still_has_its_page(tmp_path):
    text = build_report(make_study(tmp_path / "old", first_version=True)).read_text()
    for missing in ('id="limits"', 'id="figure-importance"', "taken over from earlier"):
        assert missing not in text
    for there in ('id="budget"', 'id="figure-stability"', 'id="figure-values-0"', 'id="figure-progress-seconds"'):
        assert there in text


def test_markup_in_a_value_cannot_leave_the_slider_s_data(study, tmp_path):
    folder = edited(study, tmp_path, "trials.csv", lambda t: t.replace("separable-2", "</script><b>x"))
    front = pd.read_csv(folder / "front.csv", dtype=str, keep_default_na=False)
    front.replace("separable-2", "</script><b>x").to_csv(folder / "front.csv", index=False)
    text = build_report(folder).read_text()
    assert "</script><b>x" not in text
    content = text.partition('class="explorer-data">')[2].partition("</script>")[0]
    assert any("</script><b>x" in c["choices"] for c in json.loads(content)["candidates"])
