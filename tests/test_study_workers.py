"""Many workers on one study: each trial has one owner, the dead give theirs back, strangers are refused."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

import nas
from nas.errors import NasError
from nas.space import load_space
from nas.study import Study, presence, runner, stored_settings
from nas.study.facts import LOST, RUNNING, WITHDRAWN, Fact, Snapshot
from nas.study.ledger import Ledger
from nas.study.outcome import Outcome
from nas.study.presence import Worker
from tests.study_cases import TOML, FakeEvaluator, Inline, run, toy_plan, toy_score


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "POLL_S", 0.02)
    return toy_plan(tmp_path, monkeypatch, settings={"space": "toy"})


# Which trial stands, whatever happened at the same moment


def fact(number, row, state=RUNNING, origin=None, outcome=None):
    told = outcome or (Outcome(state=state) if state not in (RUNNING, LOST, WITHDRAWN) else None)
    where = number if origin is None else origin
    return Fact(
        number=number, trial_id=number, row=(row,), source="search", state=state, origin=where, outcome=told, worker="w"
    )


def test_of_two_trials_with_one_row_the_first_stands():
    snapshot = Snapshot([fact(0, 5), fact(1, 5), fact(2, 6)])
    assert [snapshot.stands(each, 10) for each in snapshot.facts] == [True, False, True]


def test_a_withdrawn_or_lost_trial_stands_in_nobodys_way():
    snapshot = Snapshot([fact(0, 5, WITHDRAWN), fact(1, 5)])
    assert snapshot.stands(snapshot.facts[1], 10)
    again = Snapshot([fact(0, 5, LOST), fact(1, 5, origin=0), fact(2, 5)])
    assert [again.stands(each, 10) for each in again.facts[1:]] == [True, False]


def test_a_proposal_of_a_lost_trials_row_takes_its_place():
    snapshot = Snapshot([fact(0, 5, LOST), fact(1, 5), fact(2, 5, origin=0)])
    assert [snapshot.stands(each, 10) for each in snapshot.facts[1:]] == [True, False]
    assert [each.number for each in Snapshot(snapshot.facts[:2]).spending] == [1]


def test_the_budget_keeps_room_for_lost_trials_and_counts_a_repeated_one_once():
    facts = [fact(0, 1, "proxied"), fact(1, 2, LOST), fact(2, 3), fact(3, 4)]
    snapshot = Snapshot(facts)
    assert [snapshot.stands(each, 3) for each in facts[2:]] == [True, False]
    again = Snapshot([*facts[:2], fact(2, 2, "proxied", origin=1), fact(3, 3)])
    assert [each.number for each in again.spending] == [0, 2, 3]
    assert again.stands(again.facts[3], 3)
    assert not again.complete(3)
    assert again.complete(2)


def test_one_that_died_before_it_could_withdraw_is_not_run_again():
    snapshot = Snapshot([fact(0, 5, "proxied"), fact(1, 5, LOST), fact(2, 6)])
    assert [each.number for each in snapshot.chains] == [0, 2]
    assert snapshot.waiting(10) == ()
    both = Snapshot([fact(0, 5, LOST), fact(1, 5, LOST)])
    assert [each.number for each in both.waiting(10)] == [0]


def test_a_run_that_was_repeated_while_it_was_told_after_all_counts_once():
    """The first worker was silent for long, was given up, and its answer came in the same moment."""
    snapshot = Snapshot([fact(0, 5, "proxied"), fact(1, 5, "proxied", origin=0)])
    assert [each.number for each in snapshot.spending] == [0]


# Several at once


def together(plan, folder, count):
    """The same study by `count` workers in threads; what each ran, and the trials."""
    folder.mkdir(exist_ok=True)
    executors, failures = [Inline() for _ in range(count)], []
    with Study(plan, folder, executor=executors[0]) as first:

        def work(executor):
            try:
                with Study(plan, folder, executor=executor, joins=True) as study:
                    study.run()
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=work, args=(each,)) for each in executors[1:]]
        for thread in threads:
            thread.start()
        first.run()
        for thread in threads:
            thread.join()
        assert not failures
        return [each.asked for each in executors], first.trials()


@pytest.mark.parametrize("storage", [None, "sqlite"])
def test_workers_share_a_study_and_run_no_candidate_twice(plan, tmp_path, storage):
    if storage is not None:
        plan = replace(plan, storage=f"sqlite:///{tmp_path}/study.db")
    asked, trials = together(plan, tmp_path / "a", 3)
    everything = [key for each in asked for key in each]
    assert len(everything) == len(set(everything)) == 12
    assert sum(t.round is not None for t in trials) == 12
    assert {t.evaluation.key for t in trials if t.round is not None} == set(everything)
    assert [t.number for t in trials] == sorted({t.number for t in trials})


def test_a_worker_ends_when_the_study_has_its_trials_and_does_nothing_afterwards(plan, tmp_path):
    run(plan, tmp_path / "a")
    assert run(plan, tmp_path / "a", joins=True)[1] == []


# The dead and the slow


@pytest.fixture
def ledger(plan, tmp_path):
    (tmp_path / "a").mkdir()
    with Study(plan, tmp_path / "a", executor=Inline()) as study:
        yield study.ledger


def claimed(ledger, worker, row=(1, 0, 0, 0)):
    added = ledger.claim(row, "search", worker, None, {})
    return next(each for each in ledger.facts() if each.trial_id == added)


def test_a_trial_of_a_dead_worker_is_run_by_another_once(plan, ledger, tmp_path):
    lost = claimed(ledger, "dead")
    executor = Inline()
    with Study(plan, tmp_path / "a", executor=executor, joins=True) as study:
        study.run()
        key = study.price(lost.row).key
        facts = study.snapshot().facts
    assert executor.asked[0] == key
    assert executor.asked.count(key) == 1
    assert facts[lost.number].state == LOST
    assert [each.state for each in facts if each.origin == lost.number and each.number != lost.number] == ["proxied"]


def test_what_a_worker_wrote_before_it_died_is_not_run_again(plan, ledger, tmp_path):
    told = claimed(ledger, "dead")
    score = toy_score(plan.evaluator.space.from_row(told.row), "", None, None)
    frozen = ledger.study.get_trials(deepcopy=False)[told.number]
    ledger.study._storage.set_trial_user_attr(
        frozen._trial_id, "outcome", Outcome(state="proxied", score=score).to_json()
    )
    executor = Inline()
    with Study(plan, tmp_path / "a", executor=executor, joins=True) as study:
        study.run()
        facts = study.snapshot().facts
    assert facts[told.number].state == "proxied"
    assert facts[told.number].outcome.score.value == score.value
    assert study.price(told.row).key not in executor.asked


def test_only_one_of_two_who_find_a_dead_workers_trial_ends_it(ledger):
    lost = claimed(ledger, "dead")
    assert [ledger.settle(lost), ledger.settle(lost)] == [True, False]


def test_the_result_of_a_worker_that_was_given_up_is_not_told_over_anothers(ledger):
    slow = claimed(ledger, "slow")
    assert ledger.settle(slow)
    assert not ledger.tell(slow, Outcome(state="failed", reason="late"))
    assert next(each.state for each in ledger.facts() if each.number == slow.number) == LOST


def cards(worker, **card):
    return {f"worker:{worker}": {"host": "elsewhere/1/2", "pid": 1, "started": "7", "beat": 0, **card}}


def test_a_silent_worker_of_another_machine_is_dead_by_the_observers_clock(ledger, monkeypatch):
    """No time is in a beat, so a clock that is an hour off makes no difference."""
    now = [1000.0]
    monkeypatch.setattr(presence, "time", SimpleNamespace(monotonic=lambda: now[0]))
    mine = Worker(ledger, alone=False, beat_s=1000.0, silence_s=90.0)
    try:
        for beat in range(5):  # slow but alive: it beats once in 80 s
            assert not mine.dead("other", cards("other", beat=beat))
            now[0] += 80.0
        now[0] += 5.0
        assert not mine.dead("other", cards("other", beat=4))
        now[0] += 6.0
        assert mine.dead("other", cards("other", beat=4))
        assert not mine.dead("other", cards("other", beat=5))
    finally:
        mine.leave()


def test_a_worker_of_this_machine_is_as_alive_as_its_process(ledger):
    import os
    import subprocess
    import sys

    mine = Worker(ledger, alone=False, beat_s=1000.0)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        card = {"host": presence.host(), "pid": process.pid, "started": presence.started(process.pid), "beat": 0}
        assert not mine.dead("other", {"worker:other": card})
        assert mine.dead("other", {"worker:other": {**card, "started": "1"}})  # another process of that number
        process.kill()
        while presence.started(process.pid) is not None:  # a zombie is no worker either
            pass
        assert mine.dead("other", {"worker:other": card})
        assert mine.dead("other", {})
        assert mine.dead("other", {"worker:other": {**card, "pid": os.getpid(), "left": True}})
    finally:
        process.communicate()
        mine.leave()


def test_a_worker_beats_and_says_that_it_leaves(ledger):
    worker = Worker(ledger, alone=False, beat_s=0.02)
    name = f"worker:{worker.name}"
    before = ledger.attributes()[name]["beat"]
    until = threading.Event()
    while ledger.attributes()[name]["beat"] < before + 2:
        until.wait(0.01)
    worker.leave()
    assert ledger.attributes()[name]["left"]


# Strangers


def test_a_second_search_is_told_how_to_join(plan, ledger, tmp_path):
    with pytest.raises(NasError, match="another search is running") as caught:
        Study(plan, tmp_path / "a").__enter__()
    assert f"nas worker {tmp_path / 'a'}" in caught.value.hint


class OtherTables(FakeEvaluator):
    def identity(self):
        return {**super().identity(), "predictors": ["another file"]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda plan: replace(plan, evaluator=OtherTables(plan.evaluator.space)), r"predictors is \['toy'\] there and"),
        (lambda plan: replace(plan, evaluator=plan.evaluator.within(20.0)), "budgets is .* there and .* here"),
        (lambda plan: replace(plan, seed=1), "seed is 6 there and 1 here"),
        (lambda plan: replace(plan, trials=40), "trials is 12 there and 40 here"),
    ],
    ids=["predictor", "budget", "seed", "trials"],
)
def test_a_worker_that_would_price_or_propose_otherwise_is_refused(plan, ledger, tmp_path, change, said):
    with pytest.raises(NasError, match=said):
        Study(change(plan), tmp_path / "a", joins=True).__enter__()


def test_a_worker_with_another_space_file_is_refused(plan, ledger, tmp_path):
    path = tmp_path / "toy.toml"
    path.write_text(TOML + "\n# one more line\n")
    other = replace(plan, evaluator=FakeEvaluator(load_space(path)))
    with pytest.raises(NasError, match=r"space_hash is '[0-9a-f]+' there and '[0-9a-f]+' here"):
        Study(other, tmp_path / "a", joins=True).__enter__()


def test_a_worker_of_another_version_is_refused_before_it_reads_the_settings(plan, ledger, tmp_path, monkeypatch):
    assert stored_settings(None, tmp_path / "a", None) == {"space": "toy"}
    monkeypatch.setattr(nas, "__version__", "9.9.9")
    with pytest.raises(NasError, match=r"searched by nas 0\.[0-9.]+, and this machine has 9\.9\.9"):
        stored_settings(None, tmp_path / "a", None)
    with pytest.raises(NasError, match=r"version is '0\.[0-9.]+' there and '9\.9\.9' here"):
        Study(plan, tmp_path / "a", joins=True).__enter__()


def test_a_folder_without_a_study_cannot_be_joined(tmp_path):
    with pytest.raises(NasError, match="holds no study that can be joined"):
        stored_settings(None, tmp_path, None)


def test_two_machines_cannot_share_a_file_of_sqlite(plan, tmp_path, monkeypatch):
    plan = replace(plan, storage=f"sqlite:///{tmp_path}/study.db")
    (tmp_path / "a").mkdir()
    with Study(plan, tmp_path / "a", executor=Inline()) as first:
        beating = Worker(first.ledger, alone=False, beat_s=0.02)
        monkeypatch.setattr(presence, "host", lambda: "elsewhere/1/2")
        monkeypatch.setattr(presence.refuse_other_machines, "__defaults__", (0.2,))
        with pytest.raises(NasError, match=r"is a file that serves one machine, and .* works on it"):
            Study(plan, None, name="a", joins=True).__enter__()
        beating.leave()


def test_an_answer_that_was_lost_does_not_write_a_trial_twice(ledger, monkeypatch):
    """The storage added the trial and then the connection broke: the second attempt finds the first one's."""
    create = ledger._storage.create_new_trial
    broken = [True]

    def breaking(*arguments, **named):
        found = create(*arguments, **named)
        if broken.pop() if broken else False:
            raise ConnectionError("connection reset")
        return found

    monkeypatch.setattr(ledger._storage, "create_new_trial", breaking)
    monkeypatch.setattr("nas.study.storage.time", SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda s: None))
    before = len(ledger.facts())
    added = ledger.claim((1, 0, 0, 0), "search", "me", None, {})
    assert len(ledger.facts()) == before + 1
    assert next(each.row for each in ledger.facts() if each.trial_id == added) == (1, 0, 0, 0)
    assert isinstance(ledger, Ledger)
