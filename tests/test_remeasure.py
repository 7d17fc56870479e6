"""A study's finalists on the hardware: which, what is said of each, and what is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nas import latency, tables
from nas.backends import Loaded
from nas.cli import main
from nas.device import find_target
from nas.errors import NasError
from nas.measure.session import Session
from nas.measure.subjects import candidate_subject
from nas.remeasure import FILE, finalists, remeasure
from tests.measure_cases import SLUG, fill, predicted, sheet_in, toy_networks, toy_space

BUDGET_MS = 60.0
PROBABILITIES = (0.99, 0.8, 0.95, 0.9)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("NAS_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / "latency_tables"
    sheet_in(folder)
    return folder


def candidates(count=4):
    space = toy_space()
    return [space.from_row(row) for row in space.sample(count, 0)]


def study(target: str = SLUG, step_ms: float | None = None) -> Path:
    """A finished study's files, as far as finalists need them; the first candidate is the recommended one."""
    space, folder = toy_space(), Path("reports/one")
    folder.mkdir(parents=True)
    sheet = find_target(target)
    rows = []
    for candidate, probability in zip(candidates(), PROBABILITIES, strict=True):
        step = step_ms or predicted(candidate_subject(candidate, 1), sheet)
        rows.append(
            {
                "key": candidate.key,
                "step_ms": step,
                "latency_ms": 4 * step,
                "latency_low_ms": 3.6 * step,
                "latency_high_ms": 4.4 * step,
                "meets_budget_probability": probability,
                "weight_bytes": 4_000_000,
                "peak_activation_bytes": 1_000_000,
                **{f"choice.{choice.name}": candidate.choices.get(choice.name, "") for choice in space.choices},
            }
        )
    for name in ("trials.csv", "front.csv"):
        pd.DataFrame(rows).to_csv(folder / name, index=False)
    record = {
        "schema": 1,
        "space": space.name,
        "space_path": str(space.path),
        "space_hash": space.hash,
        "resolution_px": space.resolution_px,
        "target": target,
        "budget": {"ms": BUDGET_MS},
        "pipeline": {"fixed_ms": 5.0, "calls": 4},
        "predictor": {"target": target},
        "recommended": {"key": rows[0]["key"]},
    }
    (folder / "study.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def scripted(monkeypatch):
    """Finalists take 10 ms, what the table has takes what its rows say; timed as a device elsewhere times."""
    seen, known = [], {s.key: s for s in toy_networks()}

    def load(self, subject):
        seen.append(subject)
        ms = predicted(subject, self.sheet) if subject.key in known else 10.0
        return Loaded(run=lambda: np.zeros(1), description={"runtime": "scripted"}, device_ms=lambda calls: ms)

    monkeypatch.setattr(Session, "_load", load)
    return seen


def run(capsys, *arguments):
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_finalists_are_the_recommended_one_and_the_most_doubtful(data):
    folder = study()
    keys = [c.key for c in candidates()]
    assert [f.key for f in finalists(folder, 3)] == [keys[0], keys[1], keys[3]]
    assert len(finalists(folder, 99)) == 4


def test_finalists_are_measured_at_full_size_beside_what_was_predicted(capsys, data, scripted):
    fill(find_target("tiny"))
    latency.refit(SLUG)
    folder = study()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fitted = (data / f"{SLUG}.predictor.json").read_bytes()
    code, out, err = run(capsys, "measure", "--study", "one", "--networks", "2")
    assert code == 0, err
    keys = [c.key for c in candidates()]
    assert all(key in out for key in keys[:2])
    assert "full-size denoisers with random weights at 128 px, batch 1; 7 repeats in 2 sessions" in out
    assert out.splitlines()[-1] == "next: nas devices show tiny"
    found = json.loads((folder / FILE).read_text())
    # 5 ms of fixed parts and four calls of 10 ms.
    assert [f["measured_ms"] for f in found["finalists"]] == [pytest.approx(45.0, rel=0.03)] * 2
    assert [f["within_budget"] for f in found["finalists"]] == [True, True]
    assert [f["sessions"] for f in found["finalists"]] == [2, 2]
    first = found["finalists"][0]
    assert first["error"] == pytest.approx(first["step_ms"] / 10.0 - 1, abs=0.1)
    # The study's own files are as they were; the target's predictor is a new one that loads.
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert (data / f"{SLUG}.predictor.json").read_bytes() != fitted
    assert latency.load_predictor(SLUG).card["networks"] == 10
    full = {candidate_subject(c, 1).key for c in candidates()[:2]}
    assert full <= {row.subject for row in tables.read(SLUG, data)}
    again = run(capsys, "measure", "--study", "one", "--networks", "2", "--json")
    assert json.loads(again[1])["rows"] == 0


def test_a_finalist_over_the_budget_is_said_to_be(data, scripted):
    folder = study()
    record = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps({**record, "budget": {"ms": 44.0}}))
    found = remeasure(folder, 1)
    assert found.finalists[0].within_budget is False


def test_slow_calls_are_repeated_less_and_it_is_said(data, scripted):
    found = remeasure(study(step_ms=15_000.0), 1)
    assert "3 repeats in 1 session (fewer than the protocol's: a call takes seconds)" in found.what
    row = tables.read(SLUG, data)[-1]
    assert ">= 3 interleaved repeats" in row.protocol


def test_what_this_machine_cannot_take_is_left_out_with_the_reason(data, scripted, monkeypatch):
    found = remeasure(study(step_ms=90_000.0), 1)
    assert found.finalists[0].skipped == "a call would take 90 s, more than the 60 s of most_call_s"
    assert found.finalists[0].measured_ms is None
    assert not scripted
    monkeypatch.setattr("nas.remeasure._free_gb", lambda: 0.001)
    record = pd.read_csv("reports/one/front.csv").assign(step_ms=1.0)
    record.to_csv("reports/one/front.csv", index=False)
    assert "it needs about 0.0 GB of memory" in remeasure(Path("reports/one"), 1).finalists[0].skipped


@pytest.mark.slow
def test_a_target_elsewhere_gets_a_kit_that_the_import_takes(capsys, data):
    sheet_in(data, "box", device="box", backend=None)
    folder = study("box--onnxruntime--fp32")
    code, out, err = run(capsys, "measure", "--study", "one", "--networks", "1")
    assert code == 0, err
    assert "box cannot be measured from here: a kit of 1 finalists was written" in out
    assert out.splitlines()[-1] == f"next: nas measure --target box --import {Path('reports/one/kit/rows.csv')}"
    key = candidate_subject(candidates()[0], 1).key
    assert (folder / "kit" / "networks" / f"{key}.onnx").stat().st_size > 1e5
    assert not (folder / FILE).exists()
    path = folder / "kit" / "rows.csv"
    rows = pd.read_csv(path, dtype=str, keep_default_na=False).assign(
        latency_ms=str(predicted(candidate_subject(candidates()[0], 1), find_target("box")))
    )
    rows.to_csv(path, index=False)
    code, _, err = run(capsys, "measure", "--target", "box", "--import", str(path))
    assert code == 0, err
    assert "1 rows of 1 subjects added" in err


def test_an_empty_front_and_another_target_are_refused(capsys, data):
    folder = study()
    sheet_in(data, "box", device="box", backend=None)
    code, _, err = run(capsys, "measure", "--study", "one", "--target", "box")
    assert code == 2
    assert "is for cpu--onnxruntime--fp32, and its finalists are measured there, not on box" in err
    empty = pd.read_csv(folder / "front.csv").head(0)
    empty.to_csv(folder / "front.csv", index=False)
    with pytest.raises(NasError, match="the front is empty"):
        finalists(folder, 1)


def test_a_search_can_end_on_the_hardware(capsys, data, scripted, monkeypatch):
    from nas.search import SearchResult

    folder = study()
    budget = {"text": "60ms@tiny", "ms": BUDGET_MS, "device": SLUG, "confidence": 0.8}
    record = {
        "space": "toy",
        "budget": budget,
        "budgets": [budget],
        "limits": {},
        "rejected": {},
        "sampler": "front",
        "reuse": None,
        "changed": [],
        "trials": {"proxied": 4, "infeasible": 0},
        "stopping": {"stopped": 0, "saved_s": 0.0},
        "proxy": {"proxy": "distill", "unit": "dB"},
        "wall_s": 1.0,
        "recommended": None,
        "next": "nas train one",
    }
    monkeypatch.setattr(
        "nas.search.run_search", lambda settings, progress: SearchResult(folder=folder, record=record, front=[])
    )
    monkeypatch.setattr("nas.cli.search._build_report", lambda folder: folder / "index.html")
    asked = ["search", "--space", str(toy_space().path), "--budget", "60ms@tiny", "--remeasure", "1", "--json"]
    code, out, err = run(capsys, *asked)
    assert code == 0, err
    assert json.loads(out)["remeasured"]["finalists"][0]["measured_step_ms"] == pytest.approx(10.0)
    assert "the study keeps the predictor that it was made with" in err
    assert (folder / FILE).is_file()
    assert err.splitlines()[-1] == "next: nas train one"
