"""Scores that outlive their study: what is kept, by what, and what a killed or damaged writer leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from nas import scores
from nas.bench import Point, ProxySettings
from nas.errors import DIVERGED, OUT_OF_MEMORY, NasError
from nas.proxies import Score
from nas.scores import Scores, StoredScore
from nas.space import load_space
from tests.toy_space import TOML, write_space

CURVE = (Point(step=6, train_db=1.5, seconds=0.1), Point(step=12, train_db=2.25, seconds=0.2))
SCORE = Score(value=3.5, value_sd=0.1, text=None, seeds=(3.4, 3.6), curve=CURVE, params=12, seconds=1.5)


@pytest.fixture
def space(tmp_path, monkeypatch):
    monkeypatch.setenv("NAS_CACHE", str(tmp_path / "cache"))
    return load_space(write_space(tmp_path))


@pytest.fixture
def kept(space):
    return Scores(space, "embedded", ProxySettings())


def some(space, n):
    return [space.from_row(row) for row in space.sample(n, 0)]


def stored(candidate, score=SCORE, **rest):
    return StoredScore(row=candidate.row, score=score, curve=CURVE, **rest)


def test_a_score_comes_back_as_it_was(space, kept):
    one, two = some(space, 2)
    assert kept.all() == {}
    kept.keep(one, stored(one))
    kept.keep(two, stored(two, replace(SCORE, text=1.25, text_sd=0.5)))
    again = Scores(space, "embedded", ProxySettings()).all()
    assert again == {one.key: stored(one), two.key: stored(two, replace(SCORE, text=1.25, text_sd=0.5))}
    assert again[one.key].score == SCORE
    assert space.from_row(again[one.key].row) == one


def test_the_last_score_of_a_candidate_counts(space, kept):
    (one,) = some(space, 1)
    kept.keep(one, stored(one))
    kept.keep(one, stored(one, replace(SCORE, value=9.0)))
    assert kept.all()[one.key].score.value == 9.0


def test_another_space_resolution_teacher_or_setting_has_scores_of_its_own(space, kept, tmp_path, monkeypatch):
    (one,) = some(space, 1)
    kept.keep(one, stored(one))
    (tmp_path / "other").mkdir()
    edited = load_space(write_space(tmp_path / "other", text=TOML.replace("a toy", "an edited toy")))
    others = [
        Scores(edited, "embedded", ProxySettings()),
        Scores(space.at_resolution(256), "embedded", ProxySettings()),
        Scores(space, "embedded", ProxySettings(steps=13)),
        Scores(space, "embedded", ProxySettings(proxy="params")),
    ]
    monkeypatch.setattr(scores.quality, "teacher_hash", lambda teacher: "another")
    others.append(Scores(space, "embedded", ProxySettings()))
    assert len({each.path for each in (kept, *others)}) == 6
    assert all(each.all() == {} for each in others)
    assert len(kept.all()) == 1


@pytest.mark.parametrize(
    ("found", "lasting"),
    [
        ({"score": SCORE}, True),
        ({"score": None, "cause": DIVERGED, "state": "untrainable"}, True),
        ({"score": None, "cause": "score not finite", "state": "untrainable"}, True),
        ({"score": None, "cause": OUT_OF_MEMORY, "state": "untrainable"}, False),
        ({"score": None, "state": "stopped"}, False),
        ({"score": None, "state": "failed", "reason": "the disk was full"}, False),
    ],
)
def test_only_what_would_be_the_same_again_is_kept(space, kept, found, lasting):
    (one,) = some(space, 1)
    kept.keep(one, StoredScore(row=one.row, **found))
    assert (one.key in kept.all()) == lasting
    assert kept.path.is_file() == lasting


def test_half_a_last_line_is_not_read_and_dropped_by_the_next_writer(space, kept):
    one, two, three = some(space, 3)
    kept.keep(one, stored(one))
    kept.keep(two, stored(two))
    whole = kept.path.read_bytes()
    kept.path.write_bytes(whole[:-7])
    assert set(kept.all()) == {one.key}
    kept.keep(three, stored(three))
    assert set(kept.all()) == {one.key, three.key}
    kept.path.write_bytes(b'{"sche')  # killed while the first line was written
    assert kept.all() == {}
    kept.keep(two, stored(two))
    assert kept.all() == {two.key: stored(two)}
    assert json.loads(kept.path.read_text().splitlines()[0])["space"] == "toy"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text.replace('"row"', '"raw"'), "damaged .KeyError: 'row'"),
        (lambda text: text.replace("{", "", 1), "damaged .JSONDecodeError"),
        (lambda text: text.replace('"schema": 1', '"schema": 9'), "are of other settings"),
    ],
)
def test_a_damaged_file_is_one_sentence_that_says_what_to_do(space, kept, damage, said):
    (one,) = some(space, 1)
    kept.keep(one, stored(one))
    kept.path.write_text(damage(kept.path.read_text()))
    with pytest.raises(NasError, match=said) as caught:
        kept.all()
    assert str(kept.path) in caught.value.message
    assert "--no-reuse" in str(caught.value.hint)


def test_a_file_that_cannot_be_written_is_one_sentence(space, kept):
    (one,) = some(space, 1)
    kept.path.mkdir()
    with pytest.raises(NasError, match=r"cannot write .*: Is a directory"):
        kept.keep(one, stored(one))


_WRITER = """
import sys
from nas.proxies import Score
from nas.bench import ProxySettings
from nas.scores import Scores, StoredScore
from nas.space import load_space
space = load_space(sys.argv[1])
kept = Scores(space, "embedded", ProxySettings())
for row in space.sample(40, 0)[int(sys.argv[2])::2]:
    candidate = space.from_row(row)
    kept.keep(candidate, StoredScore(row=candidate.row, score=Score(value=float(sys.argv[2]), seeds=(0.5,) * 200)))
"""


def test_two_searches_append_at_once_and_lose_nothing(space, kept):
    running = [subprocess.Popen([sys.executable, "-c", _WRITER, str(space.path), str(half)]) for half in (0, 1)]
    assert [process.wait(120) for process in running] == [0, 0]
    rows = [space.from_row(row) for row in space.sample(40, 0)]
    found = kept.all()
    assert {key: each.score.value for key, each in found.items()} == {
        candidate.key: float(i % 2) for i, candidate in enumerate(rows)
    }
