"""Published quotients: they set proportions, never a scale, and stay out of fits that must not know them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from latency_cases import costs, networks, rows_of, sheet_in, shrinkage, simulate, subject
from scipy.optimize import nnls

from nas.errors import NasError
from nas.latency import posed_by
from nas.latency import ratios as quotients
from nas.latency.nonnegative import nonnegative
from nas.latency.ratios import Ratio
from nas.latency.regression import Ratios, solve
from nas.op import FEATURES

SLUG = "toy--onnxruntime--fp16"


def ratio(subject="a", relative_to="b", **changes):
    values = {"ratio": 0.5, "sd": 0.05, "chip": "new", "source": "a paper", "quality": "verified"}
    return Ratio(subject=subject, relative_to=relative_to, **{**values, **changes})


def quotients_of(over, under, weight=1.0):
    n = len(over)
    logs = np.log((over @ costs()) / (under @ costs()))
    return Ratios(over=over, under=under, log_ratio=logs, weights=np.full(n, weight))


def test_ratios_alone_find_proportions_and_one_row_the_scale():
    over, under = networks(60, 0), networks(60, 1)
    one = networks(1, 2)
    prior = np.full(len(FEATURES), 50.0)
    found = solve(rows_of(one, one @ costs()), shrinkage(1e-7, prior=prior), quotients_of(over, under))
    x = networks(50, 3)
    assert found.at(np.zeros(0)).ms(x) == pytest.approx(x @ costs(), rel=0.01)
    # Without the ratios, one row says next to nothing about proportions.
    alone = solve(rows_of(one, one @ costs()), shrinkage(1e-7, prior=prior)).at(np.zeros(0))
    assert np.abs(alone.ms(x) / (x @ costs()) - 1).mean() > 0.1


def test_a_ratio_says_nothing_about_a_scale():
    over, under, x = networks(20, 0), networks(20, 1), networks(9, 2)
    ms = x @ costs()
    fast = solve(rows_of(x, ms), shrinkage(0.01), quotients_of(over, under)).at(np.zeros(0))
    slow = solve(rows_of(x, 1000 * ms), shrinkage(0.01), quotients_of(over, under)).at(np.zeros(0))
    assert slow.costs == pytest.approx(1000 * fast.costs, rel=1e-4)


def test_a_sure_ratio_moves_a_fit_further_than_an_unsure_one():
    rows, pair = rows_of(networks(6, 0), networks(6, 0) @ costs()), networks(2, 5)
    said = np.log(3.0 * (pair[0] @ costs()) / (pair[1] @ costs()))

    def log_ratio(weight):
        one = Ratios(over=pair[:1], under=pair[1:], log_ratio=np.array([said]), weights=np.array([weight]))
        place = solve(rows, shrinkage(1.0), one).at(np.zeros(0))
        return float(np.log(place.ms(pair[:1]) / place.ms(pair[1:]))[0])

    free = solve(rows, shrinkage(1.0)).at(np.zeros(0))
    nothing = float(np.log(free.ms(pair[:1]) / free.ms(pair[1:]))[0])
    assert nothing < log_ratio(0.01) < log_ratio(1.0) < log_ratio(100.0) < said + 1e-6


def test_the_fit_is_where_its_objective_is_least():
    x, over, under = networks(12, 0), networks(5, 1), networks(5, 2)
    rows = rows_of(x, x @ costs() * np.exp(0.2 * np.random.default_rng(0).standard_normal(12)))
    pairs = replace(quotients_of(over, under), log_ratio=quotients_of(over, under).log_ratio + 0.4)
    ridge = shrinkage(0.05)
    found = solve(rows, ridge, pairs)

    def objective(u):
        c = u * found.unit
        off = x @ c / rows.ms - 1
        gap = np.log((over @ c) / (under @ c)) - pairs.log_ratio
        return (off**2).sum() + (gap**2).sum() + ridge.ridge * ((u - u.mean()) ** 2).sum()

    u = found.costs / found.unit
    best = objective(u)
    for i in np.flatnonzero(u):
        for step in (-1e-3, 1e-3):
            other = u.copy()
            other[i] += step
            assert objective(other) > best - 1e-9


def test_ratios_of_a_network_that_is_held_out_are_not_read(tmp_path):
    rows, known = simulate(n=6)
    far = ratio("network000", "network001", ratio=9.0, sd=0.01)
    posed, _, _ = posed_by(rows, known, sheet_in(tmp_path), ratios=[far])
    plain, _, _ = posed_by(rows, known, sheet_in(tmp_path))
    assert not np.allclose(posed.solve().costs, plain.solve().costs)
    for held, read in (("network000", False), ("network001", False), ("network002", True)):
        keep = posed.networks != held
        assert np.array_equal(posed.solve(keep).costs, plain.solve(keep).costs) != read


def test_excluded_ratios_are_kept_and_not_read(tmp_path):
    rows, known = simulate(n=6)
    far = ratio("network000", "network001", ratio=9.0, excluded_because="secondary")
    posed, _, _ = posed_by(rows, known, sheet_in(tmp_path), ratios=[far])
    assert posed.ratios.empty


def test_a_ratio_of_an_unknown_network_is_an_error(tmp_path):
    rows, known = simulate(n=6)
    with pytest.raises(NasError, match="ratio of 'ladder' is to be fitted but the table has no features"):
        posed_by(rows, known, sheet_in(tmp_path), ratios=[ratio("ladder", "network001")])


def test_ratios_come_back_as_they_were_written(tmp_path):
    sheet_in(tmp_path)
    assert quotients.read(SLUG, tmp_path) == ()
    rows = (ratio(ratio=1 / 3), ratio("c", excluded_because="why, and how"))
    path = quotients.write(SLUG, rows, tmp_path)
    assert quotients.read(SLUG, tmp_path) == rows
    path.write_text(path.read_text().replace("0.5", "-0.5"))
    with pytest.raises(NasError, match=r"ratios\.csv:3: ratio of 'c' must be positive"):
        quotients.read(SLUG, tmp_path)
    path.write_text("subject,ratio\n")
    with pytest.raises(NasError, match=r"ratios\.csv:1: the columns must be"):
        quotients.read(SLUG, tmp_path)


def test_a_ratio_to_itself_is_refused():
    with pytest.raises(NasError, match="to itself"):
        ratio("a", "a")


def test_features_of_both_networks_are_taken():
    known = {key: subject(key, networks(1, i)[0]) for i, key in enumerate("ab")}
    found, pairs = quotients.fitted([ratio(sd=0.1)], known, row_sd=0.05)
    assert np.array_equal(found.over[0], known["a"].vector)
    assert np.array_equal(found.under[0], known["b"].vector)
    assert found.weights[0] == pytest.approx(0.25)
    assert pairs.tolist() == [["a", "b"]]


@pytest.mark.parametrize("seed", range(12))
def test_the_active_set_solver_agrees_with_scipys(seed):
    rng = np.random.default_rng(seed)
    design, target = rng.standard_normal((40, 17)), rng.standard_normal(40)
    known = nnls(design, target)[0]
    bounded = np.zeros(17, bool)
    for guess in (bounded, ~bounded, rng.random(17) < 0.5):
        found = nonnegative(design.T @ design, design.T @ target, bounded, guess)
        assert found == pytest.approx(known, abs=1e-9)
    free = np.arange(17) >= 14
    split = nnls(np.hstack([design, -design[:, free]]), target)[0]
    both = np.concatenate([split[:14], split[14:17] - split[17:]])
    assert nonnegative(design.T @ design, design.T @ target, free, bounded) == pytest.approx(both, abs=1e-8)
