"""The search loop, with a priced toy space and an instant proxy: killed at any write, it resumes to the same trials."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

from nas import quality, sampler
from nas.errors import NasError
from nas.space import load_space
from nas.study import Study, distributions, runner
from nas.study.propose import Proposer
from tests.study_cases import TOML, FakeEvaluator, Inline, run, toy_plan


@pytest.fixture
def plan(tmp_path, monkeypatch):
    return toy_plan(tmp_path, monkeypatch, proxy=quality.ProxySettings(), trials=10, seed=3, prune=0.95)


@pytest.fixture
def front_plan(plan):
    """The same with the default sampler."""
    return replace(plan, sampler="front")


def comparable(trials):
    return [(t.number, t.state, t.evaluation, t.curve, t.saved_s) for t in trials]


def test_only_what_the_sampler_is_shown_has_distributions_that_are_not_copied(plan):
    for each in distributions(plan.evaluator.space).values():
        stored = optuna.distributions.distribution_to_json(each)
        assert optuna.distributions.json_to_distribution(stored) == each, "any storage can keep it"
        assert copy.deepcopy(each) is not each
    shown = Proposer(plan.evaluator, "random", 0)._distributions
    assert list(shown) == list(distributions(plan.evaluator.space))
    assert all(copy.deepcopy(each) is each for each in shown.values())


def test_runs_as_many_proxies_as_asked_and_the_reference_first(plan, tmp_path):
    trials, asked = run(plan, tmp_path / "a")
    states = [t.state for t in trials]
    assert sum(t.round is not None for t in trials) == 10 == len(asked)
    assert states.count("proxied") > 5
    assert trials[0].evaluation.source == "reference:known"
    assert len(set(asked)) == len(asked)


def test_a_candidate_over_budget_is_never_proxied_but_a_reference_is(plan, tmp_path):
    trials, asked = run(replace(plan, trials=18), tmp_path / "a")
    over = [t for t in trials if not t.evaluation.feasible and t.evaluation.source == "search"]
    assert over
    assert all(t.state in ("infeasible", "duplicate") and t.evaluation.quality is None for t in over)
    assert asked[0] == plan.evaluator.space.reference("known").key
    assert not trials[0].evaluation.feasible


def test_stops_by_itself_when_the_feasible_space_is_exhausted(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "EXHAUSTED", 40)
    space = plan.evaluator.space
    feasible = {e.key for e in plan.evaluator.price(list(space.enumerate())) if e.feasible}
    _, asked = run(replace(plan, trials=500), tmp_path / "a")
    assert len(asked) == len(set(asked)) <= len(feasible) + 1
    assert len(asked) >= 0.8 * len(feasible)


def test_the_same_seed_gives_the_same_trials_and_another_seed_others(plan, tmp_path):
    first, second = run(plan, tmp_path / "a")[0], run(plan, tmp_path / "b")[0]
    other = run(replace(plan, seed=4), tmp_path / "c")[0]
    assert comparable(first) == comparable(second)
    assert comparable(first) != comparable(other)


def test_a_finished_study_is_extended_without_repeating_anything(plan, tmp_path):
    first, _ = run(plan, tmp_path / "a")
    again, asked = run(plan, tmp_path / "a")
    assert asked == []
    assert comparable(again) == comparable(first)
    more, asked = run(replace(plan, trials=14), tmp_path / "a")
    assert len(asked) == 4
    assert comparable(more)[: len(first)] == comparable(first)


def test_the_default_sampler_proposes_nothing_twice_and_nothing_over_the_budget(front_plan, tmp_path):
    trials, asked = run(replace(front_plan, trials=20), tmp_path / "a")
    assert len(asked) == 20 == len(set(asked))
    assert {t.state for t in trials} <= {"proxied", "stopped", "infeasible"}
    assert all(t.round is not None for t in trials)
    searched = [t for t in trials if t.evaluation.source == "search"]
    assert all(t.evaluation.feasible or t.cause for t in searched)


@pytest.mark.parametrize(
    ("seeds", "wanted"), [((0,), None), ((0, 1), 0.01 / 2**0.5), ((0, 1, 2), 0.01 * (math.pi / 6) ** 0.5)]
)
def test_how_far_the_seeds_of_a_score_lie_apart_is_told_the_sampler(front_plan, tmp_path, monkeypatch, seeds, wanted):
    told, make = [], sampler.make

    def listening(name, **given):
        told.append(given["noise_sd"])
        return make(name, **given)

    monkeypatch.setattr(sampler, "make", listening)
    run(replace(front_plan, trials=8, proxy=replace(front_plan.proxy, seeds=seeds), prune=None), tmp_path / "a")
    assert told[0] is None  # before there is a score
    assert told[-1] == (None if wanted is None else pytest.approx(wanted))


def test_the_default_sampler_ends_when_every_candidate_within_the_budget_was_tried(front_plan, tmp_path):
    space = front_plan.evaluator.space
    feasible = {e.key for e in front_plan.evaluator.price(list(space.enumerate())) if e.feasible}
    _, asked = run(replace(front_plan, trials=500, prune=None), tmp_path / "a")
    assert set(asked) == feasible | {space.reference("known").key}
    assert len(asked) == len(set(asked))


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.mark.parametrize("moment", ["before", "after", "torn"])
def test_killed_at_any_journal_write_and_resumed_ends_with_the_same_trials(plan, tmp_path, monkeypatch, moment):
    plan = replace(plan, seed=6, trials=12)
    whole, _ = run(plan, tmp_path / "peace")
    assert "stopped" in [t.state for t in whole]
    append = optuna.storages.journal.JournalFileBackend.append_logs
    calls = {"n": 0, "die_at": 10**9}

    def dying(self, logs):
        calls["n"] += 1
        if calls["n"] > calls["die_at"]:
            raise Killed  # the dead write nothing: no farewell either
        if calls["n"] == calls["die_at"]:
            if moment != "before":
                append(self, logs)
            if moment == "torn":
                path = Path(self._file_path)
                path.write_bytes(path.read_bytes()[:-9])
            raise Killed
        append(self, logs)

    monkeypatch.setattr(optuna.storages.journal.JournalFileBackend, "append_logs", dying)
    calls["n"] = 0
    run(plan, tmp_path / "count")
    total = calls["n"]
    assert total > 40
    for index, die_at in enumerate(range(1, total, total // 8)):
        folder = tmp_path / f"killed{index}"
        folder.mkdir()
        calls.update(n=0, die_at=die_at)
        with pytest.raises(Killed), Study(plan, folder, executor=Inline()) as opened:
            opened.run()
        calls.update(n=0, die_at=10**9)
        resumed, _ = run(plan, folder)
        assert comparable(resumed) == comparable(whole), f"killed {moment} write {die_at}"


@pytest.mark.parametrize("sampler", ["tpe", "front", "nsga2"])
def test_killed_again_and_again_it_still_gets_there(plan, tmp_path, monkeypatch, sampler):
    plan = replace(plan, sampler=sampler)
    whole, _ = run(plan, tmp_path / "peace")
    append = optuna.storages.journal.JournalFileBackend.append_logs
    generator = np.random.default_rng(0)
    calls = {"left": 0}

    def dying(self, logs):
        calls["left"] -= 1
        if calls["left"] < 0:
            raise Killed
        append(self, logs)

    monkeypatch.setattr(optuna.storages.journal.JournalFileBackend, "append_logs", dying)
    folder = tmp_path / "killed"
    folder.mkdir()
    for _ in range(5):
        calls["left"] = int(generator.integers(5, 60))
        try:
            with Study(plan, folder, executor=Inline()) as opened:
                opened.run()
        except Killed:
            continue
    calls["left"] = 10**9
    assert comparable(run(plan, folder)[0]) == comparable(whole)


def test_a_journal_of_another_space_version_is_refused_with_the_difference(plan, tmp_path):
    run(plan, tmp_path / "a")
    path = tmp_path / "toy.toml"
    path.write_text(TOML.replace("width = [1, 2, 3, 4, 5]", "width = [1, 2, 3, 4, 5, 6]"))
    changed = replace(plan, evaluator=FakeEvaluator(load_space(path)))
    with pytest.raises(NasError, match="space_hash was"):
        run(changed, tmp_path / "a")


def test_a_damaged_journal_is_one_sentence(plan, tmp_path):
    folder = tmp_path / "a"
    run(plan, folder)
    lines = (folder / "journal.log").read_text().splitlines()
    lines[2] = "{half a rec"
    (folder / "journal.log").write_text("\n".join(lines) + "\n")
    with pytest.raises(NasError, match=r"journal.log is damaged"):
        run(plan, folder)


def test_two_searches_cannot_share_a_folder(plan, tmp_path):
    (tmp_path / "a").mkdir()
    with Study(plan, tmp_path / "a", executor=Inline()), pytest.raises(NasError, match="another search is running"):
        Study(plan, tmp_path / "a", executor=Inline()).__enter__()
    with Study(plan, tmp_path / "a", executor=Inline()):
        pass


def test_the_identity_survives_json(plan):
    assert plan.identity() == json.loads(json.dumps(plan.identity()))
