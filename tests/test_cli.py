"""What a person types and reads: exit codes, sentences, hints, and where each line goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from nas.cli import console, main
from nas.cli.names import read_value, typed_candidate
from nas.errors import NasError, UsageError
from nas.paths import find_study
from nas.space import load_space


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(capsys, *arguments):
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_help_names_every_verb(capsys):
    code, out, err = run(capsys, "--help")
    assert code == 0
    assert not err
    for verb in (
        "spaces",
        "devices",
        "profile",
        "measure",
        "search",
        "report",
        "train",
        "sample",
        "evaluate",
        "export",
    ):
        assert f"\n  {verb}" in out


def test_nothing_typed_is_help(capsys):
    code, _, err = run(capsys)
    assert code == 0
    assert "Commands:" in err


def test_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0
    assert out.startswith("nas ")


# One sentence, the right exit code, no traceback.

SEARCH = ("search", "--space", "snapgen_unet", "--budget", "1.4s@iphone")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serch"], "did you mean 'search'"),
        (["spaces", "show", "snapgen_unt"], "unknown space 'snapgen_unt'; did you mean 'snapgen_unet'?"),
        (["devices", "show", "ipone"], "unknown device 'ipone'; did you mean 'iphone'?"),
        (["search"], "missing option '--space'"),
        ([*SEARCH, "--trails", "3"], "no such option: --trails (possible options: --"),
        ([*SEARCH, "--trials", "many"], "invalid value for '--trials': input should be a valid integer"),
        (["search", "--space", "snapgen_unt", "--budget", "1.4s@iphone"], "did you mean 'snapgen_unet'?"),
        (["search", "--space", "snapgen_unet", "--budget", "soon@iphone"], "not of the form TIME@DEVICE"),
        (["search", "--space", "snapgen_unet", "--budget", "1.4s@ipone"], "did you mean 'iphone'?"),
        ([*SEARCH, "--confidence", "2"], "confidence must be between"),
        ([*SEARCH, "--trials", "-1"], "--trials must be at least 0"),
        ([*SEARCH, "--resolution", "1000"], "positive multiple of 32 px"),
        (["report", "2026-no-study"], "unknown study '2026-no-study'"),
        (["export", "--space", "snapgen_unet"], "--space needs --reference"),
        (["export", "--space", "snapgen_unet", "--reference", "snapgn"], "did you mean 'snapgen'?"),
        (["export", "--format", "onx", "--space", "snapgen_unet"], "did you mean 'onnx'?"),
        (["export"], "needs either STUDY#CANDIDATE"),
        (["train", "no-study"], "unknown study 'no-study'"),
        (["sample", "no-run"], "unknown run 'no-run'"),
        (["evaluate", "no-run"], "unknown run 'no-run'"),
        (["profile", "--space", "snapgen_unet", "--candidate", "width_0=130"], "known: 128, 192, 256, 320"),
        (["profile", "--space", "snapgen_unet", "--candidate", "widht_0=128"], "did you mean 'width_0'?"),
        (["profile"], "name either"),
        (["measure", "--target", "cpu-onxruntime"], "did you mean 'cpu-onnxruntime'?"),
    ],
)
def test_wrong_words_are_one_sentence_and_exit_2(capsys, arguments, sentence):
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert not out
    said = [line for line in err.splitlines() if line.startswith("nas: ")]
    assert len(said) == 1
    assert sentence.lower() in said[0].lower()
    assert "Traceback" not in err


def test_a_target_without_a_backend_cannot_be_measured(capsys):
    for more in ([], ["--dry-run"]):
        code, _, err = run(capsys, "measure", "--target", "iphone", *more)
        assert code == 1
        assert "names no backend" in err


def test_a_hint_is_the_next_command(capsys):
    _, _, err = run(capsys, "devices", "show", "ipone")
    assert err.splitlines()[-1] == "try: nas devices"


def test_debug_shows_where_an_expected_error_was_raised(capsys):
    code, _, err = run(capsys, "devices", "--debug", "show", "ipone")
    assert code == 2
    assert "Traceback" in err
    assert "unknown device" in err


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("nas.space.list_spaces", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["spaces"])


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (NasError("no teacher", hint="nas train"), 1, "nas: no teacher\ntry: nas train\n"),
        (UsageError("no such thing"), 2, "nas: no such thing\n"),
        (PermissionError(13, "Permission denied", "/somewhere"), 1, "nas: /somewhere: Permission denied\n"),
        (ModuleNotFoundError("no", name="tvm"), 1, "nas: the package tvm is not installed\n"),
        (MemoryError(), 1, "nas: out of memory\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_each_failure_has_its_sentence(capsys, monkeypatch, error, code, sentence):
    def fail():
        raise error

    monkeypatch.setattr("nas.space.list_spaces", fail)
    got, _, err = run(capsys, "spaces")
    assert got == code
    assert sentence in err.lstrip("\n")


def test_a_misspelt_key_names_file_and_line(capsys, tmp_path):
    space = load_space("snapgen_unet")
    path = tmp_path / "mine.toml"
    path.write_text(space.path.read_text().replace("norm_groups", "norm_groups", 1).replace("family =", "famly ="))
    code, _, err = run(capsys, "spaces", "show", str(path))
    assert code == 2
    assert (
        f"{path}:{path.read_text().splitlines().index('famly = ' + repr('unet').replace(chr(39), chr(34))) + 1}" in err
    )
    assert "did you mean 'family'?" in err


def test_a_read_only_output_folder_is_told_before_any_work(capsys, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    code, _, err = run(capsys, *SEARCH, "--out", str(blocker / "study"))
    assert code == 1
    assert "cannot write to the output folder" in err
    assert "blocks traced" not in err
    assert "--out" in err.splitlines()[-1]


# Results


def test_spaces_json_is_one_document(capsys):
    code, out, err = run(capsys, "spaces", "--json")
    assert code == 0
    assert not err
    found = {space["name"]: space for space in json.loads(out)}
    assert found["snapgen_unet"]["references"][0]["params"] == 383_670_276


def test_devices_list_every_sheet_and_show_a_card(capsys):
    code, out, _ = run(capsys, "devices", "--json")
    assert code == 0
    found = {device["device"]: device for device in json.loads(out)}
    assert {"iphone", "cpu-onnxruntime"} <= set(found)
    card = found["iphone"]["predictor"]
    code, out, _ = run(capsys, "devices", "show", "iphone")
    assert f"{card['held_out']['mape']:.1%}" in out
    for line in ("held out", "Kendall", "coverage 0.8", "noise floor", "sources"):
        assert line in out


def test_every_command_ends_with_the_next_one(capsys):
    for arguments in (["spaces"], ["spaces", "show", "snapgen_unet"], ["devices"], ["devices", "show", "iphone"]):
        _, out, _ = run(capsys, *arguments)
        assert out.splitlines()[-1].startswith("next: nas ")


def test_a_reader_that_goes_away_is_told_nothing():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        done = subprocess.run([sys.executable, "-m", "nas", "spaces"], stdout=gone, stderr=subprocess.PIPE, text=True)
    assert not done.stderr


def test_help_takes_less_than_half_a_second_of_work():
    before = os.times()
    subprocess.run([sys.executable, "-m", "nas", "--help"], check=True, capture_output=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 0.5


SMALL = "width_0=128,width_1=256,width_2=512,resnets_0=1,resnets_1=1,resnets_2=1,depth_2=1,attention=mqa"


def test_profile_adds_up_and_prices_a_device(capsys, tmp_path):
    page = tmp_path / "page.html"
    asked = ["profile", "--space", "snapgen_unet", "--reference", "snapgen", "--device", "iphone", "--out", str(page)]
    code, out, err = run(capsys, *asked, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["params"] == sum(block["params"] for block in found["blocks"]) == 383_670_276
    assert found["latency"]["low_ms"] < found["latency"]["ms"] < found["latency"]["high_ms"]
    assert sum(block["step_ms"] for block in found["blocks"]) == pytest.approx(found["latency"]["ms"])
    assert page.is_file()
    assert f"wrote {page}" in err
    code, out, _ = run(capsys, *asked)
    assert "383,670,276 parameters, 658.2 GMACs a call" in out
    assert out.splitlines()[-1].startswith("next: nas ")


@pytest.mark.slow
def test_export_writes_a_file_that_agrees_with_torch(capsys, tmp_path):
    path = tmp_path / "small.onnx"
    chosen = ["--space", "snapgen_unet", "--reference", "snapgen", "--candidate", SMALL, "--resolution", "64"]
    code, out, _ = run(capsys, "export", *chosen, "--out", str(path), "--json")
    assert code == 0
    found = json.loads(out)
    assert path.stat().st_size > 4 * found["params"]
    assert 0 < found["largest_difference"] < found["allowed"]


# Names


def test_a_candidate_can_be_a_reference_with_changes():
    space = load_space("snapgen_unet")
    changed = typed_candidate(space, "width_0=128, self_attention_1=TRUE", "snapgen")
    assert changed.choices == {**space.reference("snapgen").choices, "width_0": 128, "self_attention_1": True}
    with pytest.raises(UsageError, match="no value was given for"):
        typed_candidate(space, "width_0=128", None)
    with pytest.raises(UsageError, match="name=value"):
        typed_candidate(space, "width_0", "snapgen")
    with pytest.raises(UsageError, match=r"unknown value of width_0 '130'.* known: 128, 192, 256, 320"):
        read_value(space, "width_0", "130")


def test_a_study_is_a_folder_or_a_name_under_reports(tmp_path):
    folder = tmp_path / "reports" / "one"
    folder.mkdir(parents=True)
    (folder / "study.json").write_text("{}")
    assert find_study("one").resolve() == folder
    assert find_study(str(folder)) == folder
    with pytest.raises(UsageError, match="did you mean 'one'"):
        find_study("onne")


# Printing


def test_json_has_no_numbers_that_json_lacks(capsys):
    console.result_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": (1, None)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": [1, None]}


def test_table_aligns_names_left_and_figures_right():
    assert console.table(("name", "ms"), [("a", 1234), ("long", None)]).splitlines() == [
        "name     ms",
        "----  -----",
        "a     1,234",
        "long      -",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(4.4, "4 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (-1, "0 s")])
def test_duration(seconds, text):
    assert console.duration(seconds) == text


def test_progress_says_what_is_left_from_what_was_done_since_it_began(capsys, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = console.Progress("search")
    progress("search", 10, 24, "resumed")
    clock[0] += 60
    progress("search", 12, 24, "one more")
    # Two in sixty seconds; twelve are left. Ten that an earlier run did say nothing about this one's pace.
    assert progress.line() == "search 12/24 (1 min 00 s, 6 min 00 s left) one more"
    assert "search 10/24 (0 s) resumed" in capsys.readouterr().err


def test_progress_breaks_a_silence(capsys, monkeypatch):
    monkeypatch.setattr(console, "_HEARTBEAT_S", 0.0)
    with console.Progress("train") as progress:
        progress("train", 0, 5, "first step")
        time.sleep(1.3)
    assert capsys.readouterr().err.count("first step") >= 2


def test_a_stop_says_how_to_go_on(capsys, monkeypatch):
    def stopped(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr("nas.search.run_search", stopped)
    monkeypatch.setattr(sys, "argv", ["nas", *SEARCH, "--fresh"])
    code, out, err = run(capsys, *SEARCH, "--fresh")
    assert code == 130
    assert not out
    assert err.splitlines()[-1] == "stopped; go on with: nas " + " ".join(SEARCH)
