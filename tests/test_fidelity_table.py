"""benchmarks/proxy_table.py: which rows it scores, what it reads off a run, and what it writes."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from nas.fidelity import Table, tau
from nas.space import load_space

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import _proxy_report as report  # noqa: E402
import proxy_table  # noqa: E402

SPACES = {"snapgen_unet": 12, "sd_unet": 8}


@pytest.fixture
def truth(tmp_path) -> Path:
    """A truth table of both groups of spaces, with a stray row of other settings."""
    generator = np.random.default_rng(0)
    table = Table(tmp_path / "truth.csv", "most", ("space", "key", "seed"))
    for name, count in SPACES.items():
        space = load_space(name)
        for i, row in enumerate(space.sample(count, 1)):
            candidate = space.from_row(row)
            common = {"space": name, "space_hash": space.hash, "key": candidate.key}
            common |= {
                "choices": json.dumps(candidate.choices),
                "params": 7 * i % count + 1,
                "macs": 100 - i,
                "steps": 120,
            }
            common |= {"iphone_step_ms": 100 + 3 * (5 * i % count), "cpu_step_ms": 1000}
            for seed in (100, 101)[: 2 if i % 3 == 0 else 1]:
                found = {"quality_db": i + generator.normal(0, 0.1), "text_db": i / 4, "colour": i / 20, "shape": 0.5}
                table.add({**common, "seed": seed, **found})
    Table(table.path, "few", table.keys).add({**common, "seed": 100, "quality_db": 0})
    return table.path


def scores_in(folder: Path, truth: Path) -> None:
    """Scores of two variants: one that ranks as the truth does, and one the other way round that costs more."""
    scores, shared = proxy_table.tables(folder)
    with truth.open(newline="") as stream:
        rows = {(r["space"], r["key"]): r for r in csv.DictReader(stream) if r["digest"] == "most"}
    for variant, sign, cpu_s in (("distill-6", 1, 2.0), ("distill-12", -1, 4.0)):
        digest = proxy_table.settings_digest(proxy_table.settings_for(variant))
        for row in rows.values():
            value = sign * round(float(row["quality_db"]))
            place = (variant, digest, row["space"], row["space_hash"], row["key"])
            curve = [[1, 1, value], [2, 2, value + 3], [4, 4, value + 6]]
            said = {"value": value, "text": -value, "cpu_s": cpu_s, "curve": json.dumps(curve), "failed": ""}
            scores.add({**dict(zip(scores.keys, place, strict=True)), **said})
        for name in SPACES:
            place = (variant, digest, name, load_space(name).hash)
            shared.add({**dict(zip(shared.keys, place, strict=True)), "shared_cpu_s": 24.0})


def test_the_table_its_page_and_its_cards(truth, tmp_path):
    scores_in(tmp_path, truth)
    said: list[str] = []
    assert proxy_table.main(["--truth", str(truth), "--out", str(tmp_path), "--only-report"], said.append) == 0
    assert "rows of each space's most frequent settings are used, 1 of others are not" in said[0]
    found = json.loads((tmp_path / "table.json").read_text())
    rows = {(row["group"], row["target"], row["variant"]): row for row in found["rows"]}
    best, wrong = (rows["snapgen_unet", "quality", name] for name in ("distill-6", "distill-12"))
    assert best["kendall"] == best["within_band"] == 1
    assert wrong["kendall"] == -1
    assert wrong["pareto"] is False
    assert best["seconds"] == pytest.approx(2 + 24 / 12)  # the shared part is divided among the space's candidates
    assert rows["sd_unet+sdxl_unet", "quality", "distill-6"]["seconds"] == pytest.approx(2 + 24 / 8)
    assert best["above_macs_within_band"] == 2
    params = rows["snapgen_unet", "quality", "parameters"]
    assert params["within_band"] < 0.9
    assert best["above_params_within_band"] == pytest.approx(1 - params["within_band"], abs=2e-3)
    # The text score is what is held against the text's truth.
    assert rows["snapgen_unet", "text", "distill-6"]["kendall"] == -1
    assert rows["snapgen_unet", "text", "distill-6"]["read"] == "text"
    assert rows["snapgen_unet", "text", "MACs"]["kendall"] == -1
    assert rows["snapgen_unet", "shapes right", "distill-6"]["kendall"] is None  # every candidate has the same share
    assert found["truth"]["snapgen_unet"]["quality"]["trained_twice"] == 4
    page = (tmp_path / "table.html").read_text()
    assert page.count('class="figure-data"') == 8
    assert "distill-6, power law" in page
    cards = sorted(path.name for path in tmp_path.glob("card-*.json"))
    names = ("MACs", "distill-12", "distill-6", "parameters")
    assert cards == [f"card-{space}-{name}.json" for space in ("sd_unet", "snapgen_unet") for name in names]
    card = json.loads((tmp_path / "card-sd_unet-distill-6.json").read_text())
    assert (card["space"], card["candidates"], card["proxy"]["steps"]) == ("sd_unet", 8, 6)
    assert any(line.startswith("* distill-6") for line in said)


def test_a_candidate_is_scored_once(truth, tmp_path, monkeypatch):
    asked: list[str] = []
    finished = 5  # of the first run's jobs, before it is stopped

    class Job:
        def result(self):
            return {"value": 1.0, "cpu_s": 1.0, "failed": ""}

    class Pool:
        def __init__(self, *given, **named): ...
        def __enter__(self):
            return self

        def __exit__(self, *given): ...
        def submit(self, work, candidate, teacher, settings):
            asked.append(candidate.key)
            return Job()

    monkeypatch.setattr(proxy_table, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(proxy_table, "as_completed", lambda jobs: list(jobs)[:finished])
    monkeypatch.setattr(proxy_table.quality, "prepare", lambda *given: None)
    monkeypatch.setattr(proxy_table.Bench, "prepare", lambda self: None)
    candidates = [each for each in proxy_table.read_truth(truth, print).candidates if each.space.name == "sd_unet"]
    assert len(candidates) == 8
    proxy_table.score_missing(candidates, ["distill-6"], tmp_path, 1, lambda text: None)
    assert len(proxy_table.tables(tmp_path)[0]) == 5
    asked.clear()
    proxy_table.score_missing(candidates, ["distill-6"], tmp_path, 1, lambda text: None)
    assert len(asked) == 3
    assert len(proxy_table.tables(tmp_path)[0]) == 8
    asked.clear()
    proxy_table.score_missing(candidates, ["distill-6", "distill-12"], tmp_path, 1, lambda text: None)
    assert len(asked) == 8  # of the other variant


def test_what_is_read_off_a_training_curve():
    # Losses of 0.1 over two steps and of 0.01 over two: their mean is 0.055.
    curve = np.array([[2, 1, 10.0], [4, 2, 20.0]])
    assert report._mean_db(curve) == pytest.approx(-10 * np.log10(0.055))
    # A loss of 1/step is a power law that goes on: 10 log10 of the step in dB.
    middles = np.array([1.0, 3.0, 6.0, 10.0])
    ends = np.array([2, 4, 8, 12])
    law = np.column_stack([ends, ends, 10 * np.log10(middles)])
    assert report.power_law_db(law, 120) == pytest.approx(10 * np.log10(120))


def test_a_truth_of_another_space_is_refused(truth):
    found = proxy_table.read_truth(truth, print)
    changed = [{**row, "space_hash": "of old"} for row in found.rows]
    with pytest.raises(proxy_table.UsageError, match="of version of old, and the space is now"):
        _ = proxy_table.TruthTable(rows=changed).candidates
    with pytest.raises(proxy_table.UsageError, match="no truth table"):
        proxy_table.read_truth(truth.parent / "none.csv", print)
    with pytest.raises(proxy_table.UsageError, match="did you mean 'distill-12'"):
        proxy_table.settings_for("distil-12")


def test_the_regression_never_sees_what_it_predicts(truth):
    found = proxy_table.read_truth(truth, print)
    known = report.Known.of(found.rows)
    generator = np.random.default_rng(1)
    keys = list(known.rows)
    feature = {key: float(known.truth([key], "quality_db").values[0]) for key in keys}

    def free(name, values):
        return report.Scored(
            name=name, settings=None, values=values, texts={}, seconds=dict.fromkeys(keys, 0.5), reading=""
        )

    noise = [{key: float(v) for key, v in zip(keys, np.exp(generator.normal(size=20)), strict=True)} for _ in range(2)]
    others = [free("synflow", feature), free("naswot", noise[0]), free("grad_norm", noise[1])]
    (made,) = report.cross_fitted(known, found.candidates, others, proxy_table.TEACHER)
    assert set(made.values) == set(keys)
    assert made.seconds[keys[0]] == 1.5
    own = [key for key in keys if key[0] == "snapgen_unet"]
    assert tau([made.values[key] for key in own], known.truth(own, "quality_db")).value > 0.6
    # Another truth of one candidate changes what is said of the others, and nothing about itself.
    rows = [{**row, "quality_db": "50"} if row["key"] == own[3][1] else row for row in found.rows]
    (other,) = report.cross_fitted(report.Known.of(rows), found.candidates, others, proxy_table.TEACHER)
    assert other.values[own[3]] == made.values[own[3]]
    assert other.values[own[4]] != made.values[own[4]]
    assert report.cross_fitted(known, found.candidates, others[:2], proxy_table.TEACHER) == []
