"""`nas devices`: the list, one device with its rows, and a new one."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace

import pytest

from nas import latency, tables
from nas.cli.devices import _age
from nas.device import find_target
from tests.measure_cases import SLUG, fill, run, sheet_in


def test_the_list_has_rows_error_coverage_and_age_within_a_hundred_columns(capsys, data):
    fill(find_target("tiny"))
    card = latency.refit(SLUG).card
    sheet_in(data, "box", device="box", backend=None)
    code, out, _ = run(capsys, "devices")
    assert code == 0
    assert all(len(line) <= 100 for line in out.splitlines())
    tiny = next(line for line in out.splitlines() if line.startswith("tiny")).split()
    coverage = card["held_out"]["coverage"]["0.8"]["measured"]
    assert tiny[1:6] == ["onnxruntime", "16", "8", f"{card['held_out']['mape']:.1%}", f"{coverage:.1%}"]
    assert tiny[-1] in ("months", "days", "day", "today")
    box = next(line for line in out.splitlines() if line.startswith("box")).split()
    assert box == ["box", "published", "0", "-", "-", "-", "-"]


def test_one_device_is_shown_with_the_worst_rows_or_all(capsys, data):
    sheet = find_target("tiny")
    subjects = fill(sheet, count=12)
    rows = list(tables.read(SLUG, data))
    rows[0] = replace(rows[0], flagged="anchors 31% slower than their best")
    rows[1] = replace(rows[1], flagged="anchors 12% slower than their best")
    rows.append(replace(rows[2], session="other", chip="another chip"))
    rows.append(replace(rows[2], session="bad", excluded_because="from memory"))
    part = replace(rows[3], subject="taesd-decoder-64px", subject_kind="component", role="decoder", session="p")
    tables.write(SLUG, [*rows, part], data)
    latency.refit(SLUG)
    code, out, _ = run(capsys, "devices", "show", "tiny")
    assert code == 0
    assert all(len(line) <= 100 for line in out.splitlines() if not line.startswith("file "))
    assert "2 more, all of smaller error; --rows prints them" in out
    assert sum(line.count(" 16x16") + line.count(" 32x32") for line in out.splitlines()) >= 10
    assert "2 rows: the anchors drifted: the machine was not steady" in out
    assert "1 row: measured on another chip, another chip" in out
    assert "1 row: from memory" in out
    assert "taesd-decoder-64px" in out
    errors = [abs(r.error) for r in latency.residuals(SLUG)]
    shown = [line for line in out.splitlines() if "%" in line and "-" in line and line.startswith("toy#")]
    assert len(shown) == 10
    assert f"{max(errors):.1%}" in shown[0]
    code, out, _ = run(capsys, "devices", "show", "tiny", "--rows")
    assert "more, all of smaller" not in out
    assert len([line for line in out.splitlines() if line.startswith("toy#") and "%" in line]) == len(subjects)


def test_json_is_complete(capsys, data):
    fill(find_target("tiny"))
    rows = list(tables.read(SLUG, data))
    rows[0] = replace(rows[0], flagged="anchors 31% slower than their best")
    tables.write(SLUG, rows, data)
    latency.refit(SLUG)
    code, out, _ = run(capsys, "devices", "show", "tiny", "--json")
    assert code == 0
    found = json.loads(out)
    assert len(found["measurements"]) == found["rows"] == len(rows)
    assert found["measurements"][0]["not_fitted_because"].startswith("the anchors drifted")
    assert found["measurements"][0]["held_out"] is None
    held = [row["held_out"] for row in found["measurements"][1:]]
    by_subject = {r.subject: r for r in latency.residuals(SLUG)}
    assert all(one["error"] == pytest.approx(by_subject[one["subject"]].error) for one in held)
    assert found["predictor"]["held_out"]["rows"] == 8


def test_a_device_without_a_predictor_says_what_to_do(capsys, data):
    code, out, _ = run(capsys, "devices", "show", "tiny")
    assert code == 0
    assert "has no fitted latency predictor" in out
    assert out.splitlines()[-1] == "next: nas measure --target tiny"


def test_the_shipped_phone_shows_how_its_chips_pool(capsys):
    code, out, _ = run(capsys, "devices", "show", "iphone")
    assert code == 0
    assert "times slower" in out
    assert "not fitted" in out


def test_a_new_device_is_a_sheet_with_a_prior(capsys, data):
    code, out, err = run(
        capsys,
        *("devices", "add", "pixel-9--tflite--fp16", "--adapt-from", "tiny", "--chip", "Tensor G4"),
        *("--alias", "pixel", "--gmac-per-s", "500", "--gb-per-s", "50"),
    )
    assert code == 0, err
    sheet = find_target("pixel")
    assert sheet.slug == "pixel-9--tflite--fp16"
    assert (sheet.chip, sheet.backend, sheet.fit) == ("Tensor G4", None, {"prior": SLUG})
    assert sheet.roofline == {"ms_per_gmac": 2.0, "ms_per_gb": 20.0, "ms_per_op": 0.005}
    assert out.splitlines()[-1] == "next: nas measure --target pixel --adapt-from tiny --plan"
    code, _, err = run(capsys, "devices", "add", "box--tvm--fp32--t4--b2", "--gmac-per-s", "9", "--gb-per-s", "9")
    assert code == 0, err
    assert find_target("box--tvm--fp32--t4--b2").target.threads == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pixel"], "needs ms_per_gmac, ms_per_gb, ms_per_op"),
        (["pixel", "--adapt-from", "tiny"], "must be DEVICE--RUNTIME--PRECISION"),
        (["pixel--tflite--fp17", "--adapt-from", "tiny"], "unknown precision 'fp17'"),
        (["Pixel--tflite--fp16", "--adapt-from", "tiny"], "device must be lower-case words"),
        (["pixel--tflite--fp16--x3", "--adapt-from", "tiny"], "'x3' must be t<threads> or b<batch>"),
        (["pixel--tflite--fp16", "--adapt-from", "tini"], "did you mean 'tiny'"),
        (["pixel--tflite--fp16", "--alias", "tiny", "--adapt-from", "tiny"], "is the name of cpu--onnxruntime--fp32"),
        (["pixel--tflite--fp16", "--gmac-per-s", "-1"], "--gmac-per-s must be a positive number"),
    ],
)
def test_a_wrong_new_device_is_one_sentence_and_no_file(capsys, data, arguments, sentence):
    before = sorted(path.name for path in data.iterdir())
    code, out, err = run(capsys, "devices", "add", *arguments)
    assert code == 2
    assert not out
    assert sentence in next(line for line in err.splitlines() if line.startswith("nas: "))
    assert sorted(path.name for path in data.iterdir()) == before


@pytest.mark.parametrize(
    ("moment", "words"),
    [
        (None, None),
        ("2026-03-10T00:00:00+00:00", "today"),
        ("2026-03-08", "2 days"),
        ("2025-11", "4 months"),
        ("last spring", "last spring"),
    ],
)
def test_age(moment, words):
    now = datetime.datetime(2026, 3, 10, 12, tzinfo=datetime.UTC)
    assert _age(moment, now) == words
