"""The regression: known costs come back, none is negative, and its uncertainty is that of least squares."""

from __future__ import annotations

import numpy as np
import pytest
from latency_cases import (
    INDEX,
    TRUTH,
    costs,
    networks,
    rows_of,
    shrinkage,
)

from nas.latency.regression import Place, Solution, solve, solve_tied
from nas.op import FEATURES


def test_known_costs_are_recovered_without_noise():
    x = networks(40, 0)
    place = solve(rows_of(x, x @ costs()), shrinkage(1e-10)).at(np.zeros(0))
    assert place.costs[INDEX] == pytest.approx(TRUTH, rel=1e-3)
    assert place.ms(x) == pytest.approx(x @ costs(), rel=1e-6)


def test_costs_are_never_negative():
    x = networks(30, 0)
    discount = x @ costs() - 0.5 * TRUTH[0] * x[:, INDEX[0]] - 1.2 * TRUTH[1] * x[:, INDEX[1]]
    place = solve(rows_of(x, np.maximum(discount, 1.0)), shrinkage()).at(np.zeros(0))
    assert (place.costs >= 0).all()
    # An unconstrained fit of the same rows does go below zero, so that the test can fail.
    relative = x[:, INDEX] / np.maximum(discount, 1.0)[:, None]
    assert np.linalg.lstsq(relative, np.ones(len(x)), rcond=None)[0].min() < -1


def test_error_is_relative_not_absolute():
    # One feature, two disagreeing rows: relative least squares gives (a + b) / (a^2 + b^2) in 1 / (ms per unit).
    x = np.zeros((2, len(FEATURES)))
    x[:, INDEX[0]] = 1.0, 100.0
    ms = np.array([1.0, 200.0])
    place = solve(rows_of(x, ms), shrinkage(1e-12)).at(np.zeros(0))
    a, b = 1.0, 0.5
    assert place.costs[INDEX[0]] == pytest.approx((a + b) / (a**2 + b**2), rel=1e-6)


def test_few_rows_are_pulled_to_the_priors_proportions_at_their_own_scale():
    x = networks(2, 3)
    prior = np.full(len(FEATURES), 1.0)
    prior[INDEX] = TRUTH
    strong = solve(rows_of(x, 3.0 * x @ costs()), shrinkage(1e3, prior=prior)).at(np.zeros(0))
    assert strong.costs[INDEX] == pytest.approx(3.0 * TRUTH, rel=1e-6)


@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_a_prior_in_other_units_changes_nothing(ridge):
    x = networks(6, 3)
    one, other = (
        solve(rows_of(x, x @ costs()), shrinkage(ridge, prior=np.full(len(FEATURES), p))).at(np.zeros(0))
        for p in (1.0, 1e4)
    )
    assert other.costs == pytest.approx(one.costs, rel=1e-6)
    assert other.spread(x) == pytest.approx(one.spread(x), rel=1e-6)


def test_effects_are_recovered_and_applied_at_their_place():
    x = networks(60, 1)
    alone = np.repeat([0.0, 1.0], 30)[:, None]
    ms = (x @ costs()) * np.exp(-0.2 * alone[:, 0])
    found = solve(rows_of(x, ms, alone), shrinkage(1e-9, effects=1))
    assert found.effects[0] == pytest.approx(-0.2, abs=1e-3)
    assert found.at(np.ones(1)).costs == pytest.approx(found.at(np.zeros(1)).costs * np.exp(found.effects[0]))


def test_weights_decide_between_disagreeing_rows():
    x = np.tile(networks(1, 0), (2, 1))
    ms = np.array([100.0, 110.0])
    heavy = solve(rows_of(x, ms, weights=np.array([1.0, 1e4])), shrinkage()).at(np.zeros(0))
    assert heavy.ms(x[:1])[0] == pytest.approx(110.0, rel=1e-3)


def test_spread_is_that_of_ordinary_least_squares_where_nothing_is_constrained():
    # Closed form: variance of a relative prediction = 1 + a (A'A + ridge)^-1 a', here one feature seen four times.
    x = np.zeros((4, len(FEATURES)))
    x[:, INDEX[0]] = 2.0
    place = solve(rows_of(x, np.full(4, 10.0)), shrinkage(1e-9)).at(np.zeros(0))
    assert place.spread(x[:1])[0] == pytest.approx(np.sqrt(1 + 1 / 4), rel=1e-4)


def test_spread_grows_on_features_that_no_row_has():
    x = networks(30, 0)
    place = solve(rows_of(x, x @ costs()), shrinkage(0.01)).at(np.zeros(0))
    strange = x[:1].copy()
    strange[0, FEATURES.index("depthwise.read")] = 10 * strange.sum()
    assert place.spread(strange)[0] > 2 * place.spread(x[:1])[0]


def test_place_prices_are_plain_products():
    place = Place(costs=costs(), unit=costs() + 1, covariance=np.zeros((len(FEATURES) + 1,) * 2))
    x = networks(3, 0)
    assert place.ms(x) == pytest.approx((x * costs()).sum(axis=1))
    assert place.spread(x) == pytest.approx(np.ones(3))


def test_tied_features_keep_the_priors_proportions_within_a_kind():
    x = networks(12, 3)
    prior = shrinkage(1e-9).prior
    found = solve_tied(rows_of(x, x @ costs()), shrinkage(1e-9))
    multiple = found.costs / prior
    for kind in ("conv", "linear"):
        moved = [FEATURES.index(f"{kind}.{measure}") for measure in ("read", "written", "far")]
        assert multiple[moved] == pytest.approx(multiple[moved[0]] * np.ones(3))
    macs = FEATURES.index("conv.macs")
    assert multiple[macs] != pytest.approx(multiple[FEATURES.index("conv.read")], rel=0.01)


def test_tied_fit_is_exact_where_the_truth_has_the_priors_proportions():
    x = networks(12, 3)
    prior = shrinkage(1e-9).prior
    truth = prior * np.array([3.0 if name.endswith("macs") else 0.5 for name in FEATURES])
    found = solve_tied(rows_of(x, x @ truth), shrinkage(1e-9))
    assert found.at(np.zeros(0)).ms(x) == pytest.approx(x @ truth, rel=1e-5)
    # Free of noise, the fit that may choose every feature apart is no better there.
    assert solve(rows_of(x, x @ truth), shrinkage(1e-9)).at(np.zeros(0)).ms(x) == pytest.approx(x @ truth, rel=1e-3)


def test_tied_uncertainty_moves_features_of_a_kind_together():
    x = networks(12, 3)
    found = solve_tied(rows_of(x, x @ costs()), shrinkage(1e-3))
    read, written = FEATURES.index("conv.read"), FEATURES.index("conv.written")
    block = found.covariance[np.ix_([read, written], [read, written])]
    assert block[0, 0] > 0
    assert block == pytest.approx(np.full((2, 2), block[0, 0]))


def test_tied_fit_takes_a_fit_nearby_as_its_first_guess():
    x = networks(12, 3)
    rows = rows_of(x, x @ costs())
    plain = solve_tied(rows, shrinkage(1e-2))
    near: Solution = solve(rows, shrinkage(1e-2))
    assert solve_tied(rows, shrinkage(1e-2), None, near).costs == pytest.approx(plain.costs, rel=1e-6)
