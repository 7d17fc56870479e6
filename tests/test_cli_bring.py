"""Rows that a person brings and the kits they are timed with: what is kept, every sentence about a wrong line."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nas import latency, tables
from nas.device import find_target
from tests.measure_cases import SLUG, brought, fill, run, said, sheet_in, times, toy_networks, toy_space

# Rows that a person brings


def test_two_columns_are_enough(capsys, data):
    sheet = find_target("tiny")
    subjects = fill(sheet, sessions=1)
    latency.refit(SLUG)
    path = brought(data.parent, [f"{key},{ms:.5f}" for key, ms in times(sheet, 1.03)])
    code, out, err = run(capsys, "measure", "--target", "tiny", "--import", str(path))
    assert code == 0, err
    assert "5 rows of 5 subjects added" in err
    assert "noise floor" in out
    rows = tables.read(SLUG, data)[len(subjects) :]
    assert [(row.subject, round(row.latency_ms, 5)) for row in rows] == [
        (key, round(ms, 5)) for key, ms in times(sheet, 1.03)
    ]
    assert {(row.chip, row.statistic, row.session) for row in rows} == {(sheet.chip, "reported", "brought")}
    latency.load_predictor(SLUG)


def test_a_full_line_is_kept(data):
    from nas.measure.bring import bring

    sheet = fill(find_target("tiny"), sessions=1) and find_target("tiny")
    key, ms = times(sheet)[0]
    header = "subject,samples_ms,session,batch,precision,environment,measured_at,source,notes"
    line = f"{key},{ms} {ms * 1.2} {ms * 1.1},morning,1,fp32,a runtime 1.0,2026-02-03,the lab,in a box"
    assert bring(brought(data.parent, [line], header), sheet, data).rows == 1
    row = tables.read(SLUG, data)[-1]
    assert row.samples_ms == pytest.approx((ms, ms * 1.2, ms * 1.1), rel=1e-5)
    assert row.latency_ms == pytest.approx(ms)  # a shared machine: the least
    assert (row.statistic, row.session, row.environment) == ("min_wall", "morning", "a runtime 1.0")
    assert (row.source, row.protocol, row.measured_at) == ("the lab", "in a box", "2026-02-03")


def test_a_published_network_is_named_by_space_and_size(capsys, data):
    code, _, err = run(
        capsys,
        "measure",
        "--target",
        "tiny",
        "--import",
        str(brought(data.parent, ["decoder:taesd@64,5.0", "taesd-decoder-128px,20"])),
    )
    assert code == 0, err
    assert "no predictor yet" in err
    first, second = tables.read(SLUG, data)
    known = tables.subjects(SLUG, data)
    assert known[first.subject].macs > 1e8
    assert (first.subject_kind, first.resolution_px) == ("network", 64)
    assert (second.subject_kind, second.role, second.resolution_px) == ("component", "decoder", 128)


@pytest.mark.parametrize(
    ("header", "lines", "code", "sentence"),
    [
        ("subject,latency", ["{0},1"], 2, "rows.csv:1; did you mean 'latency_ms'?"),
        ("subject,notes", ["{0},1"], 2, "rows.csv:1: the columns subject and latency_ms"),
        (None, ["{0},{ms}", "{1}x,1"], 2, "rows.csv:3: unknown subject '{1}x'; did you mean '{1}'?"),
        (None, ["decodr:taesd,1"], 2, "did you mean 'decoder:taesd'?"),
        (None, ["{0},nan"], 1, "rows.csv:2: latency_ms must hold positive numbers of milliseconds, got 'nan'"),
        (None, ["{0},{ms}", "{1},-3"], 1, "rows.csv:3: latency_ms must hold positive numbers of milliseconds"),
        (None, ["{0},0"], 1, "got '0'"),
        (None, ["{0},1.5 ms"], 1, "got '1.5 ms'"),
        (None, ["{0},{ms},7"], 1, "rows.csv:2: as many cells as the header has"),
        (None, ["{0},"], 1, "no line has a time"),
        (None, ["{0},{ms}", "{0},{ms}"], 1, "rows.csv:3: '{0}' has a time in session 'brought' already, in line 2"),
        (None, ["{0},{seconds}"], 1, "line 2: {0}' in"),
        (None, ["{0},{us}"], 1, "if it was written in microseconds"),
        ("subject,latency_ms,batch", ["{0},{ms},2"], 1, "rows.csv:2: batch is '2', but"),
        ("subject,latency_ms,precision", ["{0},{ms},fp16"], 1, "rows.csv:2: precision is 'fp16', but"),
        ("subject,latency_ms,chip", ["{0},{ms},Z80"], 1, "rows.csv:2: chip is 'Z80', but"),
        ("subject,latency_ms,samples_ms", ["{0},9,1 2"], 1, "latency_ms is 9, outside its samples_ms, 1 to 2"),
        ("subject,latency_ms,resolution_px", ["{0},{ms},big"], 1, "resolution_px must be the image's side"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_written(capsys, data, header, lines, code, sentence):
    sheet = find_target("tiny")
    fill(sheet)
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    keys, ms = [s.key for s in toy_networks()], times(sheet)[0][1]

    def filled(text):
        return text.format(*keys, ms=f"{ms:.6g}", seconds=f"{ms / 1e3:.6g}", us=f"{ms * 1e3:.6g}")

    path = brought(data.parent, [filled(line) for line in lines], header or "subject,latency_ms")
    found, out, err = run(capsys, "measure", "--target", "tiny", "--import", str(path))
    assert found == code, err
    assert not out
    assert filled(sentence) in said(err)
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before


def test_a_whole_file_in_seconds_is_seen_without_any_row_to_compare(capsys, data):
    fill(sheet_in(data, "other", device="other", backend=None))
    path = brought(data.parent, [f"{key},{ms / 1e3:.7f}" for key, ms in times(find_target("tiny"))])
    code, _, err = run(capsys, "measure", "--target", "tiny", "--import", str(path))
    assert code == 1
    assert "line 2: " in said(err)
    assert "in seconds; and 4 more lines like it" in said(err)
    assert not tables.read(SLUG, data)


def test_another_time_for_a_known_session_is_refused_and_new_rows_join(capsys, data):
    sheet = find_target("tiny")
    fill(sheet)
    lines = [f"{key},{ms:.6f}" for key, ms in times(sheet)]
    assert run(capsys, "measure", "--target", "tiny", "--import", str(brought(data.parent, lines[:3])))[0] == 0
    code, _, err = run(capsys, "measure", "--target", "tiny", "--import", str(brought(data.parent, lines)))
    assert code == 0
    assert "2 rows of 2 subjects added, 3 were there already" in err
    changed = [f"{key},{ms * 1.1:.6f}" for key, ms in times(sheet)]
    code, _, err = run(capsys, "measure", "--target", "tiny", "--import", str(brought(data.parent, changed)))
    assert code == 1
    assert "in session 'brought'" in said(err)


# Kits


@pytest.mark.slow
def test_a_kit_is_timed_by_its_script_and_comes_back(capsys, data, tmp_path):
    fill(find_target("tiny"))
    latency.refit(SLUG)
    sheet_in(data, "box", device="box", backend=None, chip="")
    asked = ["measure", "--target", "box", "--adapt-from", "tiny", "--networks", "2"]
    code, out, err = run(capsys, *asked, "--kit", "kit")
    assert code == 0, err
    assert out.splitlines()[-1] == "next: nas measure --target box --import kit/rows.csv"
    assert "python measure_onnx.py" in Path("kit/README.txt").read_text()
    script = [sys.executable, "kit/measure_onnx.py", "--repeats", "3", "--wait", "0"]
    done = subprocess.run([*script, "--sessions", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*script, "--sessions", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Path("kit/rows.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4
    assert len({(row["subject"], row["session"].partition("/")[0]) for row in rows}) == 4
    assert all("CPUExecutionProvider" in row["environment"] for row in rows)
    code, _, err = run(capsys, *asked, "--kit", "kit")
    assert code == 1
    assert "has times already" in said(err)
    code, _, err = run(capsys, "measure", "--target", "box", "--import", "kit/rows.csv")
    assert code == 0, err
    assert "4 rows of 2 subjects added" in err
    kept = tables.read("box--onnxruntime--fp32", data)
    assert all(len(row.samples_ms) == 3 for row in kept)
    assert all(tables.subjects("box--onnxruntime--fp32", data)[row.subject].features for row in kept)
    refused = subprocess.run([*script, "--sessions", "3", "--provider", "CUDAExecutionProvider"], capture_output=True)
    assert refused.returncode != 0


COREML = """
import types
__version__ = "9.0"
ComputeUnit = types.SimpleNamespace(CPU_AND_NE="both")
class _Model:
    def __init__(self, path, compute_units):
        assert compute_units == "both"
    def get_spec(self):
        shape = lambda *sides: types.SimpleNamespace(multiArrayType=types.SimpleNamespace(shape=sides, dataType=65552))
        named = lambda name, kind: types.SimpleNamespace(name=name, type=kind)
        inputs = [named("sample", shape(1, 4, 8, 8)), named("timestep", shape(1))]
        return types.SimpleNamespace(description=types.SimpleNamespace(input=inputs))
    def predict(self, inputs):
        assert inputs["sample"].shape == (1, 4, 8, 8) and inputs["timestep"][0] == 500
        assert inputs["sample"].dtype == "float16"
models = types.SimpleNamespace(MLModel=_Model)
"""


def test_the_script_of_a_core_ml_kit_runs_on_what_stands_for_a_mac(tmp_path, root):
    # Core ML runs on a Mac only: everything but its own calls is exercised.
    (tmp_path / "coremltools.py").write_text(COREML)
    script = tmp_path / "measure_coreml.py"
    script.write_text((root / "nas/data/kit/measure_kit.py").read_text())
    for name in "ab":
        (tmp_path / f"{name}.mlpackage").mkdir()
        (tmp_path / f"{name}.mlpackage" / "weights").write_text("w" * len(name))
    columns = "subject,file,session,latency_ms,samples_ms,environment,measured_at"
    (tmp_path / "rows.csv").write_text(f"{columns}\na,a.mlpackage,,,,,\nb,b.mlpackage,,,,,\n")
    done = subprocess.run(
        [sys.executable, str(script), "--wait", "0"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "rows.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert sorted(row["subject"] for row in rows) == ["a", "a", "b", "b"]
    assert all("coremltools 9.0, CPU_AND_NE" in row["environment"] for row in rows)


def test_a_kit_that_cannot_be_written_says_why(capsys, data, monkeypatch):
    sheet_in(data, "phone", device="phone", runtime="tflite", backend=None)
    asked = ["measure", "--space", str(toy_space().path), "--networks", "1", "--kit", "kit", "--target"]
    code, _, err = run(capsys, *asked, "phone")
    assert code == 2
    assert "unknown runtime of a kit 'tflite'" in said(err)
    monkeypatch.setattr("nas.exporters.onnx.unavailable", lambda: "the package onnx is not installed")
    code, _, err = run(capsys, *asked, "tiny")
    assert code == 1
    assert "a kit for tiny cannot be written here: the package onnx is not installed" in said(err)
    assert not Path("kit").exists()
