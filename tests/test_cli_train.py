"""`nas train` on the command line: what it prints, its sentences and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_lesson import SMALLEST
from train_cases import SMALL, TWO_STAGES

from nas.cli import main
from nas.cli.training import DEFAULT_RECIPE
from nas.students import load_student
from nas.train import recipes

CHOICES = ",".join(f"{name}={value}" for name, value in SMALLEST.items())
CANDIDATE = ("--space", "snapgen_unet", "--candidate", CHOICES)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.train.rehearsal._STEPS", 2)


@pytest.fixture
def two(tmp_path: Path) -> str:
    path = tmp_path / "two.toml"
    path.write_text(TWO_STAGES)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["train", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def sets(changes: tuple[str, ...] = SMALL) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def test_the_default_recipe_is_there() -> None:
    assert DEFAULT_RECIPE in recipes()


def test_a_candidate_is_trained_and_the_next_command_is_told(
    capsys: pytest.CaptureFixture[str], teacher: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    asked = [*CANDIDATE, "--teacher", teacher, "--steps", "2", *sets(), "--out", str(out)]
    code, said, progress = run(capsys, *asked)
    assert code == 0, progress
    assert "54,996 parameters trained for 2 steps in" in said
    assert "student, held-out captions" in said
    assert f"curves: tensorboard --logdir {out}" in said
    assert said.splitlines()[-2:] == [f"wrote {out / 'network.safetensors'}", f"next: nas sample {out}"]
    assert "distil 2/2" in progress
    assert load_student(out).about["recipe"] == "shapes"
    code, said, _ = run(capsys, *asked, "--json")
    found = json.loads(said[: said.rindex("}") + 1])
    assert (code, found["resumed_from"], found["recipe"]) == (0, 2, "shapes")
    code, _, error = run(capsys, *asked, "--no-resume")
    assert code == 1
    assert "already holds a run" in error


def test_a_recipe_of_the_teachers_own_network_needs_no_candidate(
    capsys: pytest.CaptureFixture[str], teacher: str, two: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, error = run(capsys, "--recipe", two, "--teacher", teacher, "--steps", "2")
    assert code == 0, error
    assert said.splitlines()[-1] == "next: nas sample runs/two"
    assert "distil" in said
    assert "few" in said


def test_a_dry_run_prints_the_recipe_and_what_it_takes(
    capsys: pytest.CaptureFixture[str], teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = [*CANDIDATE, "--teacher", teacher, "--steps", "50", *sets(), "--set", "student.inherit=true", "--dry-run"]
    code, said, error = run(capsys, *asked)
    assert code == 0, error
    assert not list(tmp_path.iterdir())
    assert "steps = 50\n" in said
    assert "width_divisor = 32\n" in said
    assert "of the student's parameters come from the teacher" in said
    for word in ("steps/s", "activations", "total", "training would take about"):
        assert word in said
    code, said, _ = run(capsys, *asked, "--json")
    found = json.loads(said[: said.rindex("}") + 1])
    (stage,) = found["stages"]
    assert stage["params"] == 54_996
    assert stage["memory"]["total"] > 4 * stage["params"]
    assert found["recipe"]["stage"][0]["steps"] == 50


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--recipe", "snapgne"], 2, "nas: unknown recipe 'snapgne'; did you mean 'snapgen'"),
        (["--recipe", "koala-tiny", "--set", "lrr=1"], 2, "did you mean 'lr'"),
        (["--recipe", "koala-tiny", "--steps", "0"], 2, "for '--steps'"),
        (["--recipe", "koala-tiny", "--precision", "fp61"], 2, "unknown precision 'fp61'; did you mean 'fp16'"),
        (["--recipe", "koala-tiny", "--device", "gpu"], 2, "unknown device to train on 'gpu'"),
        (["--recipe", "koala-tiny", "--reference", "snapgen"], 2, "need --space"),
        (["--recipe", "koala-tiny", "--teacher", "nowhere.safetensors"], 1, "the teacher file nowhere.safetensors"),
        (["--recipe", "koala-tiny", "--data", "nowhere"], 2, "neither a folder nor a task"),
        ([*CANDIDATE, "--recipe", "koala-tiny"], 2, "so it takes no candidate"),
        ([], 2, "recipe shapes needs a network to train"),
        (["no-such-study"], 2, "unknown study 'no-such-study'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, said, error = run(capsys, *arguments)
    assert found == code, error
    assert not said
    assert sentence in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_other_processes_of_a_launch_are_silent(
    capsys: pytest.CaptureFixture[str], teacher: str, two: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    code, said, progress = run(
        capsys, "--recipe", two, "--teacher", teacher, "--steps", "2", "--dry-run", "--out", str(tmp_path / "run")
    )
    assert code == 0
    assert not said
    assert "train" not in progress
