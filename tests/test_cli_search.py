"""`nas search` on the command line: which proxy and when to stop, and what is printed of it at the end."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from synthetic_study import make_study

from nas.cli import main
from nas.evaluate import Evaluation, Limits
from nas.proxies import settings_of
from nas.search import SearchResult

SEARCH = ("search", "--space", "snapgen_unet", "--budget", "1.4s@iphone")


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """Runs the command with a search that answers with a made-up record; gives what it printed and was asked."""
    folder = make_study(tmp_path / "reports" / "one")
    base = json.loads((folder / "study.json").read_text())
    base["trials"] |= {"stopped": 0, "forbidden": 2, "reused": 0}
    base["budget"] |= {"text": "1.4s@iphone"}
    base |= {"budgets": [base["budget"]], "limits": {}, "sampler": "front", "reuse": None, "changed": []}
    base |= {"rejected": {"1.4s@iphone": 0.5}, "rejected_alone": {"1.4s@iphone": 0.5}}
    base["proxy"] |= {"proxy": "distill", "unit": "dB", "because": "asked for"}
    base["stopping"] = {"confidence": 0.95, "stopped": 0, "spent_s": 0.0, "saved_s": 0.0, "basis": "estimate"}
    base["fidelity"] = None
    heard = SimpleNamespace(asked=None)

    def go(capsys, *options, front=(), **changes):
        def run_search(settings, progress):
            heard.asked = settings
            return SearchResult(folder=folder, record={**base, **changes}, front=list(front))

        monkeypatch.setattr("nas.search.run_search", run_search)
        monkeypatch.setattr("nas.cli.search._build_report", lambda folder: folder / "index.html")
        assert main([*SEARCH, *options]) == 0
        return capsys.readouterr().out

    go.heard = heard
    return go


def test_what_was_stopped_is_printed_with_what_it_saved(searched, capsys):
    stopping = {"confidence": 0.95, "stopped": 3, "spent_s": 9.0, "saved_s": 14.2, "basis": "estimate"}
    assert "3 stopped early, 14 s of proxy time saved (estimate)" in searched(capsys, stopping=stopping).splitlines()
    assert "stopped early" not in searched(capsys)


def test_infeasible_is_told_apart_by_cause(searched, capsys):
    infeasible = {"share_of_space": 0.5, "sampled": 1, "reasons": {"latency bound over 1.4s@iphone": 4}}
    assert "were infeasible, 2 against a rule" in searched(capsys, infeasible=infeasible)
    infeasible["reasons"] |= {"training diverged": 2, "out of memory": 1, "proxy run failed": 1}
    said = "were infeasible (4 latency bound over 1.4s@iphone, 2 training diverged, 1 out of memory), 2 against"
    assert said in searched(capsys, infeasible=infeasible)
    infeasible["reasons"] = {"latency bound over 1.4s@iphone": 0, "training diverged": 2}
    assert "were infeasible (2 training diverged)," in searched(capsys, infeasible=infeasible)


def test_the_card_of_the_proxy_is_printed_or_that_there_is_none(searched, capsys):
    none = searched(capsys)
    assert "proxy distill (asked for): never tested on snapgen_unet with this teacher" in none
    assert "nas fidelity --space snapgen_unet\n" in none
    other = searched(capsys, teacher="mine.safetensors")
    assert "nas fidelity --space snapgen_unet --teacher mine.safetensors\n" in other
    card = {"space": "snapgen_unet", "note": "48 candidates, Kendall 0.8."}
    assert "proxy distill (asked for): 48 candidates, Kendall 0.8.\n" in searched(capsys, fidelity=card)
    elsewhere = searched(capsys, fidelity={**card, "space": "sd_unet"})
    assert "tested on sd_unet but never on snapgen_unet (nas fidelity --space snapgen_unet): 48" in elsewhere


def test_the_unit_of_the_proxy_is_printed(searched, capsys):
    out = searched(capsys, proxy={"proxy": "params", "unit": "log10", "because": "asked for"})
    assert "quality log10" in out
    assert " dB" not in out.split("snapgen-", 1)[0].split("reference", 1)[0]


def test_the_options_reach_the_search(searched, capsys):
    searched(capsys)
    asked = searched.heard.asked
    assert (asked.proxy, asked.prune, asked.prune_confidence) == (None, True, 0.95)
    searched(capsys, "--proxy", "params", "--no-prune")
    assert searched.heard.asked.proxy == settings_of("params")
    assert searched.heard.asked.prune is False
    searched(capsys, "--prune-confidence", "0.9")
    assert searched.heard.asked.prune_confidence == 0.9


def test_budgets_limits_and_where_it_runs_reach_the_search(searched, capsys):
    searched(capsys)
    asked = searched.heard.asked
    assert (asked.budgets, asked.limits, asked.trials, asked.sampler) == (("1.4s@iphone",), Limits(), 60, "front")
    assert (asked.reuse, asked.storage, asked.ray) == (True, None, None)
    searched(
        capsys, "--budget", "40ms/step@iphone-13", "--max-params", "400M", "--max-memory", "1.2GB",
        "--max-size", "1GiB", "--sampler", "tpe", "--no-reuse",
        "--storage", "sqlite:///a.db", "--ray", "auto", "--cpus-per-proxy", "2",
        "--gpus-per-proxy", "0.5", "--trials", "7",
    )  # fmt: skip
    asked = searched.heard.asked
    assert asked.budgets == ("1.4s@iphone", "40ms/step@iphone-13")
    assert asked.limits == Limits(max_params=400_000_000, max_memory_bytes=1_200_000_000, max_weight_bytes=2**30)
    assert (asked.sampler, asked.reuse, asked.storage, asked.trials) == ("tpe", False, "sqlite:///a.db", 7)
    assert (asked.ray, asked.cpus_per_proxy, asked.gpus_per_proxy) == ("auto", 2.0, 0.5)


def test_a_malformed_limit_is_a_usage_error(capsys):
    assert main([*SEARCH, "--max-memory", "1.2"]) == 2
    assert "--max-memory '1.2' is not a size such as 1.2GB" in capsys.readouterr().err


def test_what_was_reused_and_changed_is_told(searched, capsys):
    reuse = {"available": 12, "used": 11, "seconds_saved": 75.4}
    said = "11 kept scores of earlier studies reused, which took 1 min 15 s of proxy time"
    assert said in searched(capsys, reuse=reuse).splitlines()
    assert "kept scores" not in searched(capsys, reuse={"available": 0, "used": 0, "seconds_saved": 0.0})


def test_what_changed_in_a_study_is_told_beside_the_answer(searched, capsys, monkeypatch):
    heard = []
    monkeypatch.setattr("nas.cli.search.note", heard.append)
    searched(capsys, changed=["budgets was ['1s@iphone'], is now ['1.4s@iphone']"])
    assert "the study went on under other terms: budgets was ['1s@iphone'], is now ['1.4s@iphone']" in heard


def test_every_constraint_is_told_with_what_it_rejects(searched, capsys):
    assert "no other does" not in searched(capsys)
    assert "of the space is over the budget at confidence" in searched(capsys)
    rejected = {"1.4s@iphone": 0.439, "--max-params 400M": 0.258}
    alone = {"1.4s@iphone": 0.2, "--max-params 400M": 0.056}
    out = searched(capsys, rejected=rejected, rejected_alone=alone)
    assert "of the space breaks a budget or limit at confidence" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["1.4s@iphone", "43.9%", "20.0%"] in lines
    assert ["--max-params", "400M", "25.8%", "5.6%"] in lines


def test_the_front_has_the_latency_on_every_device(searched, capsys):
    there = {"latency_ms": 2345.6, "latency_low_ms": 1.0, "latency_high_ms": 1.0, "meets_budget_probability": 1.0}
    member = Evaluation(
        key="abc", choices={}, params=1, macs=1, weight_bytes=1, peak_activation_bytes=1, step_ms=1.0, latency_ms=1.0,
        latency_low_ms=1.0, latency_high_ms=1.0, meets_budget_probability=1.0, feasible=True, reason="",
        source="search", quality=3.0, quality_sd=0.1, others={"iphone-13": there},
    )  # fmt: skip
    first = {"text": "1.4s@iphone", "alias": "iphone", "confidence": 0.8, "per_step": True}
    budgets = [first, {**first, "text": "3s@iphone-13", "alias": "iphone-13"}]
    out = searched(capsys, front=[member], budgets=budgets)
    assert "ms on iphone-13" in out
    assert next(line for line in out.splitlines() if line.startswith("abc")).endswith("2346")


def test_an_unknown_proxy_is_refused_with_the_list(capsys):
    assert main([*SEARCH, "--proxy", "distil"]) == 2
    assert "unknown proxy 'distil'; did you mean 'distill'? known: " in capsys.readouterr().err
