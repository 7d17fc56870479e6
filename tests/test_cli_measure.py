"""`nas measure` as a person meets it: plans, runs that break or are killed, and every sentence about bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest

from nas import latency, measure, tables
from nas.backends import Loaded
from nas.device import find_target
from nas.errors import NasError
from nas.measure.guard import writing
from nas.measure.session import Session
from nas.measure.timing import Protocol
from tests.measure_cases import SLUG, brought, fill, run, said, sheet_in, times, toy_networks, toy_space

# What can be asked for


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "missing option '--target'"),
        (["--target", "tini"], 2, "unknown device 'tini'; did you mean 'tiny'?"),
        (["--target", "tiny", "--plan", "--fit-only"], 2, "--fit-only and --plan are different things"),
        (["--target", "tiny", "--adapt-from", "tiny", "--plan"], 1, "cannot be adapted from itself"),
        (["--target", "tiny", "--adapt-from", "tiny", "--blocks", "3"], 2, "--blocks has no effect with --adapt-from"),
        (["--target", "tiny", "--fit-only"], 1, "has 0 measured networks"),
        (["--target", "tiny", "--import", "none.csv"], 1, "none.csv cannot be read: No such file"),
        (["--study", "none"], 2, "unknown study 'none'"),
    ],
)
def test_wrong_requests_are_one_sentence(capsys, data, arguments, code, sentence):
    found, out, err = run(capsys, "measure", *arguments)
    assert found == code
    assert not out
    assert sentence in said(err)


def test_a_plan_needs_no_backend(capsys, data):
    sheet_in(data, "box", device="box", backend=None)
    asked = ["measure", "--target", "box", "--space", str(toy_space().path), "--networks", "4"]
    code, out, err = run(capsys, *asked, "--plan", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [one["kind"] for one in found] == ["network"] * 4
    assert all(one["inputs"].startswith("sample 1x4x") and "timestep 1" in one["inputs"] for one in found)
    code, _, err = run(capsys, *asked, "--dry-run")
    assert code == 1
    assert "names no backend" in said(err)


def test_a_plan_to_adapt_takes_networks_of_the_source_far_apart(capsys, data):
    subjects = fill(find_target("tiny"))
    latency.refit(SLUG)
    sheet_in(data, "box", device="box", backend=None)
    asked = ["measure", "--target", "box", "--adapt-from", "tiny", "--networks", "3", "--plan", "--json"]
    code, out, err = run(capsys, *asked)
    assert code == 0, err
    keys = [one["key"] for one in json.loads(out)]
    assert len(set(keys)) == 3
    assert set(keys) < {s.key for s in subjects}
    assert json.loads(run(capsys, *asked)[1]) == json.loads(out)
    sizes = sorted(s.macs for s in subjects if s.key in keys)
    assert sizes[-1] / sizes[0] > 5
    code, _, err = run(capsys, "measure", "--target", "box", "--adapt-from", "tiny", "--networks", "99", "--plan")
    assert code == 1
    assert "has 8 networks that can be built" in said(err)


def test_adapting_names_the_prior_in_the_sheet_and_fits_with_it(capsys, data):
    fill(find_target("tiny"))
    latency.refit(SLUG)
    box = sheet_in(data, "box", device="box", backend=None, chip="")
    path = brought(data.parent, [f"{key},{ms}" for key, ms in times(box, 0.4, 3)])
    code, out, err = run(capsys, "measure", "--target", "box", "--import", str(path), "--adapt-from", "tiny", "--json")
    assert code == 0, err
    assert f'prior = "{SLUG}"' in box.path.read_text()
    assert find_target("box").fit == {"prior": SLUG}
    found = json.loads(out)
    assert found["imported"]["rows"] == 3
    assert found["predictor"]["prior"]["target"] == SLUG
    # Again: the sheet stays, and nothing is added.
    before = box.path.read_text()
    code, out, err = run(capsys, "measure", "--target", "box", "--import", str(path), "--adapt-from", "tiny")
    assert code == 0
    assert box.path.read_text() == before
    assert "nothing was added: all 3 rows" in err
    sheet_in(data, "other", device="other", backend=None)
    code, _, err = run(capsys, "measure", "--target", "box", "--fit-only", "--adapt-from", "other")
    assert code == 1
    assert f"names '{SLUG}' as the prior" in said(err)


# Measuring here


@pytest.fixture
def scripted(monkeypatch):
    """Subjects that take no time; `calls` counts what was loaded, `fail` makes the n-th fail as a lost server does."""

    class State:
        calls = 0
        fail: int | None = None
        error: Exception = NasError("the RPC server at 127.0.0.1:9190 does not answer")

    def load(self, subject):
        State.calls += 1
        if State.fail is not None and State.calls >= State.fail:
            raise State.error
        return Loaded(run=lambda: np.zeros(1), description={"runtime": "scripted"}, device_ms=lambda calls: 2.0)

    monkeypatch.setattr(Session, "_load", load)
    return State


def asked_to_measure(*more):
    return ("measure", "--target", "tiny", "--space", str(toy_space().path), "--blocks", "0", "--networks", "8", *more)


def test_a_server_that_goes_away_leaves_the_rows_that_were_measured(capsys, data, scripted):
    scripted.fail = 7  # in the second group
    code, _, err = run(capsys, *asked_to_measure())
    assert code == 1
    rows = tables.read(SLUG, data)
    assert f"does not answer; the {len(rows)} rows measured before are kept in" in said(err)
    assert rows
    assert err.splitlines()[-1].startswith("try: the same command")
    scripted.fail = None
    code, _, err = run(capsys, *asked_to_measure())
    assert code == 0, err
    found = tables.read(SLUG, data)
    assert found[: len(rows)] == rows
    assert {s.key for s in toy_networks()} == {row.subject for row in found}
    assert "0 rows in" in run(capsys, *asked_to_measure())[2]


def test_a_runtime_that_breaks_while_timing_is_one_sentence(capsys, data, monkeypatch):
    def lost(calls):
        raise ConnectionResetError("Connection reset by peer")

    loaded = Loaded(run=lambda: np.zeros(1), description={"runtime": "scripted"}, device_ms=lost)
    monkeypatch.setattr(Session, "_load", lambda self, subject: loaded)
    code, _, err = run(capsys, *asked_to_measure())
    assert code == 1
    assert "the runtime failed: Connection reset by peer" in said(err)


def test_a_backend_that_fell_back_is_refused(capsys, data, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda self: ["AzureExecutionProvider"])
    code, _, err = run(capsys, *asked_to_measure("--networks", "1"))
    assert code == 1
    assert "from AzureExecutionProvider" in said(err)
    assert not tables.read(SLUG, data)


def test_the_bar_counts_all_sessions(data, scripted):
    seen = []
    subjects = toy_networks()
    measure.run_subjects(
        subjects,
        find_target("tiny"),
        sessions=2,
        progress=lambda message, done, total: seen.append((done, total)),
        folder=data,
    )
    assert {total for _, total in seen} == {2 * len(subjects)}
    done = [count for count, _ in seen]
    assert done == sorted(done)
    assert done[-1] == 2 * len(subjects)


def test_two_writers_of_one_table_are_refused(capsys, data, scripted):
    with writing(SLUG, data):
        child = "import sys; from nas.cli import main; sys.exit(main(sys.argv[1:]))"
        path = brought(data.parent, ["decoder:taesd@64,5.0"])
        done = subprocess.run(
            [sys.executable, "-c", child, "measure", "--target", "tiny", "--import", str(path)],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1
    assert "another nas measure is writing" in said(done.stderr)


def test_tables_that_cannot_be_written_are_told_before_any_work(capsys, data, monkeypatch):
    def refused(*arguments, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nas.paths.tempfile.TemporaryFile", refused)
    code, _, err = run(capsys, "measure", "--target", "tiny", "--import", str(brought(data.parent, ["a,1"])))
    assert code == 1
    assert f"the latency tables in {data} cannot be written to: Permission denied" in said(err)
    assert "export NAS_DATA=" in err.splitlines()[-1]


def test_an_untuned_target_is_measured_but_not_fitted_unless_asked(capsys, data, scripted):
    sheet_in(data, last="[options]\nuntuned = true")
    fill(find_target("tiny"))
    code, _, err = run(capsys, *asked_to_measure())
    assert code == 0
    assert "no predictor yet: tiny is not fitted" in err
    assert "20 to 50 times slower than onnxruntime" in err
    code, _, err = run(capsys, "measure", "--target", "tiny", "--fit-only")
    assert code == 1
    assert "need not rank networks alike" in said(err)
    assert err.splitlines()[-1] == "try: nas measure --target tiny --fit-only --untuned"
    code, out, _ = run(capsys, "measure", "--target", "tiny", "--fit-only", "--untuned")
    assert code == 0
    assert "held out" in out


def test_like_takes_the_other_targets_subjects_first(data, capsys):
    subjects = fill(sheet_in(data, "other", device="other", backend=None), 4)
    code, out, err = run(capsys, *asked_to_measure("--networks", "4", "--like", "other", "--dry-run", "--json"))
    assert code == 0, err
    assert {one["key"] for one in json.loads(out)} == {s.key for s in subjects}


@pytest.mark.parametrize(
    ("change", "arguments", "code", "sentence"),
    [
        (("conv.macs", "convolve.macs"), ["--fit-only"], 1, "has unknown features convolve.macs"),
        (
            ('"kind": "resnet"', '"kind": "resnett"'),
            ["--dry-run"],
            2,
            "unknown block 'resnett'; did you mean 'resnet'?",
        ),
    ],
)
def test_unknown_operators_and_blocks_of_a_table_are_named(capsys, data, change, arguments, code, sentence):
    fill(find_target("tiny"))
    path = data / f"{SLUG}.subjects.json"
    path.write_text(path.read_text().replace(*change))
    found, _, err = run(capsys, "measure", "--target", "tiny", "--space", str(toy_space().path), *arguments)
    assert found == code
    assert sentence in said(err)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_rows(tmp_path, root):
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/measure_kill.py",
            *("--kills", "2", "--blocks", "2", "--networks", "2", "--seed", "20"),
            *("--out", str(tmp_path / "kill.json")),
        ],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "kill.json").read_text())["identical"] is True


@pytest.mark.slow
def test_a_kill_between_rows_never_leaves_half_a_file(data):
    """A child appends without end and is killed in the middle; what is left is always whole."""
    code = (
        "import sys; from tests.measure_cases import fill; from nas.device import find_target\n"
        "sheet = find_target('tiny')\n"
        "print('ready', flush=True)\n"
        "while True: fill(sheet, sessions=1)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(4.0)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    rows = tables.read(SLUG, data)
    assert len(rows) % 8 == 0
    assert set(tables.subjects(SLUG, data)) in (set(), {s.key for s in toy_networks()})


# Sessions of devices that are somewhere else


def session_of(backend=None):
    subjects = toy_networks()[:3]
    return subjects, Session(
        name="s", sheet=find_target("tiny"), backend=backend, protocol=Protocol(), anchors=subjects[:1], seed=0
    )


def test_a_backend_may_prepare_all_subjects_before_the_first_is_loaded(data, scripted):
    built = []

    def prepare(modules, target, options):
        built.extend(module for module, _ in modules)
        assert scripted.calls == 0

    subjects, session = session_of(types.SimpleNamespace(prepare=prepare))
    scripted.calls = 0
    list(session.measure(subjects))
    assert len(built) == 1 + len(subjects)


def test_what_runs_elsewhere_has_no_cpu_time_here(data, scripted):
    subjects, session = session_of()
    (rows, _, _), *_ = session.measure(subjects)
    assert {(row.statistic, row.latency_ms, row.cpu_samples_ms) for row in rows} == {("min_wall", 2.0, ())}
