"""Problems and histories: rows and parameters are one another's inverse, and a study is read for what it is."""

from __future__ import annotations

import numpy as np
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from sampler_cases import DISTRIBUTIONS, ROWS, cost, features, problem, study

from nas.errors import UsageError
from nas.sampler import FrontSampler
from nas.sampler.history import History


def test_rows_and_parameters_are_inverse():
    posed = problem()
    for row in ROWS[::7]:
        params = posed.params(row)
        assert all(DISTRIBUTIONS[name]._contains(DISTRIBUTIONS[name].to_internal_repr(params[name])) for name in params)
        assert posed.row(params).tolist() == row.tolist()
    assert posed.params(np.array([3, 1, 2, 2])) == {"depth": 3, "width": 128, "kind": None, "ratio": 1.5}


@pytest.mark.parametrize(
    "changed", [{"kind": "heavy"}, {"width": 100}, {"depth": 5}, {"depth": -1}, {"ratio": 0.7}, {"depth": "two"}]
)
def test_what_is_no_value_is_no_row(changed):
    assert problem().row(problem().params(ROWS[0]) | changed) is None


def test_a_missing_parameter_is_no_row():
    assert problem().row({"depth": 1}) is None


def test_every_row_has_its_own_key():
    posed = problem()
    assert len(set(posed.pool.keys.tolist())) == len(ROWS)
    assert all(posed.find(row) == i for i, row in enumerate(ROWS))
    assert posed.find(np.array([9, 9, 9, 9])) is None


def test_what_lies_outside_is_priced_if_it_can_be():
    some, asked = ROWS[::2], ROWS[[3, 0, 5, 2, 1]]
    known, there = problem(rows=some, cost=cost(some)).known(asked)
    assert there.tolist() == [False, True, False, True, False]
    assert known.rows.tolist() == asked[there].tolist()
    posed = problem(
        rows=some, cost=cost(some), features=features(some), price=lambda rows: (cost(rows), features(rows))
    )
    known, there = posed.known(asked)
    assert there.all()
    assert known.rows.tolist() == asked.tolist()
    np.testing.assert_allclose(known.cost, cost(asked))
    again = posed.encoding.inputs(asked, cost(asked), features(asked))
    np.testing.assert_allclose(known.inputs.linear, again.linear)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": ROWS[:, :3]}, r"integers \[n, 4\]"),
        ({"rows": ROWS[:0], "cost": np.empty(0)}, "at least 1"),
        ({"rows": ROWS.astype(float)}, "float64"),
        ({"rows": ROWS + np.array([0, 0, 1, 0])}, "index of kind"),
        ({"rows": ROWS - np.array([1, 0, 0, 0])}, "index of depth"),
        ({"cost": cost(ROWS)[1:]}, "cost"),
        ({"cost": np.full(len(ROWS), np.nan)}, "cost"),
        ({"features": features(ROWS)[1:]}, "features"),
        ({"features": cost(ROWS)}, "features"),
        ({"more": lambda rows: (rows, cost(rows), None)}, "price"),
        ({"distributions": {**DISTRIBUTIONS, "ratio": FloatDistribution(0, 1)}}, "ratio"),
        ({"distributions": {**DISTRIBUTIONS, "depth": IntDistribution(1, 5, log=True)}}, "depth"),
    ],
)
def test_what_does_not_belong_together_is_refused(changes, said):
    with pytest.raises(UsageError, match=said):
        problem(**changes)


def told(row, state=TrialState.COMPLETE, value=1.0, **more):
    values = [float(cost(row[None])[0]), value] if state == TrialState.COMPLETE else None
    params = problem().params(row)
    return create_trial(state=state, values=values, params=params, distributions=DISTRIBUTIONS, **more)


def read(trials, of=None, directions=("minimize", "maximize"), known=0, asked=None, besides=-1):
    held = study(FrontSampler(problem(), seed=0), directions)
    for trial in trials:
        held.add_trial(trial)
    return History.of(held, of or problem(), known, asked or {}, besides)


def test_each_state_is_what_it_means():
    found = read(
        [
            told(ROWS[0], value=3.0),
            told(ROWS[1], TrialState.RUNNING),
            told(ROWS[2], TrialState.FAIL),
            told(ROWS[3], TrialState.PRUNED),
            told(ROWS[4], value=np.inf),
            told(ROWS[5], TrialState.FAIL),
            told(ROWS[5], value=2.0),  # it failed once and was done again
            told(ROWS[6], value=5.0, constraints={"memory": 1.0, "size": -1.0}),
            told(ROWS[7], TrialState.WAITING),
        ]
    )
    assert found.done.rows.tolist() == ROWS[[0, 5, 6]].tolist()
    assert found.quality.tolist() == [3.0, 2.0, 5.0]
    assert found.feasible.tolist() == [True, True, False]
    assert found.pending.rows.tolist() == ROWS[[1, 7]].tolist()
    assert found.failed.rows.tolist() == ROWS[[2, 3, 4]].tolist()
    assert len(np.unique(found.keys)) == 8


def test_quality_that_is_minimised_is_turned_round():
    assert read([told(ROWS[0], value=3.0)], directions=("minimize", "minimize")).quality.tolist() == [-3.0]


def test_the_known_objective_may_come_second():
    swapped = create_trial(values=[7.0, 1.0], params=problem().params(ROWS[0]), distributions=DISTRIBUTIONS)
    assert read([swapped], directions=("maximize", "minimize"), known=1).quality.tolist() == [7.0]


def test_what_was_asked_or_queued_without_parameters_is_pending():
    held = study(FrontSampler(problem(), seed=0))
    held.enqueue_trial(problem().params(ROWS[9]))
    held.add_trial(create_trial(state=TrialState.RUNNING))
    found = History.of(held, problem(), 0, {1: ROWS[4]})
    assert found.pending.rows.tolist() == ROWS[[9, 4]].tolist()
    assert len(History.of(held, problem(), 0, {1: ROWS[4]}, besides=1).keys) == 1


def test_rows_outside_the_problem_are_remembered_but_teach_nothing():
    some = problem(rows=ROWS[:10], cost=cost(ROWS[:10]))
    found = read([told(ROWS[3]), told(ROWS[20], TrialState.RUNNING), told(ROWS[30])], of=some)
    assert found.done.rows.tolist() == ROWS[[3]].tolist()
    assert not len(found.pending)
    assert len(found.keys) == 3


def test_what_was_pruned_for_a_constraint_did_not_fail_unless_it_is_listed():
    some = ROWS[:10]
    posed = problem(rows=some, cost=cost(some), price=lambda rows: (cost(rows), None))
    over = {"constraints": {"latency": 1.0}}
    trials = [told(ROWS[i], TrialState.PRUNED, **over) for i in (3, 20)]
    trials += [told(ROWS[30], TrialState.PRUNED), told(ROWS[40], TrialState.FAIL, **over)]
    assert read(trials, of=posed).failed.rows.tolist() == ROWS[[3, 30, 40]].tolist()


def test_one_objective_is_refused():
    with pytest.raises(UsageError, match="two objectives"):
        read([], directions=("minimize",))
