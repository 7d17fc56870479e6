"""nas.fidelity: its tables, which candidates are chosen, and the rows of a score and of a long run."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_lesson import candidate, write_teacher

from nas import quality
from nas.bench import Bench, ProxySettings
from nas.errors import NasError
from nas.fidelity import Samples, Table, long_run, score_row, settings_key, spread_out, value_of
from nas.space import load_space

SETTINGS = ProxySettings(width_divisor=32, norm_groups=2, steps=3, batch=4, held_rows=16)


@pytest.fixture
def teacher(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("NAS_CACHE", str(tmp_path / "cache"))
    return write_teacher(tmp_path)


def test_a_table_is_taken_up_again_and_keeps_what_is_not_its_own(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    mine = Table(path, "one", ("space", "key"))
    mine.add({"space": "a", "key": "k", "value": 1.5})
    Table(path, "two", ("space", "key")).add({"space": "a", "key": "k", "value": 9, "more": "x"})
    again = Table(path, "one", ("space", "key"))
    assert ("a", "k") in again
    assert ("a", "other") not in again
    assert len(again) == 1
    again.add({"space": "a", "key": "k", "value": 2.5})  # replaced, not doubled
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["digest"], row["value"], row["more"]) for row in rows] == [("two", "9", "x"), ("one", "2.5", "")]


def test_candidates_are_spread_over_the_latencies():
    space = load_space("snapgen_unet")
    pool = space.sample(400, 3)
    latency = np.random.default_rng(0).permutation(400).astype(float)
    chosen = spread_out(space, 12, 3, latency, pool)
    references = [space.reference(each.name).key for each in space.starting]
    assert [each.key for each in chosen[: len(references)]] == references
    assert len({each.key for each in chosen}) == 12
    place = {space.from_row(row).key: int(ms) for row, ms in zip(pool, latency, strict=True)}
    width = 400 / (12 - len(references))
    assert [int(place[each.key] // width) for each in chosen[len(references) :]] == list(range(12 - len(references)))


def test_a_score_is_the_proxys_with_its_curve(teacher):
    row = score_row(candidate(), teacher, SETTINGS)
    plain = quality.score(candidate(), teacher, SETTINGS)
    assert row["value"] == pytest.approx(plain.value, abs=1e-5)
    assert row["text"] == pytest.approx(plain.text, abs=1e-5)
    assert [point[0] for point in json.loads(row["curve"])] == [1, 2, 3]
    assert row["failed"] == ""
    assert row["params"] == plain.params
    assert (value_of(row), value_of({"value": ""}), value_of({})) == (row["value"], None, None)


def test_a_score_that_fails_says_why(teacher, monkeypatch):
    def fail(*given):
        raise NasError("training diverged: loss is nan")

    monkeypatch.setattr(quality, "score", fail)
    row = score_row(candidate(), teacher, SETTINGS)
    assert row["failed"] == "training diverged: loss is nan"
    assert value_of(row) is None


def test_a_long_run_is_a_row(teacher):
    bench = Bench(teacher, replace(SETTINGS, steps=40))
    row = long_run(candidate(), bench, 100, Samples(prompts=2, steps=1))
    steps, _, train_db, quality_db, text_db = zip(*json.loads(row["curve"]), strict=True)
    assert steps == (10, 20, 40)
    assert quality_db[-1] == row["quality_db"] > quality_db[0]
    assert text_db[-1] == row["text_db"]
    assert train_db[-1] > train_db[0]
    assert all(0 <= row[name] <= 1 for name in ("count", "colour", "shape", "relation", "all"))


def test_rows_of_other_settings_are_told_apart(teacher):
    bench = Bench(teacher, SETTINGS)
    keys = {
        settings_key(bench),
        settings_key(bench, Samples()),
        settings_key(bench, Samples(prompts=3)),
        settings_key(Bench(teacher, replace(SETTINGS, lr=1e-4))),
        settings_key(Bench(teacher, replace(SETTINGS, precision="bf16"))),
    }
    assert len(keys) == 5
    assert settings_key(bench) == settings_key(Bench(teacher, SETTINGS))
