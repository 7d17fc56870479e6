"""`nas search` on the command line: which proxy and when to stop, and what is printed of it at the end."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from synthetic_study import make_study

from nas.cli import main
from nas.proxies import settings_of
from nas.search import SearchResult

SEARCH = ("search", "--space", "snapgen_unet", "--budget", "1.4s@iphone")


@pytest.fixture
def searched(tmp_path, monkeypatch):
    """Runs the command with a search that answers with a made-up record; gives what it printed and was asked."""
    folder = make_study(tmp_path / "reports" / "one")
    base = json.loads((folder / "study.json").read_text())
    base["trials"] |= {"stopped": 0, "forbidden": 2}
    base["proxy"] |= {"proxy": "distill", "unit": "dB", "because": "asked for"}
    base["stopping"] = {"confidence": 0.95, "stopped": 0, "spent_s": 0.0, "saved_s": 0.0, "basis": "estimate"}
    base["fidelity"] = None
    heard = SimpleNamespace(asked=None)

    def go(capsys, *options, **changes):
        def run_search(settings, progress):
            heard.asked = settings
            return SearchResult(folder=folder, record={**base, **changes}, front=[])

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
    infeasible = {"share_of_space": 0.5, "sampled": 1, "reasons": {"latency bound over the budget": 4}}
    assert "were infeasible, 2 against a rule" in searched(capsys, infeasible=infeasible)
    infeasible["reasons"] |= {"training diverged": 2, "out of memory": 1, "proxy run failed": 1}
    said = "were infeasible (4 latency bound over the budget, 2 training diverged, 1 out of memory), 2 against"
    assert said in searched(capsys, infeasible=infeasible)
    infeasible["reasons"] = {"latency bound over the budget": 0, "training diverged": 2}
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


def test_an_unknown_proxy_is_refused_with_the_list(capsys):
    assert main([*SEARCH, "--proxy", "distil"]) == 2
    assert "unknown proxy 'distil'; did you mean 'distill'? known: " in capsys.readouterr().err
