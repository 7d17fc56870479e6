"""`nas fidelity` as it is typed: refusals, a test from start to card, and one that was stopped."""

from __future__ import annotations

import json
import math

import pytest
from tiny_lesson import write_teacher
from toy_space import ToyPredictor, write_space

from nas import quality
from nas.bench import Bench
from nas.cli import main
from nas.errors import NasError
from nas.fidelity import test as testing
from nas.space import load_space


class World:
    """Stands in for training: what a candidate comes to follows from its choices."""

    def __init__(self) -> None:
        self.scored: list[str] = []
        self.trained: list[tuple[str, int]] = []
        self.stop_after = 1000
        self.diverges: set[str] = set()

    def truth(self, candidate) -> float:
        choices = candidate.choices
        wide = 0.1 * choices["width_1"] / 64 + 0.05 * choices["width_0"] / 64 + 0.02 * (choices["conv_0"] == "full")
        return 2 + 0.3 * choices["resnets_0"] + 0.6 * choices["depth_1"] + wide  # no two alike

    def score(self, candidate, teacher, settings):
        self.scored.append(candidate.key)
        value = self.truth(candidate) / 2
        return {"value": value, "text": "", "cpu_s": 1.5, "seconds": 2.0, "failed": ""}

    def long_run(self, candidate, bench, seed, samples):
        if len(self.trained) == self.stop_after:
            raise KeyboardInterrupt
        self.trained.append((candidate.key, seed))
        if candidate.key in self.diverges:
            raise NasError("training diverged")
        value = self.truth(candidate) + 0.01 * (seed - 100)
        curve = [[60, 1, 1, value - 1, 0.1], [120, 2, 2, value - 0.5, 0.1], [240, 4, 2, value, 0.2]]
        return {"quality_db": value, "text_db": value / 4, "curve": json.dumps(curve)}


@pytest.fixture
def world(tmp_path, monkeypatch) -> World:
    """A folder with a toy space and a tiny teacher, where nothing is trained."""
    made = World()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NAS_DATA", str(tmp_path))
    write_space(tmp_path)
    write_teacher(tmp_path)
    monkeypatch.setattr(testing, "load_predictor", lambda slug: ToyPredictor())
    monkeypatch.setattr(testing, "find_target", lambda name: _Sheet())
    monkeypatch.setattr(testing, "score_row", made.score)
    monkeypatch.setattr(testing, "long_run", made.long_run)
    monkeypatch.setattr(quality, "prepare", lambda *given: None)
    monkeypatch.setattr(Bench, "prepare", lambda self, on_progress=None: None)
    return made


class _Sheet:
    slug = "toy--none--fp32"


def line(*more: str) -> list[str]:
    asked = ["--space", "toy.toml", "--teacher", "teacher-0.safetensors", "--long-steps", "240", "--jobs", "1"]
    return ["fidelity", *asked, *(more if "--candidates" in more else ("--candidates", "9", *more))]


def test_from_start_to_card(world, tmp_path, capsys):
    assert main(line("--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(world.scored) == len(set(world.scored)) == 9
    assert [seed for _, seed in world.trained] == [100] * 9 + [101] * 3
    assert found["agreement"][0]["kendall"] == 1
    assert found["agreement"][0]["kendall_low"] == 1
    assert found["agreement"][1]["predictor"] == "parameters"
    assert found["agreement"][1]["kendall"] < 0.9
    assert found["text_agreement"][0]["predictor"] == "proxy score, which has no text part"
    assert found["seconds_per_candidate"] == 1.5
    assert found["reliability"]["seed_sd"] == pytest.approx(0.01 / math.sqrt(2), abs=5e-4)
    assert found["plateau"] == {"second_half_gain_db": 0.5, "kendall_half_way": 1.0}
    # Searches with these settings find it, and only with this teacher's file.
    card = quality.fidelity(quality.ProxySettings(), "teacher-0.safetensors", "toy")
    assert card is not None
    assert card["candidates"] == 9
    assert card["proxy"]["proxy"] == quality.ProxySettings().proxy
    assert quality.fidelity(quality.ProxySettings(steps=3), "teacher-0.safetensors", "toy") is None


def test_the_answer_is_in_plain_words(world, tmp_path, capsys):
    assert main(line()) == 0
    out = capsys.readouterr().out
    assert "9 candidates of toy were trained for 240 steps" in out
    assert "puts 100% of all pairs in the same order" in out
    assert "verdict:" in out
    assert "wrote reports/proxy/card-toy-" in out
    assert out.splitlines()[-1].startswith("next: nas ")


def test_a_stopped_test_goes_on(world, tmp_path, capsys):
    world.stop_after = 5
    assert main(line()) == 130
    assert "stopped; go on with: nas" in capsys.readouterr().err
    before = list(world.trained)
    assert len(before) == 5
    world.stop_after = 1000
    assert main(line()) == 0
    assert len(world.scored) == 9
    assert len(world.trained) == len(set(world.trained)) == 12
    assert world.trained[:5] == before
    assert main(line()) == 0  # and a third time nothing is left to do
    assert len(world.trained) == 12
    assert "9 candidates" in capsys.readouterr().out


def test_long_runs_that_diverge_are_left_out(world, tmp_path, capsys):
    space = load_space("toy.toml")
    world.diverges = {space.reference("known").key}
    assert main(line("--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["candidates"], found["not_trained"]) == (8, 1)
    assert main(line("--candidates", "8")) == 1
    assert "only 7 of 8 candidates could be trained long" in capsys.readouterr().err


def test_a_dry_run_trains_nothing(world, capsys):
    assert main(line("--dry-run", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["candidates"], found["long_runs"], found["long_steps"]) == (9, 12, 240)
    assert not world.scored
    assert main(line("--dry-run")) == 0
    assert "long runs   12 of 240 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--candidates", "7"], "--candidates must be at least 8"),
        (["--long-steps", "20"], "--long-steps must be at least 120, 10 times the 12 of the proxy"),
        (["--proxy", "distil"], "unknown proxy 'distil'; did you mean 'distill'?"),
        (["--space", "snapgen_unte"], "did you mean 'snapgen_unet'?"),
        (["--candidates", "500"], "different candidates of the 500"),
    ],
    ids=["few candidates", "short runs", "proxy", "space", "more than there are"],
)
def test_what_cannot_be_tested_is_refused(world, capsys, monkeypatch, more, words):
    if "snapgen_unte" in more:
        monkeypatch.delenv("NAS_DATA")
    assert main([*line(), *more]) == 2
    assert words in capsys.readouterr().err
    assert not world.scored


def test_a_teacher_that_is_not_there_is_said_before_anything_runs(world, capsys):
    assert main([*line(), "--teacher", "nowhere.safetensors"]) in (1, 2)
    assert "nowhere.safetensors" in capsys.readouterr().err
    assert not world.scored
