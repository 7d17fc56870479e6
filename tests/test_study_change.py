"""A study goes on under other terms where its scores stay true, and is refused where they do not; schema 1 too."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import optuna
import pytest

from nas import quality
from nas.errors import NasError
from nas.record import front
from nas.scores import StoredScore
from nas.study import Study
from nas.study.facts import read
from nas.study.ledger import Ledger
from nas.study.plan import SCHEMA
from tests.study_cases import FakeEvaluator, Inline, run, toy_plan

FIRST = Path(__file__).with_name("schema1_journal.log")  # written by version 0.1.0 with the toy space of study_cases


@pytest.fixture
def plan(tmp_path, monkeypatch):
    return toy_plan(tmp_path, monkeypatch, prune=0.95)


def under(plan, ms, **changes):
    return replace(plan, evaluator=plan.evaluator.within(ms), **changes)


def opened(plan, folder):
    """The trials of a study under a plan, without running anything."""
    with Study(plan, folder, executor=Inline()) as study:
        return study.trials(), study.changes


def test_a_tighter_budget_is_priced_anew_and_nothing_is_run_again(plan, tmp_path):
    before, _ = run(plan, tmp_path / "a")
    after, changes = opened(under(plan, 25.0), tmp_path / "a")
    assert changes == ("budgets was ['35ms/step@toy'], is now ['25ms/step@toy']",)
    scores = {t.evaluation.key: t.evaluation.quality for t in before if t.state == "proxied"}
    assert {t.evaluation.key: t.evaluation.quality for t in after if t.state == "proxied"} == scores
    assert max(e.latency_high_ms for e in front(after)) <= 25.0 < max(e.latency_high_ms for e in front(before))
    again, asked = run(under(plan, 25.0), tmp_path / "a")
    assert asked == []
    assert [t.state for t in again] == [t.state for t in after]
    assert opened(under(plan, 25.0), tmp_path / "a")[1] == ()


def test_a_looser_budget_lets_in_what_was_over_it(plan, tmp_path):
    before, _ = run(plan, tmp_path / "a")
    over = {t.evaluation.key for t in before if t.state == "infeasible" and not t.cause}
    assert over
    after, asked = run(under(plan, 60.0, trials=24), tmp_path / "a")
    assert len(asked) == 12
    assert over & set(asked)  # what was over the budget then is worth a run now
    assert not [t for t in after if t.state == "infeasible" and not t.cause]
    assert max(e.latency_ms for e in front(after)) > 35.0


def test_a_stopped_run_is_open_again_where_what_beat_it_no_longer_does(plan, tmp_path):
    run(plan, tmp_path / "a")
    with Study(plan, tmp_path / "a", executor=Inline()) as study:
        snapshot = study.snapshot()
        stopped = [fact for fact in snapshot.chains if fact.state == "stopped"]
        assert stopped
        assert all(snapshot.holds(fact) for fact in stopped)

    keys = {study.price(fact.row).key for fact in stopped}

    class OtherDevice(FakeEvaluator):
        """Here the stopped runs' networks are the fastest of all."""

        def price(self, candidates, source="search"):
            found = super().price(candidates, source)
            return [replace(e, latency_ms=0.5) if e.key in keys else e for e in found]

    other = replace(plan, evaluator=OtherDevice(plan.evaluator.space))
    with Study(other, tmp_path / "a", executor=Inline()) as study:
        snapshot = study.snapshot()
        assert not any(snapshot.holds(fact) or fact.row in snapshot.known for fact in stopped)
    # They may be proposed again, and a run of one of them then ends.
    trials, asked = run(replace(other, trials=30), tmp_path / "a")
    again = keys & set(asked)
    assert again
    assert again <= {t.evaluation.key for t in trials if t.state == "proxied"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 7}, r"seed was 6, is now 7 \(its proposals follow from the seed\)"),
        ({"sampler": "random"}, r"sampler was 'tpe', is now 'random'"),
        (
            {"proxy": quality.ProxySettings(steps=48)},
            r"proxy was .* \(scores of different proxies cannot be compared\)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_would_join_what_cannot_be_compared_is_refused_with_the_reason(plan, tmp_path, change, said):
    run(plan, tmp_path / "a")
    with pytest.raises(NasError, match=said):
        opened(replace(plan, **change), tmp_path / "a")


def test_a_proxy_setting_that_an_older_version_did_not_know_had_its_default(plan, tmp_path):
    run(plan, tmp_path / "a")
    with Study(plan, tmp_path / "a", executor=Inline()) as study:
        fixed = study.attr("fixed")
        study.attr("fixed", {**fixed, "proxy": {k: v for k, v in fixed["proxy"].items() if k != "precision"}})
    assert opened(plan, tmp_path / "a")[1] == ()
    with pytest.raises(NasError, match="proxy was"):
        opened(replace(plan, proxy=replace(plan.proxy, precision="bf16")), tmp_path / "a")


def test_pruning_may_change(plan, tmp_path):
    run(plan, tmp_path / "a")
    assert opened(replace(plan, prune=None), tmp_path / "a")[1] == ("prune was 0.95, is now None",)


def test_a_search_that_finds_its_terms_changed_stops_with_a_sentence(plan, tmp_path):
    (tmp_path / "a").mkdir()
    with Study(plan, tmp_path / "a", executor=Inline()) as study:
        study.attr("terms", under(plan, 20.0).terms())
        with pytest.raises(NasError, match=r"another search changed the terms of .*: budgets was \['35ms"):
            study.run()


# Schema 1


@pytest.fixture
def first(plan, tmp_path):
    """A study of schema 1 with everything that can happen to a trial, killed while two were running."""
    (tmp_path / "first").mkdir()
    shutil.copy(FIRST, tmp_path / "first" / "journal.log")
    return replace(plan, seed=13, trials=14), tmp_path / "first"


def as_written(folder):
    """Number -> (state, evaluation) as schema 1 wrote them."""
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "journal.log"))
    study = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend))
    return {
        t.number: (t.user_attrs["state"], t.user_attrs["evaluation"])
        for t in study.get_trials()
        if t.state.is_finished() and "evaluation" in t.user_attrs
    }


def test_a_study_of_schema_1_reads_as_it_was_written(first):
    plan, folder = first
    written = as_written(folder)
    states = [state for state, _ in written.values()]
    assert {"proxied", "stopped", "infeasible", "duplicate"} == set(states)
    trials, changes = opened(plan, folder)
    assert changes == ()
    assert [t.number for t in trials] == sorted(written)
    for trial in trials:
        state, evaluation = written[trial.number]
        assert trial.state == state
        for name in ("key", "latency_ms", "feasible", "quality", "quality_sd", "text_quality", "seconds", "source"):
            assert getattr(trial.evaluation, name) == evaluation[name], (trial.number, name)
        if state == "stopped":
            assert "would end near" in trial.evaluation.reason
            assert trial.curve


def test_a_study_of_schema_1_goes_on_and_its_unfinished_trials_are_run(first):
    plan, folder = first
    before, _ = opened(plan, folder)
    after, asked = run(plan, folder)
    spent = [t for t in after if t.round is not None]
    assert len(spent) == 14
    assert [(t.number, t.state) for t in after if t.number in {b.number for b in before}] == [
        (t.number, t.state) for t in before
    ]
    assert len(asked) == 14 - sum(t.round is not None for t in before)
    assert opened(plan, folder)[0] == after


def test_an_interrupted_migration_is_done_again(first, monkeypatch):
    plan, folder = first
    before, _ = opened(plan, folder)
    shutil.copy(FIRST, folder / "journal.log")

    class Killed(BaseException):
        pass

    written = Ledger.set

    def dying(self, name, value):
        if name == "schema":
            raise Killed
        written(self, name, value)

    monkeypatch.setattr(Ledger, "set", dying)
    with pytest.raises(Killed):
        opened(plan, folder)
    monkeypatch.setattr(Ledger, "set", written)
    with Study(plan, folder, executor=Inline()) as study:
        assert study.trials() == before
        assert study.attr("schema") == SCHEMA


def test_a_study_of_schema_1_of_another_seed_is_refused(first):
    plan, folder = first
    with pytest.raises(NasError, match="seed was 13, is now 6"):
        opened(replace(plan, seed=6), folder)


def test_a_study_of_a_later_schema_is_refused(plan, tmp_path):
    run(plan, tmp_path / "a")
    with Study(plan, tmp_path / "a", executor=Inline()) as study:
        study.attr("schema", SCHEMA + 1)
    with pytest.raises(NasError, match=rf"has schema {SCHEMA + 1}, newer than the {SCHEMA} of this version"):
        opened(plan, tmp_path / "a")


# Scores that other studies paid for


@dataclass
class Kept:
    """Scores across studies, in memory."""

    found: dict = field(default_factory=dict)

    def all(self):
        return dict(self.found)

    def keep(self, candidate, stored):
        assert isinstance(stored, StoredScore)
        self.found[candidate.key] = stored


def test_another_budget_reuses_every_score_and_they_cost_no_trial(plan, tmp_path):
    kept = Kept()
    first, asked = run(replace(plan, scores=kept, prune=None), tmp_path / "a")
    assert set(kept.found) == {t.evaluation.key for t in first if t.state == "proxied" or t.cause}
    # The reference is over both budgets: its score is taken all the same, and it is not run again.
    trials, again = run(under(plan, 25.0, scores=kept, prune=None, trials=6), tmp_path / "b")
    reused = [t for t in trials if t.evaluation.source == "reused"]
    assert {t.evaluation.key: t.evaluation.quality for t in reused} == {
        t.evaluation.key: t.evaluation.quality for t in first if t.state == "proxied" or t.cause
    }
    assert len(again) == 6 == sum(t.round is not None for t in trials)
    assert not set(again) & set(asked)
    assert max(e.latency_high_ms for e in front(trials)) <= 25.0


def test_what_was_reused_is_counted_and_stays_the_same_when_the_study_is_resumed(plan, tmp_path):
    kept = Kept()
    run(replace(plan, scores=kept, prune=None), tmp_path / "a")
    known, seconds = len(kept.found), 0.5 * sum(each.score is not None for each in kept.found.values())
    plan = under(plan, 25.0, scores=kept, prune=None, trials=4)
    run(plan, tmp_path / "b")
    with Study(plan, tmp_path / "b", executor=Inline()) as study:
        told = study.attr("reused")
    assert (told["available"], told["used"]) == (known, known)
    assert told["seconds_saved"] == pytest.approx(seconds)
    more, _ = run(replace(plan, trials=6), tmp_path / "b")
    assert sum(t.evaluation.source == "reused" for t in more) == known


def test_the_storage_holds_facts_and_no_price(plan, tmp_path):
    run(plan, tmp_path / "a")
    with Study(plan, tmp_path / "a", executor=Inline()) as study:
        for frozen in study.study.get_trials():
            assert set(frozen.user_attrs) <= {"row", "source", "claim", "outcome"}
            told = frozen.user_attrs.get("outcome", {})
            assert set(told) <= {"state", "score", "curve", "reason", "cause", "seconds", "saved_s", "goal"}
            assert frozen.values is None or frozen.values == [told["score"]["value"]]
            assert read(frozen).number == frozen.number
