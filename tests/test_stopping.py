"""The rule that ends proxy runs early: right on planted curves, calibrated on drawn ones, silent before it knows."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from nas.bench import Point
from nas.stopping import FEWEST, Rule, Run, lines, rule

STEPS = 24
LOOKS = (6, 12, 18)


def curve(*train_db):
    """Points at the looks, and the last at the end."""
    steps = (*LOOKS, STEPS)[: len(train_db)]
    return tuple(Point(step=step, train_db=db, seconds=step / 10) for step, db in zip(steps, train_db, strict=True))


def drawn(values, rng, noise=0.1):
    """Curves whose training dB follows the final value, the closer the later."""
    shape = (len(values), 3)
    seen = np.asarray(values)[:, None] - np.array([3.0, 2.0, 1.0]) + rng.normal(0, noise, shape) * [3, 2, 1]
    return [curve(*row.tolist(), 0.0) for row in seen]


def finished(values, rng, latency_ms=100.0, noise=0.1):
    """Finished runs of equal latency."""
    found = zip(values, drawn(values, rng, noise), strict=True)
    return [Run(key=f"k{i}", latency_ms=latency_ms, value=v, curve=c) for i, (v, c) in enumerate(found)]


def asked(found, latency_ms=100.0, confidence=0.95):
    return rule(found, latency_ms, confidence=confidence, steps=STEPS)


@pytest.fixture
def known():
    return finished(np.linspace(2.0, 4.0, 10), np.random.default_rng(0))


def test_a_clearly_bad_run_is_stopped_and_a_promising_one_is_not(known):
    made = asked(known)
    reason = made(curve(-1.0))
    assert reason is not None
    assert reason.startswith("stopped after 6 of 24 steps: it would end near 2.")
    assert reason.endswith("with 95 % confidence, and k9 has 4 dB at no more latency")
    assert made(curve(1.0)) is None
    assert made(curve(1.1, 2.1, 3.1)) is None
    # What looked promising first and then fell behind.
    assert made(curve(1.0, 0.5)) is not None


def test_the_interval_of_the_reason_is_where_it_would_no_longer_stop(known):
    made = asked(known)
    found = next(x for x in np.arange(1.2, -1, -0.01) if made(curve(x)))
    assert made.chance(curve(found)) < 0.05 <= made.chance(curve(found + 0.01))


def test_a_line_is_least_squares_with_the_textbook_interval():
    rng = np.random.default_rng(3)
    found = finished(rng.normal(3, 1, 9), rng)
    line = lines(found)[0]
    x, y = np.array([r.curve[0].train_db for r in found]), np.array([r.value for r in found])
    fit = stats.linregress(x, y)
    at = x.min() - 1.0
    value, error = line.expected([at])
    assert value == pytest.approx(fit.intercept + fit.slope * at)
    residual = np.sqrt(((y - fit.intercept - fit.slope * x) ** 2).sum() / 7)
    assert error == pytest.approx(residual * np.sqrt(1 + 1 / 9 + (at - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()))
    assert (line.steps, line.runs, line.dof) == ((6,), 9, 7)


def test_the_look_before_is_read_too_once_there_are_runs_enough():
    rng = np.random.default_rng(4)
    assert [line.steps for line in lines(finished(rng.normal(3, 1, 11), rng))] == [(6,), (12,), (18,)]
    assert [line.steps for line in lines(finished(rng.normal(3, 1, 12), rng))] == [(6,), (6, 12), (12, 18)]


def test_nothing_is_stopped_before_enough_runs_are_finished(known):
    hopeless = curve(-50.0)
    assert asked(known[-FEWEST:])(hopeless) is not None
    assert asked(known[-FEWEST + 1 :])(hopeless) is None
    without = [replace(run, curve=run.curve[-1:]) for run in known]  # as runs that nobody watched have it
    assert asked(without)(hopeless) is None
    assert asked([])(hopeless) is None


def test_only_what_is_as_fast_and_feasible_is_to_be_reached(known):
    bad = curve(-1.0)
    assert asked(known, latency_ms=99.9)(bad) is None  # the fastest candidate of all is on the front whatever it scores
    assert asked([replace(run, feasible=False) for run in known])(bad) is None
    fast = replace(known[0], latency_ms=50.0)  # the worst of all is all that is as fast
    mixed = asked([fast, *known[1:]], latency_ms=60.0)
    assert (mixed.goal, mixed.holder) == (2.0, "k0")
    assert mixed(curve(0.5)) is None
    assert mixed(curve(-4.0)) is not None


def test_a_look_that_is_not_a_number_or_was_never_seen_says_nothing(known):
    made = asked(known)
    assert made(curve(float("nan"))) is None
    assert made((Point(step=7, train_db=-50.0, seconds=1.0),)) is None
    assert made(()) is None
    assert made.chance(()) == 1.0


def test_curves_that_do_not_differ_give_no_line():
    same = [Run(key=str(i), latency_ms=1.0, value=float(i), curve=curve(1.0, 1.0, 1.0, 1.0)) for i in range(9)]
    assert lines(same) == ()


def test_curves_that_fit_perfectly_do_not_divide_by_nothing():
    exact = [Run(key=str(i), latency_ms=1.0, value=float(i), curve=curve(i, i, i, i)) for i in range(9)]
    made = asked(exact)
    assert made(curve(7.9)) is not None
    assert made(curve(8.1)) is None


def test_a_rule_is_a_plain_value(known):
    made = asked(known)
    assert pickle.loads(pickle.dumps(made)) == made == asked(list(known))
    assert hash(made) == hash(asked(known))
    assert isinstance(made, Rule)


def test_a_higher_confidence_stops_less(known):
    tried = [curve(x) for x in np.linspace(-1, 1.5, 26)]
    counts = [sum(asked(known, confidence=c)(each) is not None for each in tried) for c in (0.5, 0.8, 0.95, 0.999)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1]


@pytest.mark.parametrize("runs", [FEWEST, 14])
def test_stopped_runs_would_have_reached_the_goal_as_rarely_as_promised(runs):
    """Of runs drawn like the finished ones: those stopped at any look, against where they would have ended."""
    rng = np.random.default_rng(runs)
    confidence, stopped, wrong, hopeless = 0.8, 0, 0, 0
    for _ in range(300):
        values = rng.normal(3.0, 0.5, runs)
        made = asked(finished(values, rng, noise=0.3), confidence=confidence)
        # A goal amid the field, as of a slow candidate when only few are as fast: wrong stops are easy to make.
        made = replace(made, goal=float(np.sort(values)[runs // 2]))
        (final,) = rng.normal(3.0, 0.5, 1)
        (way,) = drawn([final], rng, noise=0.3)
        hopeless += final < made.goal
        if any(made(way[: i + 1]) for i in range(len(LOOKS))):
            stopped += 1
            wrong += final > made.goal
    assert stopped > 0.5 * hopeless  # it does stop what is to be stopped
    assert stats.binomtest(wrong, stopped, 1 - confidence, alternative="greater").pvalue > 0.01
    assert wrong > 0  # and the test is not of a rule that never errs
