"""`nas worker`: a process that joins a search, and why one may not."""

from __future__ import annotations

import json

import pytest

import nas
from nas.cli import main
from nas.errors import UsageError
from nas.proxies import settings_of
from nas.search import SearchSettings, plan_search
from nas.search.joining import Joined
from nas.study import Study
from tests.toy_space import write_space


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return SearchSettings(
        space=str(write_space(tmp_path)),
        budgets=("9ms/step@iphone",),
        trials=3,
        jobs=1,
        proxy=settings_of("params", steps=1, batch=2, held_rows=8),
        out=tmp_path / "study",
        reuse=False,
    )


@pytest.fixture
def begun(settings, tmp_path):
    """A search that another process has begun and holds open."""
    (tmp_path / "study").mkdir()
    with Study(plan_search(settings), tmp_path / "study") as study:
        yield study


@pytest.mark.slow
def test_a_worker_does_the_trials_of_a_search(begun, tmp_path, capsys):
    assert main(["worker", str(tmp_path / "study"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["mine"], found["proxied"], found["trials"]) == (3, 3, 3)
    assert [t.state for t in begun.trials() if t.round is not None] == ["proxied"] * 3
    assert main(["worker", str(tmp_path / "study")]) == 0
    assert "0 proxy runs done here" in capsys.readouterr().out


def test_a_worker_of_another_version_is_refused(begun, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nas, "__version__", "9.9.9")
    assert main(["worker", str(tmp_path / "study")]) == 1
    assert "is searched by nas 0.1.0, and this machine has 9.9.9" in capsys.readouterr().err


def test_a_worker_whose_space_file_differs_is_refused(begun, settings, tmp_path, capsys):
    path = tmp_path / "toy.toml" if (tmp_path / "toy.toml").exists() else begun.space.path
    path.write_text(path.read_text() + "\n# another line\n")
    assert main(["worker", str(tmp_path / "study")]) == 1
    assert "space_hash is" in capsys.readouterr().err


def test_where_no_search_is_there_is_nothing_to_join(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["worker", "nosuch"]) == 1
    assert "nosuch holds no study that can be joined" in capsys.readouterr().err


def test_what_is_asked_for_reaches_the_search(tmp_path, capsys, monkeypatch):
    (tmp_path / "reports" / "one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    asked = {}

    def join_search(name, **own):
        asked.update(name=name, **own)
        return Joined(study="reports/one", mine=2, proxied=5, trials=9)

    monkeypatch.setattr("nas.search.joining.join_search", join_search)
    options = ["--jobs", "4", "--train-on", "cuda", "--ray", "auto", "--gpus-per-proxy", "0.5"]
    assert main(["worker", "one", *options]) == 0
    assert asked.pop("progress") is not None
    assert asked == {
        "name": "reports/one",
        "storage": None,
        "jobs": 4,
        "train_on": "cuda",
        "ray": "auto",
        "cpus_per_proxy": 1.0,
        "gpus_per_proxy": 0.5,
    }
    assert "2 proxy runs done here; reports/one has 5 of 9" in capsys.readouterr().out


def test_settings_reach_another_machine_as_they_are(settings):
    plan = plan_search(settings)
    there = SearchSettings.from_json(json.loads(json.dumps(plan.settings)), jobs=3)
    again = plan_search(there)
    assert (again.fixed(), again.terms(), again.jobs) == (plan.fixed(), plan.terms(), 3)
    with pytest.raises(UsageError, match="--jobs must be at least 1"):
        plan_search(SearchSettings.from_json(plan.settings, jobs=0))
