"""Studies in storages of every kind: PostgreSQL, SQLite, Optuna's gRPC proxy; unreachable, lost, and back again."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nas.errors import NasError, UsageError
from nas.space import load_space
from nas.study import Study, runner
from nas.study.storage import Patience, open_storage, shown
from tests.study_cases import TOML, FakeEvaluator, Inline, run, toy_plan

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import _postgresql

needs_postgresql = pytest.mark.skipif(_postgresql.binaries() is None, reason="PostgreSQL is not installed")


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "POLL_S", 0.02)
    return toy_plan(tmp_path, monkeypatch, trials=8)


@pytest.fixture(scope="module")
def server():
    with _postgresql.server() as running:
        yield running


def comparable(trials):
    return [(t.number, t.state, t.evaluation, t.curve) for t in trials]


@needs_postgresql
def test_a_study_in_postgresql_has_the_trials_of_one_in_a_journal(plan, server, tmp_path):
    whole, _ = run(plan, tmp_path / "journal")
    there = replace(plan, storage=server.url)
    half, asked = run(replace(there, trials=4), tmp_path / "database")
    assert len(asked) == 4
    assert comparable(half) == comparable(whole)[: len(half)]
    resumed, _ = run(there, tmp_path / "database")
    assert comparable(resumed) == comparable(whole)


@needs_postgresql
def test_two_studies_of_one_name_with_different_spaces_are_refused(plan, server, tmp_path):
    there = replace(plan, storage=server.url, trials=1)
    run(there, tmp_path / "same", name="one name")
    path = tmp_path / "toy.toml"
    path.write_text(TOML + "\n")
    other = replace(there, evaluator=FakeEvaluator(load_space(path)))
    with pytest.raises(
        NasError, match=r"the study in postgresql.*\(one name\) was made with other settings: space_hash"
    ):
        run(other, tmp_path / "another", name="one name")


@needs_postgresql
def test_a_study_that_is_not_there_is_not_made_by_a_worker(plan, server):
    with pytest.raises(NasError, match="the storage has no study 'nosuch'"):
        Study(replace(plan, storage=server.url), None, name="nosuch", joins=True).__enter__()


@needs_postgresql
def test_a_storage_that_is_lost_and_comes_back_loses_nothing(plan, server, tmp_path):
    said = []
    (tmp_path / "a").mkdir()

    class Pulled(Inline):
        """Pulls the plug while the third proxy runs, and puts it in again two seconds later."""

        def submit(self, *arguments):
            future = super().submit(*arguments)
            if len(self.asked) == 3:
                server.stop()
                threading.Timer(2.0, server.start).start()
            return future

    executor = Pulled()
    there = replace(plan, storage=server.url)
    progress = lambda stage, done, total, note: said.append((stage, note))  # noqa: E731
    with Study(there, tmp_path / "a", progress, executor, name="lost") as study:
        study.run()
        trials = study.trials()
    assert len(executor.asked) == len(set(executor.asked)) == 8
    assert sum(t.round is not None for t in trials) == 8
    assert any(stage == "storage" and "cannot be reached; trying again" in note for stage, note in said)


@needs_postgresql
def test_a_storage_that_stays_away_ends_the_search_with_how_to_go_on(plan, server, tmp_path, monkeypatch):
    monkeypatch.setattr("nas.study.study.PATIENCE_S", 0.7)
    (tmp_path / "a").mkdir()

    class Pulled(Inline):
        def submit(self, *arguments):
            future = super().submit(*arguments)
            if len(self.asked) == 3:
                server.stop()
            return future

    there = replace(plan, storage=server.url)
    try:
        with pytest.raises(NasError, match="was lost and did not come back") as caught:  # noqa: SIM117
            with Study(there, tmp_path / "a", executor=Pulled(), name="gone") as study:
                study.run()
        assert "the same command resumes" in caught.value.hint
    finally:
        server.start()
    trials, asked = run(there, tmp_path / "a", name="gone")
    assert sum(t.round is not None for t in trials) == 8
    assert len(asked) == 6  # the third's result was not heard, so it is run again


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_study_behind_optunas_grpc_proxy(plan, tmp_path):
    pytest.importorskip("grpc")
    whole, _ = run(plan, tmp_path / "journal")
    port = free_port()
    program = (
        "import optuna; optuna.storages.run_grpc_proxy_server("
        f"optuna.storages.get_storage('sqlite:///{tmp_path}/behind.db'), host='127.0.0.1', port={port})"
    )
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program])
    try:
        there = replace(plan, storage=f"grpc://127.0.0.1:{port}")
        until = time.monotonic() + 60
        while True:
            try:
                trials, _ = run(there, tmp_path / "proxy")
                break
            except NasError:  # it is still starting
                assert time.monotonic() < until
        assert comparable(trials) == comparable(whole)
        assert run(there, tmp_path / "proxy", joins=True)[1] == []
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("url", "kind", "said"),
    [
        ("somewhere", UsageError, "storage 'somewhere' is not a URL; known are postgresql://"),
        ("grpc://nowhere", UsageError, "is not of the form grpc://HOST:PORT"),
        ("postgresql://nas:secret@127.0.0.1:1/none", NasError, r"nas:\*\*\*@127\.0\.0\.1:1/none cannot be reached"),
        ("nosuch://x/y", NasError, "cannot be reached"),
    ],
)
def test_a_storage_that_cannot_be_reached_is_one_sentence(url, kind, said):
    with pytest.raises(kind, match=said) as caught:
        open_storage(url, None)
    assert "\n" not in caught.value.message
    assert "secret" not in caught.value.message


def test_a_password_is_never_shown():
    assert shown("postgresql://nas:secret@host/db", None) == "postgresql://nas:***@host/db"


def test_only_a_lost_storage_is_waited_for():
    with pytest.raises(ZeroDivisionError):
        Patience("it", lambda note: None)(lambda: 1 // 0)
