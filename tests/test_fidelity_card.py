"""nas.fidelity.card: what a test's figures are turned into."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from nas import quality
from nas.bench import ProxySettings
from nas.cli.fidelity import card_lines
from nas.fidelity import Compared, Truth, card
from nas.fidelity.card import CARE, TRUSTED, UNPROVEN
from nas.report import cards


def compared(noise: float, cost_noise: float = 3.0, count: int = 40) -> Compared:
    """Scores and costs that follow the truth as closely as is asked."""
    generator = np.random.default_rng(1)
    clean = generator.normal(3, 0.4, count)
    second = 0.02 * math.sqrt(2)  # of a pair this far apart the standard deviation is 0.02
    twice = [(v, v + second) if i % 3 == 0 else (v,) for i, v in enumerate(clean.tolist())]
    truth = Truth(runs=tuple(twice), latency_ms=np.exp(generator.uniform(4, 6, count)))
    return Compared(
        space="mine",
        settings=ProxySettings(steps=12),
        long_steps=120,
        quality=truth,
        text=replace(truth, runs=tuple(tuple(v / 4 for v in each) for each in truth.runs)),
        scores=clean + generator.normal(0, 0.4 * noise, count),
        texts=clean + generator.normal(0, 8, count),
        costs={name: clean + generator.normal(0, 0.4 * cost_noise, count) for name in ("parameters", "MACs")},
        seconds=4.25,
    )


def test_a_score_that_ranks_is_trusted_and_says_so():
    found = card(compared(0.2), "digest", plateau={"second_half_gain_db": 0.5, "kendall_half_way": 0.8})
    assert found["verdict"] == TRUSTED
    assert "40 candidates of mine were trained for 120 steps" in found["note"]
    assert "ranks better than parameters or MACs, beyond chance" in found["note"]
    assert "not shown to judge how well captions" in found["text_note"]
    ours, params, _ = found["agreement"]
    assert ours["kendall_low"] < ours["kendall"] < ours["kendall_high"]
    assert ours["within_band"] > params["within_band"]
    gap = found["agreement_above"][0]
    assert gap["within_band"] == pytest.approx(ours["within_band"] - params["within_band"], abs=2e-3)
    assert found["reliability"]["trained_twice"] == 14
    assert found["reliability"]["seed_sd"] == pytest.approx(0.02)


def test_a_score_no_better_than_size_is_used_with_care():
    found = card(compared(0.4, cost_noise=0.4), "digest")
    assert found["verdict"] == CARE
    assert "not shown to rank better than parameters or MACs" in found["note"]


def test_chance_is_not_trusted():
    found = card(compared(60), "digest")
    assert found["verdict"] == UNPROVEN
    assert "do not choose by it" in found["note"]


def test_failed_scores_are_counted_and_the_record_is_json():
    some = compared(0.2)
    scores = some.scores.copy()
    scores[:2] = math.nan
    found = card(replace(some, scores=scores, texts=None), "digest")
    assert found["not_scored"] == 2
    assert found["text_agreement"][0]["predictor"] == "proxy score, which has no text part"
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_searches_find_the_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NAS_DATA", str(tmp_path))
    monkeypatch.setattr(quality, "teacher_hash", lambda teacher: "digest")
    some = compared(0.2)
    assert quality.fidelity(some.settings, "embedded", "mine") is None
    (tmp_path / "reports" / "proxy").mkdir(parents=True)
    made = card(some, "digest")
    (tmp_path / "reports" / "proxy" / "card-mine-distill.json").write_text(json.dumps(made))
    assert quality.fidelity(some.settings, "embedded", "mine") == made
    assert made["proxy"] == json.loads(json.dumps(asdict(some.settings)))


def test_the_words_of_a_card():
    plateau = {"second_half_gain_db": 0.5, "kendall_half_way": 0.8}
    lines = "\n".join(card_lines(card(compared(0.2), "digest", plateau=plateau, not_trained=1)))
    for words in (
        "quality: proxy score",
        "quality: MACs",
        "text: proxy text score",
        "right within 15% of latency",
        "differ by 0.02 dB between seeds",
        "still gained 0.50 dB",
        "left out: 1",
        "verdict: may be trusted; 4.2 s of one thread",
    ):
        assert words in lines


def test_the_study_page_shows_the_card():
    found = card(compared(0.2), "digest")
    shown = cards._fidelity(found, "mine")
    ours, text = found["agreement"][0], found["text_agreement"][0]
    assert "<b>May be trusted.</b> 40 candidates of mine" in shown
    for row in (ours, text):
        for name in ("within_band", "kendall"):
            value, low, high = (f"{row[name + end]:.2f}".replace("-", "−") for end in ("", "_low", "_high"))
            assert f"{value} ({low} to {high})" in shown
    assert "proxy text score" in shown
    assert "nobody has measured it" not in shown
    assert "measured on the space mine; on this one nobody has measured it" in cards._fidelity(found, "another")


def test_the_study_page_says_when_there_is_no_card_and_still_shows_an_old_one():
    assert "Not measured for these settings" in cards._fidelity(None, "mine")
    old = {"note": "12 diverse candidates, scored against a run ten times longer.", "kendall": {"short score": 0.64}}
    assert "12 diverse candidates" in cards._fidelity(old, "mine")
    assert "0.64" in cards._fidelity(old, "mine")
