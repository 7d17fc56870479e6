"""`nas search` from settings to files: every check before the first proxy run, and one whole search on a toy space."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nas import quality, search
from nas.errors import NasError, UsageError
from nas.evaluate import Limits
from nas.proxies import Score, proxy, settings_of
from nas.quality import ProxySettings
from nas.record import Trial, candidate_of, read_study
from nas.report import build_report
from nas.scores import StoredScore
from nas.search import SearchSettings, plan_search, preview, run_search, study_folder, writing
from tests.toy_space import write_space

TINY = ProxySettings(steps=3, batch=8, seeds=(0, 1), held_rows=64)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr("nas.scores.cache_dir", lambda *parts: kept)
    return SearchSettings(space=str(write_space(tmp_path)), budgets=("9ms/step@iphone",), trials=4, jobs=1, proxy=TINY)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"space": "snapgen_unett"}, "did you mean 'snapgen_unet'"),
        ({"budgets": ("1.4s@iphon",)}, "did you mean 'iphone'"),
        ({"budgets": ("1.4@iphone",)}, "TIME@DEVICE"),
        ({"trials": -1}, "--trials must be at least 0"),
        ({"trials": 0}, "--trials 0 re-prices kept scores, and none are kept of toy with these proxy settings"),
        ({"trials": 0, "reuse": False}, "--trials must be at least 1, got 0"),
        (
            {"sampler": "frontt"},
            "unknown sampler 'frontt'; did you mean 'front'[?] known: front, gp, nsga2, random, tpe",
        ),
        ({"budgets": ()}, "at least one budget"),
        (
            {"budgets": ("9ms/step@iphone", "8ms/step@iphone-16-pro")},
            "9ms/step@iphone and 8ms/step@iphone-16-pro are budgets of one device, iphone-16-pro-max--coreml--fp16",
        ),
        ({"budgets": ("9ms/step@iphone", "1s@iphone-31")}, "unknown device 'iphone-31'"),
        ({"ray": "auto", "cpus_per_proxy": 0.0}, "a proxy run needs CPUs or GPUs"),
        ({"jobs": 0}, "--jobs must be at least 1"),
        ({"prune_confidence": 1.0}, "--prune-confidence must be from 0.5 to below 1, got 1"),
        ({"prune_confidence": 0.05}, "--prune-confidence must be from 0.5 to below 1, got 0.05"),
        ({"proxy": replace(TINY, proxy="distil")}, "unknown proxy 'distil'; did you mean 'distill'[?] known: .*params"),
        ({"confidence": 0.2}, "confidence must be between"),
        ({"resolution_px": 100}, "resolution 100 px must be a positive multiple of 16"),
        ({"space": "snapgen_unet", "budgets": ("300ms@iphone",)}, "spent before the first denoiser call"),
        ({"steps": 3}, "--steps has no effect on 9ms/step@iphone"),
        ({"decoder": "taesd", "text_encoders": ()}, "--decoder, --text-encoders has no effect"),
        (
            {"steps": 3, "budgets": ("9ms/step@iphone", "20ms/step@iphone-13")},
            "--steps has no effect on 9ms/step@iphone and 20ms/step@iphone-13, budgets for one denoiser call",
        ),
        ({"budgets": ("1s@iphone",), "decoder": "taess"}, "unknown decoder 'taess'; did you mean 'taesd'"),
        ({"budgets": ("1s@iphone",), "text_encoders": ("clip",)}, "unknown text encoder 'clip'; did you mean 'clip-l'"),
        ({"budgets": ("1s@iphone",), "steps": 0}, "steps must be at least 1, got 0"),
        ({"space": "decoder"}, "space decoder cannot be searched: a decoder has no small copy"),
        ({"space": "decoder", "budgets": ("1s@iphone",)}, "space decoder cannot be searched"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_done(settings, change, said):
    with pytest.raises(UsageError, match=said):
        plan_search(replace(settings, **change))


def test_fixed_parts_without_a_row_for_the_resolution_are_refused_not_guessed(settings):
    with pytest.raises(NasError, match=r"no latency of 'snapgen-text-encoders' at 128 px \(it has one at 1024 px\)"):
        plan_search(replace(settings, budgets=("1.4s@iphone",)))


def test_another_pipeline_is_another_study(settings):
    one = replace(settings, budgets=("1s@iphone",), decoder="taesd", text_encoders=("clip-l",))
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
    plan = plan_search(replace(settings, limits=Limits(max_params=5)))
    priced = plan.evaluator.price([plan.evaluator.space.reference("known")])[0]
    both = (plan.evaluator.constraints[0].name, plan.evaluator.constraints[1].name)
    found = [
        Trial(number=0, state="stopped", evaluation=replace(priced, seconds=2.0), round=1, saved_s=6.0),
        Trial(number=1, state="stopped", evaluation=replace(priced, seconds=1.5), round=1, saved_s=0.5),
        Trial(number=2, state="infeasible", evaluation=replace(priced, violated=both[:1])),
        Trial(number=3, state="infeasible", evaluation=replace(priced, violated=both)),
        Trial(number=4, state="infeasible", evaluation=priced, round=2, cause="out of memory"),
        Trial(number=5, state="failed", evaluation=priced, round=2),
        Trial(number=6, state="proxied", evaluation=replace(priced, source="reused")),
    ]
    stopping = writing.stopping(plan, found)
    assert (stopping["confidence"], stopping["stopped"], stopping["spent_s"], stopping["saved_s"]) == (
        0.95,
        2,
        3.5,
        6.5,
    )
    assert writing.reasons(found, plan.evaluator) == {
        "latency bound over 9ms/step@iphone": 2,
        "over --max-params 5": 1,
        "out of memory": 1,
        "proxy run failed": 1,
    }
    assert writing.reasons([], plan.evaluator) == {"latency bound over 9ms/step@iphone": 0}
    assert writing._counts(found, 2) == {
        "asked": 8, "proxied": 0, "stopped": 2, "infeasible": 3, "duplicates": 0, "failed": 1, "forbidden": 2,
        "reused": 1,
    }  # fmt: skip


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
    with pytest.raises(NasError, match=r"nowhere\.safetensors does not exist"):
        plan_search(replace(settings, teacher="nowhere.safetensors"))


def test_an_unreachable_budget_costs_no_proxy_run(settings, monkeypatch):
    monkeypatch.setattr(quality, "prepare", lambda *_: pytest.fail("the teacher was asked"))
    with pytest.raises(UsageError, match="no candidate of toy meets"):
        run_search(replace(settings, budgets=("0.01ms/step@iphone",)))


def test_a_limit_that_nothing_meets_costs_no_proxy_run(settings, monkeypatch):
    monkeypatch.setattr(quality, "prepare", lambda *_: pytest.fail("the teacher was asked"))
    with pytest.raises(UsageError, match="no candidate of toy meets --max-params 5: the least found"):
        run_search(replace(settings, limits=Limits(max_params=5)))


def test_the_preview_prices_without_running(settings):
    found = preview(plan_search(settings))
    assert 0 < found["feasible_share"] <= 1
    assert found["pipeline"]["parts"] == []
    assert [r["source"] for r in found["references"]] == ["reference:known"]
    assert found["reuse"] == {"available": 0, "feasible": 0}
    assert preview(plan_search(replace(settings, reuse=False)))["reuse"] is None


def test_the_preview_tells_what_each_constraint_rejects_and_what_would_be_reused(settings):
    plan = plan_search(replace(settings, budgets=("9ms/step@iphone", "1s@iphone-13"), text_encoders=()))
    everything = plan.evaluator.price(list(plan.evaluator.space.enumerate()))
    params = sorted(e.params for e in everything)[len(everything) // 2]
    limits = Limits(max_params=params)
    asked = replace(settings, budgets=("9ms/step@iphone", "1s@iphone-13"), text_encoders=(), limits=limits)
    plan = plan_search(asked)
    for row in plan.evaluator.space.sample(5, 1):
        candidate = plan.evaluator.space.from_row(row)
        plan.scores.keep(candidate, StoredScore(row=candidate.row, score=Score(value=1.0)))
    found = preview(plan)
    assert [budget["text"] for budget in found["budgets"]] == ["9ms/step@iphone", "1s@iphone-13"]
    assert found["budget"] == found["budgets"][0]
    assert found["limits"] == {"max_params": params, "max_memory_bytes": None, "max_weight_bytes": None}
    assert list(found["rejected"]) == [each.name for each in plan.evaluator.constraints]
    assert found["rejected"][plan.evaluator.constraints[2].name] == pytest.approx(
        np.mean([e.params > params for e in everything])
    )
    assert all(found["rejected_alone"][name] <= share for name, share in found["rejected"].items())
    fitting = [
        plan.evaluator.price([plan.evaluator.space.from_row(row)])[0].feasible
        for row in plan.evaluator.space.sample(5, 1)
    ]
    assert found["reuse"] == {"available": 5, "feasible": sum(fitting)}
    assert json.loads(json.dumps(found))["rejected"] == found["rejected"]


def test_the_settings_reach_another_machine_whole(settings):
    asked = replace(
        settings,
        limits=Limits(max_params=10**9),
        text_encoders=("clip-l",),
        budgets=("1s@iphone", "20ms/step@iphone-13"),
        decoder="taesd",
        prune=False,
        storage="postgresql://me:secret@host/db",
    )
    sent = json.loads(json.dumps(asked.to_json()))
    assert "secret" not in json.dumps(sent)
    assert not {"jobs", "out", "ray", "storage"} & set(sent)
    joined = SearchSettings.from_json(sent, jobs=7, storage=asked.storage)
    assert joined == replace(asked, jobs=7)
    assert plan_search(joined).identity() == plan_search(asked).identity()
    assert plan_search(asked).settings == asked.to_json()
    assert SearchSettings.from_json({**sent, "of a newer version": 1}).budgets == asked.budgets


def test_the_same_search_finds_its_folder_and_another_gets_its_own(settings, tmp_path):
    plan = plan_search(settings)
    first = study_folder(settings, plan)
    assert study_folder(settings, plan) != first  # nobody began a study there
    (first / "identity.json").write_text(json.dumps(search._identity(plan)))
    assert study_folder(settings, plan) != first  # a record without its journal, as a clone has it
    (first / "journal.log").touch()
    assert study_folder(settings, plan) == first
    assert study_folder(replace(settings, trials=9), replace(plan, trials=9)) == first
    for other in ({"seed": 9}, {"storage": "sqlite:///other.db"}, {"sampler": "tpe"}):
        assert study_folder(settings, replace(plan, **other)) != first
    tighter = replace(settings, budgets=("8ms/step@iphone",))
    assert study_folder(tighter, plan_search(tighter)) != first
    assert study_folder(replace(settings, fresh=True), plan) != first
    assert first.parent == (tmp_path / "reports").relative_to(tmp_path)


def test_a_fresh_start_drops_the_journal_but_empties_no_shared_storage(settings, tmp_path):
    asked = replace(settings, out=tmp_path / "out")
    folder = study_folder(asked, plan_search(asked))
    for name in ("journal.log", "identity.json", "kept.txt"):
        (folder / name).write_text("")
    assert study_folder(asked, plan_search(asked)) == folder
    assert (folder / "journal.log").is_file()
    shared = replace(asked, fresh=True, storage="postgresql://me:secret@host/db")
    with pytest.raises(UsageError, match=r"--fresh cannot empty postgresql://me:[*]+@host/db"):
        study_folder(shared, plan_search(shared))
    study_folder(replace(asked, fresh=True), plan_search(asked))
    assert sorted(path.name for path in folder.iterdir()) == ["kept.txt"]


def test_a_record_without_its_journal_is_not_overwritten(settings, tmp_path):
    asked = replace(settings, out=tmp_path / "out")
    folder = study_folder(asked, plan_search(asked))
    (folder / "study.json").write_text("{}")
    with pytest.raises(UsageError, match="out holds the record of a search without its journal"):
        study_folder(asked, plan_search(asked))
    for sound in ({"fresh": True}, {"storage": "sqlite:///elsewhere.db"}):
        assert study_folder(replace(asked, **sound), plan_search(asked)) == folder


def scored_rows(found):
    frame = pd.read_csv(found.folder / "trials.csv", dtype={"key": str})
    return frame[frame["state"] == "proxied"].to_dict("records")


FREE = settings_of("params", steps=1, batch=2, held_rows=8)


@pytest.mark.slow
def test_a_second_search_for_another_device_re_prices_and_runs_nothing(settings):
    first = run_search(replace(settings, proxy=FREE, trials=6, out=Path("first")))
    assert first.record["reuse"] == {"available": 0, "used": 0, "seconds_saved": 0.0}
    other = replace(settings, proxy=FREE, trials=0, budgets=("20ms/step@iphone-13",), out=Path("second"))
    second = run_search(other)
    assert second.record["trials"]["proxied"] == 0
    assert second.record["trials"]["reused"] == second.record["reuse"]["used"] == 6
    assert second.front
    assert second.record["target"].startswith("iphone-13")
    mine, theirs = (pd.read_csv(each.folder / "trials.csv", dtype={"key": str}) for each in (first, second))
    scored = mine[mine["state"] == "proxied"].set_index("key")
    again = theirs.set_index("key")
    assert set(again["source"]) == {"reused"}
    assert again["quality"].to_dict() == scored["quality"].to_dict()
    assert (again["latency_ms"] > scored["latency_ms"].loc[again.index]).all()
    alone = run_search(replace(other, trials=2, reuse=False, out=Path("alone")))
    assert (alone.record["reuse"], alone.record["trials"]["reused"]) == (None, 0)
    more = run_search(replace(other, trials=2))
    assert (more.record["trials"]["proxied"], more.record["trials"]["reused"]) == (2, 6)


@pytest.mark.slow
def test_a_study_goes_on_under_another_budget_and_refuses_another_proxy(settings):
    first = run_search(replace(settings, proxy=FREE, trials=4, reuse=False, out=Path("one")))
    slowest = max(first.front, key=lambda e: e.latency_ms)
    budget = f"{slowest.latency_high_ms - 0.001:.3f}ms/step@iphone"
    asked = replace(
        settings, proxy=FREE, trials=4, reuse=False, out=Path("one"), budgets=(budget, "30ms/step@iphone-13")
    )
    heard = []
    second = run_search(asked, lambda stage, done, total, note: heard.append(note))
    assert second.record["trials"]["proxied"] == 4
    said = "\n".join(second.record["changed"])
    assert "budgets was ['9ms/step@iphone'], is now" in said
    assert any("the study goes on under other terms: budgets was" in note for note in heard)
    assert slowest.key in {e.key for e in first.front}
    assert slowest.key not in {e.key for e in second.front}
    assert all(e.others["iphone-13"]["latency_high_ms"] <= 30 for e in second.front)
    back = run_search(replace(settings, proxy=FREE, trials=5, reuse=False, out=Path("one")))
    assert back.record["trials"]["proxied"] == 5
    assert slowest.key in {row["key"] for row in scored_rows(back) if row["feasible"]}
    with pytest.raises(NasError, match=r"proxy was .* cannot be compared"):
        run_search(replace(asked, proxy=settings_of("macs", steps=1, batch=2, held_rows=8)))


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
