"""The sampler in Optuna: nothing twice, nothing outside, nothing ignored, and soon the whole front."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState
from sampler_cases import DISTRIBUTIONS, ROWS, cost, features, problem, quality, searched, study

from nas import pareto, sampler
from nas.errors import UsageError
from nas.sampler import Exhausted, FrontSampler, Problem, hunt
from nas.sampler.history import History


def share(rows):
    """The hypervolume of rows as a share of the exact front's."""
    whole, reference = np.column_stack([cost(ROWS), -quality(ROWS)]), (25.0, 5.0)
    found = np.column_stack([cost(rows), -quality(rows)])
    return pareto.hypervolume(found, reference) / pareto.hypervolume(whole, reference)


def test_every_name_makes_a_sampler():
    made = [sampler.make(name, seed=0, problem=problem()) for name in sampler.NAMES]
    assert [type(each).__name__ for each in made] == [
        "FrontSampler",
        "GPSampler",
        "TPESampler",
        "NSGAIISampler",
        "RandomSampler",
    ]
    with pytest.raises(UsageError, match="front"):
        sampler.make("frnt", seed=0, problem=problem())
    with pytest.raises(UsageError, match="problem"):
        sampler.make("front", seed=0)


@pytest.mark.parametrize("changes", [{"known": 2}, {"start": 0}, {"noise_sd": -1.0}, {"noise_sd": np.nan}])
def test_settings_that_mean_nothing_are_refused(changes):
    with pytest.raises(UsageError):
        FrontSampler(problem(), seed=0, **changes)


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_front_where_chance_does_not(seed):
    _, rows = searched(FrontSampler(problem(features=features(ROWS)), seed=seed), 30)
    drawn = np.random.default_rng(seed).permutation(ROWS)[:30]
    assert share(rows) > 0.995
    assert share(rows) > share(drawn)


def test_nothing_is_proposed_twice_and_the_end_is_the_end():
    posed = problem(rows=ROWS[:40], cost=cost(ROWS[:40]))
    found, rows = searched(FrontSampler(posed, seed=0), 100)  # stops by itself
    assert len(rows) == 40
    assert {tuple(row) for row in rows} == {tuple(row) for row in ROWS[:40]}
    with pytest.raises(Exhausted, match="40 candidates"):
        found.ask(DISTRIBUTIONS)


def test_the_same_seed_and_trials_give_the_same_proposals():
    rows = [searched(FrontSampler(problem(), seed=seed), 14)[1].tolist() for seed in (5, 5, 6)]
    assert rows[0] == rows[1] != rows[2]


def test_a_proposal_depends_on_the_trials_and_not_on_who_made_them():
    held, rows = searched(FrontSampler(problem(), seed=5), 16)
    for count in (4, 12, 15):
        again = study(FrontSampler(problem(), seed=5))
        again.add_trials(held.trials[:count])
        assert problem().row(again.ask(DISTRIBUTIONS).params).tolist() == rows[count].tolist()


def test_references_come_first_and_those_outside_are_left_out():
    some = problem(rows=ROWS[:90], cost=cost(ROWS[:90]), references=(tuple(ROWS[50]), tuple(ROWS[170]), tuple(ROWS[7])))
    _, rows = searched(FrontSampler(some, seed=0), 4)
    assert rows[:2].tolist() == ROWS[[50, 7]].tolist()
    assert rows[2].tolist() not in ROWS[[50, 7, 170]].tolist()


def test_the_start_is_spread_over_the_cost():
    _, rows = searched(FrontSampler(problem(), seed=0, start=8), 8)
    edges = np.linspace(cost(ROWS).min(), cost(ROWS).max(), 9)
    assert len(np.unique(np.searchsorted(edges[1:-1], cost(rows), side="right"))) == 8


def test_trials_of_others_count_as_the_start():
    held = study(FrontSampler(problem(), seed=0))
    known = np.random.default_rng(0).permutation(ROWS)[:12]
    for row in known:
        values = [float(cost(row[None])[0]), float(quality(row[None])[0])]
        held.add_trial(
            optuna.trial.create_trial(values=values, params=problem().params(row), distributions=DISTRIBUTIONS)
        )
    row = problem().row(held.ask(DISTRIBUTIONS).params)
    assert share(np.vstack([known, row])) > share(known)


def test_a_batch_is_of_different_candidates_over_the_whole_front():
    held, rows = searched(FrontSampler(problem(), seed=1), 15)
    batch = np.array([problem().row(held.ask(DISTRIBUTIONS).params) for _ in range(8)])
    assert len(np.unique(np.vstack([rows, batch]), axis=0)) == 23
    assert np.ptp(cost(batch)) > 0.3 * np.ptp(cost(ROWS))
    # Together they are worth more than eight times the first one's neighbourhood.
    assert share(np.vstack([rows, batch])) > share(np.vstack([rows, batch[:1]]))


def test_threads_that_ask_at_once_get_different_candidates():
    posed = problem()
    held = study(FrontSampler(posed, seed=0))
    trials = [held.ask() for _ in range(12)]
    first, *others = DISTRIBUTIONS.items()
    values = [[trial._suggest(*first)] for trial in trials]  # so far the study has one parameter of each
    for trial, value in zip(trials, values, strict=True):
        value += [trial._suggest(*other) for other in others]
        held.tell(trial, [0.0, 0.0])
    assert len({tuple(value) for value in values}) == 12
    assert not held.sampler._asked[held.study_name]


def test_a_region_that_fails_is_left():
    """Whatever has kind 1 ends without a value; there is enough else to be found for 25 trials."""
    held = study(FrontSampler(problem(), seed=0))
    kinds = []
    for _ in range(25):
        trial = held.ask(DISTRIBUTIONS)
        row = problem().row(trial.params)
        kinds.append(row[2])
        if row[2] == 1:
            held.tell(trial, state=TrialState.FAIL)
        else:
            held.tell(trial, [float(cost(row[None])[0]), float(quality(row[None])[0])])
    assert sum(kind == 1 for kind in kinds[15:]) <= 1 < sum(kind == 1 for kind in kinds[:15])


def test_what_violates_a_constraint_is_not_taken_for_the_front():
    held, _ = searched(FrontSampler(problem(), seed=2), 12)
    row = ROWS[0]
    dream = {"values": [float(cost(row[None])[0]), 100.0], "constraints": {"memory": 1.0}}
    held.add_trial(optuna.trial.create_trial(params=problem().params(row), distributions=DISTRIBUTIONS, **dream))
    found = hunt.Hunt(problem(), History.of(held, problem(), 0, {}))
    assert found.likeliest.staircase.levels.max() < 50
    assert problem().row(held.ask(DISTRIBUTIONS).params) is not None


def test_all_infeasible_or_equal_values_are_no_special_case():
    held = study(FrontSampler(problem(), seed=0, start=2))
    for i, row in enumerate(ROWS[:6]):
        held.add_trial(
            optuna.trial.create_trial(
                values=[float(cost(row[None])[0]), 1.0],
                params=problem().params(row),
                distributions=DISTRIBUTIONS,
                constraints={"memory": 1.0 if i < 5 else 2.0},
            )
        )
    first = problem().row(held.ask(DISTRIBUTIONS).params)
    assert first.tolist() not in ROWS[:6].tolist()


@pytest.mark.parametrize("directions", [("maximize", "minimize"), ("minimize", "minimize"), ("maximize", "maximize")])
def test_the_known_objective_may_be_either_and_point_either_way(directions):
    posed = problem()
    held = study(FrontSampler(posed, seed=0, known=1), directions)
    signs = [1 if each == "maximize" else -1 for each in directions]
    for _ in range(25):
        trial = held.ask(DISTRIBUTIONS)
        row = posed.row(trial.params)[None]
        held.tell(trial, [signs[0] * float(quality(row)[0]), -signs[1] * float(cost(row)[0])])
    assert share(np.array([posed.row(trial.params) for trial in held.trials])) > 0.98


def test_neighbours_are_found_beyond_the_listed_rows():
    listed = ROWS[np.random.default_rng(0).permutation(len(ROWS))[:30]]

    def more(rows):
        near = [row + step for row in rows for step in (*np.eye(4, dtype=int), *-np.eye(4, dtype=int))]
        sizes = ROWS.max(axis=0)
        inside = np.array([row for row in near if (row >= 0).all() and (row <= sizes).all()])
        return inside, cost(inside), features(inside)

    posed = problem(
        rows=listed,
        cost=cost(listed),
        features=features(listed),
        more=more,
        price=lambda rows: (cost(rows), features(rows)),
    )
    _, rows = searched(FrontSampler(posed, seed=0), 40)
    assert len(np.unique(rows, axis=0)) == 40
    assert share(rows) > 0.99 > share(listed)


def test_noise_does_not_lead_it_astray():
    posed, noise = problem(), np.random.default_rng(0).normal(0, 0.3, len(ROWS))
    held = study(FrontSampler(posed, seed=0, noise_sd=0.3))
    for _ in range(40):
        trial = held.ask(DISTRIBUTIONS)
        place = posed.find(posed.row(trial.params))
        held.tell(trial, [float(cost(ROWS)[place]), float(quality(ROWS)[place] + noise[place])])
    assert share(np.array([posed.row(trial.params) for trial in held.trials])) > 0.97


def test_of_very_many_evaluations_those_near_the_front_are_used(monkeypatch):
    monkeypatch.setattr(hunt, "_USED", 40)
    posed = problem()
    held = study(FrontSampler(posed, seed=0))
    known = np.random.default_rng(0).permutation(ROWS)[:120]
    for row in known:
        values = [float(cost(row[None])[0]), float(quality(row[None])[0])]
        held.add_trial(optuna.trial.create_trial(values=values, params=posed.params(row), distributions=DISTRIBUTIONS))
    found = hunt.Hunt(posed, History.of(held, posed, 0, {}))
    assert len(found.likeliest.surrogate.values) == 40
    front = known[pareto.front(np.column_stack([cost(known), -quality(known)]))]
    assert {tuple(row) for row in found.front_rows} == {tuple(row) for row in front}
    for _ in range(10):
        trial = held.ask(DISTRIBUTIONS)
        row = posed.row(trial.params)[None]
        held.tell(trial, [float(cost(row)[0]), float(quality(row)[0])])
    assert share(np.array([posed.row(trial.params) for trial in held.trials])) > 0.999


def test_a_choice_of_a_million_values_is_none_too_many():
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 10**6, size=(500, 2))
    kinds = {name: optuna.distributions.IntDistribution(0, 10**6 - 1) for name in "ab"}
    posed = Problem(distributions=kinds, rows=rows, cost=rows[:, 0] / 1e6)
    held = study(FrontSampler(posed, seed=0))
    for _ in range(20):
        trial = held.ask(kinds)
        a, b = trial.params["a"] / 1e6, trial.params["b"] / 1e6
        held.tell(trial, [a, np.sqrt(a) - (b - 0.3) ** 2])
    late = [trial.params["b"] / 1e6 for trial in held.trials[12:]]
    assert np.median(np.abs(np.array(late) - 0.3)) < 0.1


def test_a_parameter_that_is_no_choice_is_refused():
    held = study(FrontSampler(problem(), seed=0))
    trial = held.ask()
    with pytest.raises(UsageError, match="height is not among"):
        trial.suggest_int("height", 0, 3)
    with pytest.raises(UsageError, match="depth must be suggested as"):
        trial.suggest_int("depth", 7, 9)


def hunted(count, **changes):
    """A hunt after so many evaluations of candidates drawn at random, with a little noise."""
    posed = problem(price=lambda rows: (cost(rows), None), **changes)
    held, generator = study(FrontSampler(posed, seed=0)), np.random.default_rng(3)
    for row in generator.permutation(ROWS)[:count]:
        values = [float(cost(row[None])[0]), float(quality(row[None])[0] + 0.5 * generator.normal())]
        held.add_trial(optuna.trial.create_trial(values=values, params=posed.params(row), distributions=DISTRIBUTIONS))
    return hunt.Hunt(posed, History.of(held, posed, 0, {}))


@pytest.mark.parametrize(("count", "kernels"), [(20, 8), (80, 5), (110, 1)])
def test_fewer_evaluations_leave_more_kernels_in_doubt(count, kernels):
    found = hunted(count)
    assert len(found._beliefs) == 8
    assert len({each.surrogate.kernel.values[4:].tobytes() for each in found._beliefs}) == kernels
    assert len({each.staircase.levels.tobytes() for each in found._beliefs}) == 8  # true values are drawn for each


def test_the_proposal_is_the_best_of_the_mean_over_beliefs():
    differ = 0
    for count in (12, 14, 16, 18, 20, 22):
        found = hunted(count)
        pool, untried = found.problem.pool, ~np.isin(found.problem.pool.keys, found.history.keys)

        def gains(belief, pool=pool):
            return belief.staircase.expected(pool.cost, *belief.surrogate.predict(pool.inputs))

        wanted = np.argmax(np.mean([gains(each) for each in found._beliefs], axis=0) * untried)
        assert found.chosen().keys[0] == pool.keys[wanted]
        differ += wanted != np.argmax(gains(found.likeliest) * untried)
    assert differ  # else the beliefs would not have been asked


def test_from_a_corner_of_the_space_it_climbs_further_than_one_step():
    sizes, asked = ROWS.max(axis=0), []

    def more(rows):
        asked.append(len(rows))
        near = np.array([row + step for row in rows for step in (*np.eye(4, dtype=int), *-np.eye(4, dtype=int))])
        near = near[((near >= 0) & (near <= sizes)).all(axis=1)]
        return near, cost(near), None

    corner = ROWS[(ROWS <= 1).all(axis=1)]
    found = hunted(25, rows=corner, cost=cost(corner), more=more)
    found.front_rows = found.front_rows[:0]
    steps = np.abs(found.chosen().rows[0] - corner).sum(axis=1).min()
    assert steps > 1
    assert len(asked) > 2
