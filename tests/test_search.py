"""`nas search` from settings to files: every check before the first proxy run, and one whole search on a toy space."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest

from nas import quality, search
from nas.errors import NasError, UsageError
from nas.proxies import proxy, settings_of
from nas.quality import ProxySettings
from nas.record import Trial, candidate_of, read_study
from nas.report import build_report
from nas.search import SearchSettings, plan_search, preview, run_search, study_folder
from tests.toy_space import write_space

TINY = ProxySettings(steps=3, batch=8, seeds=(0, 1), held_rows=64)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return SearchSettings(space=str(write_space(tmp_path)), budget="9ms/step@iphone", trials=4, jobs=1, proxy=TINY)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"space": "snapgen_unett"}, "did you mean 'snapgen_unet'"),
        ({"budget": "1.4s@iphon"}, "did you mean 'iphone'"),
        ({"budget": "1.4@iphone"}, "TIME@DEVICE"),
        ({"trials": 0}, "--trials must be at least 1"),
        ({"jobs": 0}, "--jobs must be at least 1"),
        ({"prune_confidence": 1.0}, "--prune-confidence must be from 0.5 to below 1, got 1"),
        ({"prune_confidence": 0.05}, "--prune-confidence must be from 0.5 to below 1, got 0.05"),
        ({"proxy": replace(TINY, proxy="distil")}, "unknown proxy 'distil'; did you mean 'distill'[?] known: .*params"),
        ({"confidence": 0.2}, "confidence must be between"),
        ({"resolution_px": 100}, "resolution 100 px must be a positive multiple of 16"),
        ({"space": "snapgen_unet", "budget": "300ms@iphone"}, "spent before the first denoiser call"),
        ({"steps": 3}, "--steps has no effect on 9ms/step@iphone"),
        ({"decoder": "taesd", "text_encoders": ()}, "--decoder, --text-encoders has no effect"),
        ({"budget": "1s@iphone", "decoder": "taess"}, "unknown decoder 'taess'; did you mean 'taesd'"),
        ({"budget": "1s@iphone", "text_encoders": ("clip",)}, "unknown text encoder 'clip'; did you mean 'clip-l'"),
        ({"budget": "1s@iphone", "steps": 0}, "steps must be at least 1, got 0"),
        ({"space": "decoder"}, "space decoder cannot be searched: a decoder has no small copy"),
        ({"space": "decoder", "budget": "1s@iphone"}, "space decoder cannot be searched"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_done(settings, change, said):
    with pytest.raises(UsageError, match=said):
        plan_search(replace(settings, **change))


def test_fixed_parts_without_a_row_for_the_resolution_are_refused_not_guessed(settings):
    with pytest.raises(NasError, match=r"no latency of 'snapgen-text-encoders' at 128 px \(it has one at 1024 px\)"):
        plan_search(replace(settings, budget="1.4s@iphone"))


def test_another_pipeline_is_another_study(settings):
    one = replace(settings, budget="1s@iphone", decoder="taesd", text_encoders=("clip-l",))
    plans = [plan_search(replace(one, **change)) for change in ({}, {"steps": 8}, {"guidance": True})]
    plans += [plan_search(replace(one, **change)) for change in ({"decoder": "sd-vae"}, {"text_encoders": ()})]
    identities = [json.dumps(plan.identity(), sort_keys=True) for plan in plans]
    assert len(set(identities)) == len(plans)
    assert plans[0].identity() == plan_search(one).identity()
    assert plans[0].identity()["pipeline"] == {
        "steps": 4,
        "guidance": False,
        "text_encoders": ["clip-l"],
        "decoder": "taesd",
    }
    assert plan_search(settings).identity()["pipeline"] is None
    found = preview(plans[1])["pipeline"]
    assert (found["steps"], found["calls"], found["decoder"]) == (8, 8, "taesd")
    assert [part["basis"] for part in found["parts"]] == ["predicted", "predicted"]
    for part in found["parts"]:
        assert part["low_ms"] < part["ms"] < part["high_ms"]
    assert "steps = 8" in found["source"]


def test_pruning_and_the_proxy_decide_which_study_it_is(settings):
    plans = [
        plan_search(replace(settings, **change))
        for change in ({}, {"prune": False}, {"prune_confidence": 0.9}, {"proxy": settings_of("params")})
    ]
    assert [plan.prune for plan in plans] == [0.95, None, 0.9, 0.95]
    assert len({json.dumps(plan.identity(), sort_keys=True) for plan in plans}) == 4


def test_counts_of_what_was_stopped_and_what_could_not_be_trained(settings):
    plan = plan_search(settings)
    priced = plan.evaluator.price([plan.evaluator.space.reference("known")])[0]
    found = [
        Trial(number=0, state="stopped", evaluation=replace(priced, seconds=2.0), round=1, saved_s=6.0),
        Trial(number=1, state="stopped", evaluation=replace(priced, seconds=1.5), round=1, saved_s=0.5),
        Trial(number=2, state="infeasible", evaluation=priced),
        Trial(number=3, state="infeasible", evaluation=priced, round=2, cause="out of memory"),
        Trial(number=4, state="failed", evaluation=priced, round=2),
    ]
    stopping = search._stopping(plan, found)
    assert (stopping["confidence"], stopping["stopped"], stopping["spent_s"], stopping["saved_s"]) == (
        0.95,
        2,
        3.5,
        6.5,
    )
    reasons = {"latency bound over the budget": 1, "out of memory": 1, "proxy run failed": 1}
    assert search._reasons(found) == reasons
    assert search._reasons([]) == {"latency bound over the budget": 0}


@pytest.mark.slow
def test_a_search_by_a_proxy_that_trains_nothing(settings):
    """Another unit, no text part, no curve: from the record to the page."""
    found = run_search(replace(settings, proxy=settings_of("params", steps=1, batch=2, held_rows=8), trials=3))
    record = read_study(found.folder)
    assert record["proxy"]["proxy"] == "params"
    unit = record["proxy"]["unit"]
    assert (unit, record["hypervolume"]["unit"]) == (proxy("params").UNIT, f"s·{unit}")
    assert record["stopping"] | {"basis": ""} == {
        "confidence": 0.95, "stopped": 0, "spent_s": 0.0, "saved_s": 0.0, "basis": "",
    }  # fmt: skip
    assert record["hypervolume"]["values"][-1] > 0
    assert "text is not judged by this proxy" in record["recommended"]["why"]
    assert " dB" not in record["recommended"]["why"]
    page = build_report(found.folder).read_text()
    body = page[page.index("<body>") :]
    assert f"quality: score of params ({unit})" in body
    assert "text part" not in body.split("<h2>The quality proxy")[0].split('id="proxy"')[0]
    assert found.to_json()["proxy"] == {"name": "params", "unit": unit}


def test_a_missing_teacher_file_is_one_sentence(settings):
    plan = plan_search(replace(settings, teacher="nowhere.safetensors"))
    with pytest.raises(NasError, match=r"nowhere\.safetensors does not exist"):
        plan.identity()


def test_an_unreachable_budget_costs_no_proxy_run(settings, monkeypatch):
    monkeypatch.setattr(quality, "prepare", lambda *_: pytest.fail("the teacher was asked"))
    with pytest.raises(UsageError, match="no candidate of toy meets"):
        run_search(replace(settings, budget="0.01ms/step@iphone"))


def test_the_preview_prices_without_running(settings):
    found = preview(plan_search(settings))
    assert 0 < found["feasible_share"] <= 1
    assert found["pipeline"]["parts"] == []
    assert [r["source"] for r in found["references"]] == ["reference:known"]


def test_the_same_search_finds_its_folder_and_another_gets_its_own(settings, tmp_path):
    plan = plan_search(settings)
    first = study_folder(settings, plan)
    (first / "journal.log").write_text("")
    assert study_folder(settings, plan) == first
    other = replace(plan, seed=9)
    assert study_folder(settings, other) != first
    assert study_folder(replace(settings, fresh=True), plan) != first
    assert first.parent == (tmp_path / "reports").relative_to(tmp_path)


@pytest.mark.slow
def test_a_whole_search_writes_a_study_that_the_next_stages_read(settings):
    heard = []
    found = run_search(settings, lambda stage, done, total, note: heard.append((stage, done, total)))
    record = read_study(found.folder)
    assert record["finished"]
    assert record["trials"]["proxied"] == 4
    assert ("search", 4, 4) in heard
    assert json.loads(json.dumps(found.to_json()))["trials"] == 4
    frame = pd.read_csv(found.folder / "trials.csv", keep_default_na=False)
    assert (frame["state"] == "proxied").sum() == 4
    assert set(found.to_json()["front"][0]) >= {"key", "quality", "quality_sd", "latency_low_ms", "macs"}
    blocks = pd.read_csv(found.folder / "blocks.csv")
    assert blocks.groupby("key")["share"].sum().to_numpy() == pytest.approx(1.0)
    assert candidate_of(str(found.folder))[1].key == record["recommended"]["key"]
    assert build_report(found.folder).stat().st_size > 100_000
    again = run_search(settings)
    assert again.folder == found.folder
    assert again.record["trials"] == record["trials"]
