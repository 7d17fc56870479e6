"""The predictor and its card: intervals cover what they say, and what it cannot know it refuses.

Simulated tables have known costs, so every claim of a card can be checked against the truth.
"""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from latency_cases import (
    costs,
    measured,
    networks,
    sheet_in,
    simulate,
)

from nas.errors import NasError, UsageError
from nas.latency import LatencyPredictor, fit
from nas.latency.calibration import calibrated, chosen, folds, held_out
from nas.latency.card import residuals_of
from nas.latency.predictor import EMPIRICAL_FROM
from nas.latency.problem import problem
from nas.latency.regression import solve
from nas.op import FEATURES
from nas.tables import Subject


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """One predictor of 24 networks and 20 blocks at 2 % noise, with its sheet's folder."""
    folder = tmp_path_factory.mktemp("tables")
    rows, known = simulate(blocks=20)
    return fit(rows, known, sheet_in(folder))


def test_noise_is_averaged_out_and_blocks_find_their_scale(fitted):
    x = networks(200, 77)
    ms, low, high = fitted.predict(x)
    truth = x @ costs()
    assert np.abs(ms / truth - 1).mean() < 0.02
    assert (low < ms).all()
    assert (ms < high).all()
    assert fitted.card["block_scale"] == pytest.approx(0.9, abs=0.03)


def test_intervals_cover_what_they_say_on_networks_never_seen(tmp_path):
    sheet = sheet_in(tmp_path)
    inside, below, above, n = 0, 0, 0, 0
    for seed in range(6):
        rows, known = simulate(n=26, noise=0.05, seed=10 * seed)
        posed, _ = problem(rows, known, sheet)
        everything = np.ones(len(posed.names), bool)
        predictor = calibrated(chosen(posed, everything), everything).at(posed.target_effects)
        x = networks(200, 500 + seed)
        truth = (x @ costs()) * np.exp(0.05 * np.random.default_rng(seed).standard_normal(len(x)))
        _, low, high = predictor.predict(x, 0.8)
        inside += int(((low <= truth) & (truth <= high)).sum())
        below += int((truth <= predictor.upper(x, 0.8)).sum())
        above += int((truth >= predictor.lower(x, 0.8)).sum())
        n += len(x)
    # Nominal 0.8; the tables themselves vary, hence the margin. One-sided bounds the wrong way round would give 0.2.
    assert 0.72 < inside / n < 0.92
    assert 0.70 < below / n < 0.93
    assert 0.70 < above / n < 0.93


def test_intervals_are_ordered_and_widen_with_confidence(fitted):
    x = networks(50, 5)
    narrow, wide = fitted.predict(x, 0.5), fitted.predict(x, 0.9)
    # A central interval leaves the same share out at both ends.
    assert np.array_equal(wide[1], fitted.lower(x, 0.95))
    assert np.array_equal(wide[2], fitted.upper(x, 0.95))
    assert (wide[1] < narrow[1]).all()
    assert (narrow[2] < wide[2]).all()
    bounds = [fitted.upper(x, c) for c in (0.5, 0.8, 0.9, 0.96, 0.99, 0.999)]
    assert all((a <= b).all() for a, b in itertools.pairwise(bounds))
    floors = [fitted.lower(x, c) for c in (0.5, 0.8, 0.9, 0.96, 0.99, 0.999)]
    assert all((a >= b).all() for a, b in itertools.pairwise(floors))


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9, 0.95, 0.99])
def test_probability_and_upper_bound_agree(fitted, confidence):
    x = networks(300, 9)
    upper = fitted.upper(x, confidence)
    for ms in np.quantile(upper, [0.1, 0.5, 0.9]):
        assert np.array_equal(fitted.probability_within(x, float(ms)) >= confidence - 1e-12, upper <= ms * (1 + 1e-12))


def test_probability_grows_with_the_budget_and_is_zero_at_nothing(fitted):
    x = networks(1, 2)
    ms = float(fitted.predict(x)[0][0])
    shares = [float(fitted.probability_within(x, ms * f)[0]) for f in (0.5, 0.9, 1.0, 1.1, 2.0)]
    assert shares == sorted(shares)
    assert shares[0] < 0.05
    assert shares[-1] > 0.95
    assert fitted.probability_within(x, 0.0)[0] == 0.0


def test_contributions_of_blocks_add_up_to_the_network(fitted):
    parts = networks(7, 4)
    assert fitted.contributions(parts).sum() == pytest.approx(fitted.predict(parts.sum(axis=0)[None])[0][0])


def test_json_gives_the_same_numbers_to_the_last_bit(fitted):
    again = LatencyPredictor.from_json(json.loads(json.dumps(fitted.to_json())))
    x = networks(40, 8)
    for mine, theirs in zip(fitted.predict(x, 0.9), again.predict(x, 0.9), strict=True):
        assert np.array_equal(mine, theirs)
    assert np.array_equal(fitted.upper(x, 0.99), again.upper(x, 0.99))
    assert json.dumps(again.to_json()) == json.dumps(fitted.to_json())


def test_a_predictor_of_other_features_is_refused(fitted):
    data = fitted.to_json()
    with pytest.raises(NasError, match="other features"):
        LatencyPredictor.from_json({**data, "features": data["features"][:-1]})
    with pytest.raises(NasError, match=r"features must be \[n, "):
        fitted.predict(np.ones((3, 4)))


def test_an_operator_kind_that_was_never_fitted_is_refused_by_name(fitted):
    x = networks(2, 0)
    x[1, FEATURES.index("depthwise.macs")] = 1.0
    for call in (fitted.predict, fitted.upper, fitted.lower, lambda v: fitted.probability_within(v, 10.0)):
        with pytest.raises(NasError, match="kind depthwise"):
            call(x)
    assert "depthwise" in fitted.card["never_seen"]
    assert fitted.predict(x, unseen="prior")[0][1] > fitted.predict(x[:1])[0][0]


def test_a_confidence_outside_its_range_is_refused(fitted):
    with pytest.raises(UsageError, match="between 0 and 1"):
        fitted.predict(networks(1, 0), 80)


def test_far_outside_the_fitted_range_the_interval_widens_and_a_warning_says_so(fitted):
    x = networks(1, 0)
    ms = float(fitted.predict(x)[0][0])
    low, high = fitted.range_ms
    inside, edge, far = x * high / ms, x * 1.9 * high / ms, x * 8 * high / ms
    tiny = x * low / ms / 8

    def width(v):
        _, a, b = fitted.predict(v, 0.95)
        return float(np.log(b[0] / a[0]))

    assert width(edge) == pytest.approx(width(inside))
    assert width(far) > 2 * width(inside)
    assert width(tiny) > 2 * width(inside)
    assert fitted.warnings(np.vstack([inside, edge])) == ()
    assert "2 of 4 networks are more than 2 times outside" in fitted.warnings(np.vstack([inside, edge, far, tiny]))[0]
    assert fitted.extrapolation(np.vstack([inside, far])).tolist() == [False, True]


def test_a_missing_feature_shows_in_the_card(tmp_path, fitted):
    """If the cost of attention were lost from the features, the held-out error would tell."""
    rows, known = simulate(blocks=20)
    blind = {}
    for key, one in known.items():
        kept = {k: v for k, v in one.features.items() if not k.startswith("attention")}
        blind[key] = Subject(key=key, kind=one.kind, name=key, features=kept)
    card = fit(rows, blind, sheet_in(tmp_path)).card
    assert card["held_out"]["mape"] > 2 * fitted.card["held_out"]["mape"]


def test_the_card_tells_the_truth_about_the_noise(fitted):
    card = fitted.card
    held = card["held_out"]
    assert card["rows"] == card["networks"] == 24
    assert card["blocks"] == 20
    assert held["method"] == "five-fold"
    # 2 % noise on the truth and a little from the fit: mean absolute error of a normal is 0.8 sd.
    assert 0.01 < held["mape"] < 0.03
    assert held["within_5"] <= held["within_10"]
    assert held["within_10"] > 0.9
    assert held["kendall"] > 0.9
    assert 0.6 <= held["coverage"]["0.8"]["measured"] <= 1.0
    assert card["interval"]["method"] == "jackknife+"
    assert json.loads(json.dumps(card)) == card


def test_a_network_that_does_not_follow_the_others_is_the_worst(tmp_path):
    rows, known = simulate(n=12)
    odd = rows[5]
    rows[5] = measured(odd.subject, odd.latency_ms * 2)
    card = fit(rows, known, sheet_in(tmp_path)).card
    assert card["held_out"]["worst"]["subject"] == odd.subject
    assert card["held_out"]["worst"]["error"] < -0.3


def test_flagged_excluded_and_component_rows_do_not_move_the_fit(tmp_path):
    rows, known = simulate(n=8)
    sheet = sheet_in(tmp_path)
    extra = [
        measured("network000", 1e4, session="s2", flagged="anchors 30 % slower than their best"),
        measured("network001", 1e4, excluded_because="another lowering"),
        measured("decoder", 1e4, kind="component", role="decoder"),
    ]
    clean, dirty = fit(rows, known, sheet), fit([*rows, *extra], known, sheet)
    assert np.array_equal(clean.coefficients, dirty.coefficients)
    assert dirty.card["excluded"] == 2


def test_too_few_networks_are_refused_with_the_number_needed(tmp_path):
    rows, known = simulate(n=4, blocks=30)
    with pytest.raises(NasError, match=r"4 measured networks.*at least 5"):
        fit(rows, known, sheet_in(tmp_path))


def test_rows_of_another_chip_are_not_mixed_in(tmp_path):
    rows, known = simulate(n=8)
    others = [measured(r.subject, r.latency_ms * 3, chip="another") for r in rows]
    sheet = sheet_in(tmp_path)
    assert np.array_equal(fit(rows, known, sheet).coefficients, fit([*rows, *others], known, sheet).coefficients)
    with pytest.raises(NasError, match="0 measured networks of the chip 'new'"):
        fit(others, known, sheet)


def test_a_used_row_without_features_is_an_error(tmp_path):
    rows, known = simulate(n=8)
    del known["network003"]
    with pytest.raises(NasError, match="'network003' is to be fitted but has no features"):
        fit(rows, known, sheet_in(tmp_path))


def test_folds_are_a_partition():
    assert folds(("a", "b")) == (("a",), ("b",))
    names = tuple(f"n{i:02d}" for i in range(23))
    parts = folds(names)
    assert len(parts) == 5
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert folds(names) == parts


def test_residuals_are_of_fits_that_did_not_see_the_network(tmp_path):
    rows, known = simulate(n=7, noise=0.1)
    posed, _ = problem(rows, known, sheet_in(tmp_path))
    everything = np.ones(len(posed.names), bool)
    predictor = calibrated(posed, everything).at(posed.target_effects)
    for i, group in enumerate(posed.groups):
        out = posed.networks == group
        place = solve(posed.rows.take(~out), posed.shrinkage).at(posed.target_effects)
        x = posed.rows.features[out]
        missed = np.log(posed.rows.ms[out] / place.ms(x)) / place.spread(x)
        assert predictor.residuals[i] == pytest.approx(missed[0])
        assert predictor.without[i] == pytest.approx(place.costs, rel=1e-5)


def test_held_out_rows_are_not_in_the_fit_that_predicts_them(tmp_path):
    rows, known = simulate(n=9, noise=0.0)
    sheet = sheet_in(tmp_path)
    before = {row.name: row.predicted for row in held_out(problem(rows, known, sheet)[0])}
    rows[4] = measured(rows[4].subject, rows[4].latency_ms * 1.5)
    after = {row.name: row.predicted for row in held_out(problem(rows, known, sheet)[0])}
    assert after[rows[4].subject] == before[rows[4].subject]
    assert after[rows[3].subject] != before[rows[3].subject]


def test_many_networks_are_left_out_in_parts_and_the_intervals_still_cover(tmp_path):
    sheet = sheet_in(tmp_path)
    rows, known = simulate(n=80, noise=0.05, seed=3)
    posed, _ = problem(rows, known, sheet)
    everything = np.ones(len(posed.names), bool)
    predictor = calibrated(posed.shrunk(ridge=0.001), everything).at(posed.target_effects)
    assert predictor.without.shape == (20, len(FEATURES))
    assert len(predictor.residuals) == len(predictor.fold) == 80
    # Each network's residual is of the one fit that left it out.
    i = 17
    out = np.isin(posed.networks, np.array(posed.groups)[predictor.fold == predictor.fold[i]])
    assert not out.all()
    x = networks(400, 600)
    truth = (x @ costs()) * np.exp(0.05 * np.random.default_rng(9).standard_normal(len(x)))
    for level in (0.8, 0.9):
        _, low, high = predictor.predict(x, level)
        assert abs(((low <= truth) & (truth <= high)).mean() - level) < 0.08
    again = LatencyPredictor.from_json(json.loads(json.dumps(predictor.to_json())))
    assert np.array_equal(again.upper(x, 0.9), predictor.upper(x, 0.9))


def test_the_card_keeps_every_row_with_its_residual_and_source(fitted):
    found = residuals_of(fitted.card)
    assert len(found) == 24
    assert {row.source for row in found} == {"simulated"}
    assert np.mean([abs(row.error) for row in found]) == pytest.approx(fitted.card["held_out"]["mape"])
    assert all(row.intervals["0.8"][0] < row.predicted < row.intervals["0.8"][1] for row in found)
    assert all(row.predicted / row.ms - 1 == pytest.approx(row.error) for row in found)


def test_the_card_tells_how_old_the_newest_row_is(tmp_path):
    rows, known = simulate(n=6)
    sheet = sheet_in(tmp_path)
    assert fit(rows, known, sheet).card["newest"] is None
    dated = [measured(row.subject, row.latency_ms, measured_at=f"2024-0{i + 1}") for i, row in enumerate(rows)]
    assert fit(dated, known, sheet).card["newest"] == "2024-06"


def test_a_ratio_of_two_networks_is_surer_than_either(fitted):
    x = networks(60, 4)
    near = x * 1.3
    ratio, low, high = fitted.ratio(near, x, 0.8)
    assert ratio == pytest.approx(np.full(60, 1.3))
    assert (low < ratio).all()
    assert (high > ratio).all()
    strange = x.copy()
    strange[:, FEATURES.index("norm.bytes")] *= 50
    _, lower, higher = fitted.ratio(strange, x, 0.8)
    assert np.log(higher / lower).mean() > np.log(high / low).mean()


def test_the_first_size_with_empirical_quantiles_is_stated():
    assert EMPIRICAL_FROM == 20
