"""What comes of proxy runs in a search: stopped early, untrainable, out of memory; none of them is a bad score."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import Future
from dataclasses import replace

import optuna
import pytest
import torch
from optuna.trial import TrialState

from nas import quality
from nas.bench import Point, ProxySettings, Stopped
from nas.diffusion import FlowDenoiser
from nas.errors import DIVERGED, OUT_OF_MEMORY, NasError, UntrainableError
from nas.proxies import Score
from nas.record import front
from nas.space import load_space
from nas.study import Study
from nas.study.outcome import Outcome, outcome_of
from nas.study.propose import distributions, memory
from nas.study.worker import scored
from tests.study_cases import TOML, FakeEvaluator, Inline, run, toy_plan, toy_score

CURVE = (Point(step=6, train_db=1.0, seconds=2.0),)
STOPPING = {"seed": 6, "trials": 12}  # a search of the toy space in which a run is stopped


@pytest.fixture
def plan(tmp_path, monkeypatch):
    return toy_plan(tmp_path, monkeypatch, trials=10, seed=3, prune=0.95)


def journal(folder):
    """The trials as Optuna has them."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "journal.log")))
    return optuna.load_study(study_name="search", storage=storage).get_trials(deepcopy=False)


def test_a_stopped_run_has_a_reason_and_a_curve_and_no_value(plan, tmp_path):
    trials, asked = run(replace(plan, **STOPPING), tmp_path / "a")
    stopped = [t for t in trials if t.state == "stopped"]
    assert stopped
    assert len(asked) == 12  # a stopped run is one of those that were asked for
    assert [t.state for t in journal(tmp_path / "a")].count(TrialState.PRUNED) >= len(stopped)
    for trial in stopped:
        assert trial.evaluation.quality is None
        assert trial.evaluation.feasible
        assert "would end near" in trial.evaluation.reason
        step = trial.curve[-1].step
        assert step < 24
        assert trial.evaluation.seconds == pytest.approx(step / 48)
        assert trial.saved_s == pytest.approx((24 - step) / 48)
        assert trial.evaluation.key not in {e.key for e in front(trials)}
    # And rightly: what it would have come to is beaten at its latency.
    whole = {t.evaluation.key: t.evaluation for t in run(replace(plan, **STOPPING, prune=None), tmp_path / "b")[0]}
    for trial in stopped:
        if (twin := whole.get(trial.evaluation.key)) is not None and twin.quality is not None:
            assert any(
                e.latency_ms <= twin.latency_ms and e.quality > twin.quality for e in whole.values() if e.quality
            )


def test_without_pruning_nothing_is_asked_and_nothing_is_stopped(plan, tmp_path):
    (tmp_path / "a").mkdir()
    executor = Inline()
    with Study(replace(plan, **STOPPING, prune=None), tmp_path / "a", executor=executor) as opened:
        opened.run()
        assert "stopped" not in {t.state for t in opened.trials()}
    assert set(executor.rules.values()) == {None}


def test_the_rule_of_a_run_comes_from_what_was_finished_before_it_also_when_it_is_run_again(
    plan, tmp_path, monkeypatch
):
    plan = replace(plan, **STOPPING)
    (tmp_path / "peace").mkdir()
    peace = Inline()
    with Study(plan, tmp_path / "peace", executor=peace) as opened:
        opened.run()
        told = [t for t in opened.trials() if t.round is not None]
    last = [t.evaluation.key for t in told if peace.rules[t.evaluation.key].lines][-1]

    class Killed(BaseException):
        pass

    def score(candidate, *others):
        if candidate.key == last:
            raise Killed
        return toy_score(candidate, *others)

    (tmp_path / "killed").mkdir()
    monkeypatch.setattr(quality, "score", score)
    with pytest.raises(Killed), Study(plan, tmp_path / "killed", executor=Inline()) as opened:
        opened.run()
    monkeypatch.setattr(quality, "score", toy_score)
    resumed = Inline()
    with Study(plan, tmp_path / "killed", executor=resumed) as opened:
        opened.run()
    assert resumed.asked[0] == last
    assert resumed.rules == {each: peace.rules[each] for each in resumed.rules}


def test_references_are_never_stopped(plan, tmp_path):
    space = plan.evaluator.space
    executor = Inline()
    (tmp_path / "a").mkdir()
    with Study(replace(plan, **STOPPING), tmp_path / "a", executor=executor) as opened:
        opened.run()
    rule = executor.rules[space.reference("known").key]
    assert (rule.lines, rule.goal) == ((), None)


def test_a_diverging_student_is_infeasible_with_its_reason_and_the_search_goes_on(plan, tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(TOML.replace("width = 4\ndepth = 3", "width = 1\ndepth = 3"))
    failing = replace(plan, evaluator=FakeEvaluator(load_space(path)), trials=4)
    trials, asked = run(failing, tmp_path / "a")
    first = trials[0]
    assert (first.state, first.cause) == ("infeasible", DIVERGED)
    assert first.evaluation.reason.startswith("training diverged: after 24 steps")
    assert not first.evaluation.feasible
    assert first.evaluation.quality is None
    assert len(asked) == 4  # its run was spent, and the others came after it
    assert any(t.state == "proxied" for t in trials)
    told = journal(tmp_path / "a")[first.number]
    assert told.state == TrialState.PRUNED
    assert told.values is None
    with Study(failing, tmp_path / "a", executor=Inline()) as opened:
        seen = memory(failing.evaluator.space, distributions(opened.space), opened.snapshot(), opened.price, 35.0, None)
    assert seen.get_trials()[first.number].constraints["untrainable"] > 0  # what the sampler keeps away from


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            UntrainableError("out of memory on cuda with a batch of 16; a batch of 4 fits", OUT_OF_MEMORY),
            "out of memory on cuda with a batch of 16; a batch of 4 fits",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), "out of memory on cpu while"),
        (MemoryError("Unable to allocate 8.00 TiB for an array with shape (1,)"), "out of memory on cpu while"),
    ],
    ids=["in training", "beside it", "numpy"],
)
def test_lack_of_memory_is_infeasible(plan, tmp_path, monkeypatch, error, said):
    def score(candidate, teacher, settings, stop, device):
        if candidate.values["width"] == 3:
            raise error
        return toy_score(candidate, teacher, settings, stop)

    monkeypatch.setattr(quality, "score", score)
    trials, asked = run(plan, tmp_path / "a")
    lacking = [t for t in trials if t.cause == OUT_OF_MEMORY]
    assert lacking
    assert len(asked) == 10
    assert {t.state for t in lacking} == {"infeasible"}
    assert all(t.evaluation.reason.startswith(said) for t in lacking)


def test_the_batch_that_fits_is_said_of_a_real_run(monkeypatch):
    """From the allocator's failure in a training step to the trial, with nothing replaced in between."""
    settings = ProxySettings(steps=2, batch=4, held_rows=16)
    candidate = load_space("snapgen_unet").reference("snapgen")
    velocity = FlowDenoiser.velocity

    def limited(self, noisy, *args, **kwargs):
        if self.training and len(noisy) > 2:  # both texts go through it in one pass
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
            )
        return velocity(self, noisy, *args, **kwargs)

    monkeypatch.setattr(FlowDenoiser, "velocity", limited)
    future = Future()
    with pytest.raises(UntrainableError) as caught:
        scored(candidate, "embedded", settings, None)
    future.set_exception(pickle.loads(pickle.dumps(caught.value)))
    found = outcome_of(future, settings)
    assert (found.state, found.cause) == ("untrainable", OUT_OF_MEMORY)
    assert found.reason == "out of memory on cpu with a batch of 4; a batch of 1 fits"


def test_another_error_is_a_failed_trial_as_before(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "score", lambda *_: (_ for _ in ()).throw(NasError("cannot be scaled down")))
    trials, _ = run(replace(plan, trials=2), tmp_path / "a")
    assert next((t.state, t.evaluation.reason) for t in trials if t.round is not None) == (
        "failed",
        "cannot be scaled down",
    )


def test_a_programming_error_is_not_hidden(plan, monkeypatch):
    monkeypatch.setattr(quality, "score", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        scored(plan.evaluator.space.reference("known"), "embedded", plan.proxy, None)


def test_a_real_run_that_diverges_is_infeasible():
    settings = ProxySettings(steps=4, batch=4, held_rows=16, lr=1e6)
    future = Future()
    with pytest.raises(UntrainableError) as caught:
        scored(load_space("snapgen_unet").reference("snapgen"), "embedded", settings, None)
    future.set_exception(caught.value)
    found = outcome_of(future, settings)
    assert (found.state, found.cause) == ("untrainable", DIVERGED)
    assert found.reason.startswith("training diverged: ")
    assert "checkpoint" not in found.reason


def outcome(plan, result, **changes):
    """What is told of a run with this result."""
    future = Future()
    future.set_exception(result) if isinstance(result, BaseException) else future.set_result(result)
    return outcome_of(future, replace(plan.proxy, **changes))


def test_seconds_saved_are_those_of_the_steps_and_seeds_not_taken(plan):
    stopped = Stopped("why", (Point(step=6, train_db=1.0, seconds=2.0),))
    found = outcome(plan, stopped)
    assert (found.state, found.seconds, found.saved_s) == ("stopped", 2.0, pytest.approx(6.0))
    assert outcome(plan, stopped, seeds=(0, 1, 2)).saved_s == pytest.approx(22.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_no_number_is_infeasible(plan, value):
    found = outcome(plan, Score(value=value))
    assert (found.state, found.cause, found.score) == ("untrainable", "score not finite", None)


def test_an_outcome_is_read_back_as_it_was_told(plan):
    score = Score(value=1.5, value_sd=0.1, text=0.2, text_sd=0.3, seconds=4.0, params=7)
    whole = Outcome(state="proxied", score=replace(score, curve=CURVE), curve=CURVE)
    stopped = Outcome(state="stopped", reason="why", seconds=2.0, curve=CURVE, saved_s=6.0, goal=1.25)
    untrainable = Outcome(state="untrainable", reason="because", cause=DIVERGED)
    for each in (whole, stopped, untrainable, Outcome(state="forbidden")):
        assert Outcome.from_json(json.loads(json.dumps(each.to_json()))) == each
