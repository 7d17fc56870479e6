"""Targets with two to four networks: their spread comes from other targets, and the card says so."""

from __future__ import annotations

import json

import numpy as np
import pytest
from latency_cases import SLUG, costs, networks, sheet_in, simulate

from nas import tables
from nas.errors import NasError
from nas.latency import fit, load_predictor, posed_by, refit
from nas.latency.few import tried
from nas.latency.problem import RIDGES
from nas.latency.spread import ROOFLINE, borrowed, read, spread_path

BORROW = "[fit]\nborrow_spread = true\n"


def others(sd=0.1, targets=("one", "two", "three"), numbers=(1, 2, 3, 4)):
    """What a file of spreads holds where each target missed by `sd` at every ridge."""
    by_ridge = {f"{ridge:g}": {"square": sd**2, "spread": abs(np.log(ridge / 0.1))} for ridge in RIDGES}
    return {target: {str(n): by_ridge for n in numbers} for target in targets}


def write_spread(folder, found):
    (folder / "spread.json").write_text(json.dumps({"priors": {ROOFLINE: found}}))


def test_the_spread_of_others_is_pooled_with_each_counted_once():
    found = {**others(0.1, ("one",)), **others(0.2, ("two",)), **others(0.4, ("mine",))}
    told = borrowed({ROOFLINE: found}, ROOFLINE, {"mine"})
    assert told[2].targets == ("one", "two")
    assert told[2].degrees == 1
    assert told[2].sd == pytest.approx(np.sqrt((0.1**2 + 0.2**2) / 2))
    assert told[2].ridge == 0.1
    assert borrowed({ROOFLINE: others(targets=("one", "mine"))}, ROOFLINE, {"mine"}) == {}
    assert borrowed({ROOFLINE: found}, "another prior", set()) == {}


def test_three_networks_fit_with_borrowed_spread_and_the_card_says_so(tmp_path):
    write_spread(tmp_path, others(0.1))
    rows, known = simulate(n=3)
    predictor = fit(rows, known, sheet_in(tmp_path, extra=BORROW), folder=tmp_path)
    assert predictor.degrees == 2 + 2
    interval = predictor.card["interval"]
    assert interval["method"].endswith("3 networks, spread taken from 3 other targets")
    assert interval["borrowed"]["targets"] == ["one", "three", "two"]
    assert predictor.card["held_out"]["rows"] == 3


def test_what_the_networks_themselves_show_counts_too(tmp_path):
    rows, known = simulate(n=4, noise=0.0)
    sheet = sheet_in(tmp_path, extra=BORROW)
    write_spread(tmp_path, others(0.05))
    calm = fit(rows, known, sheet, folder=tmp_path)
    wild = fit(
        [*rows[:3], tables.Measurement(**{**vars(rows[3]), "latency_ms": rows[3].latency_ms * 4})],
        known,
        sheet,
        folder=tmp_path,
    )
    assert wild.sd > 2 * calm.sd
    write_spread(tmp_path, others(0.5))
    assert fit(rows, known, sheet, folder=tmp_path).sd > 2 * calm.sd


def test_one_network_is_refused_and_so_are_few_without_witnesses(tmp_path):
    rows, known = simulate(n=4)
    sheet = sheet_in(tmp_path, extra=BORROW)
    with pytest.raises(NasError, match="without enough other targets to take a spread from needs at least 5"):
        fit(rows, known, sheet, folder=tmp_path)
    write_spread(tmp_path, others())
    with pytest.raises(
        NasError, match=r"has 1 measured network of the chip 'new'; .*spread of other targets needs at least 2"
    ):
        fit(rows[:1], known, sheet, folder=tmp_path)
    assert fit(rows[:2], known, sheet, folder=tmp_path).card["networks"] == 2


def test_a_sheet_that_does_not_ask_keeps_the_rule(tmp_path):
    write_spread(tmp_path, others())
    rows, known = simulate(n=4)
    with pytest.raises(NasError, match="at least 5"):
        fit(rows, known, sheet_in(tmp_path), folder=tmp_path)


def test_a_changed_spread_makes_what_borrowed_it_stale(tmp_path):
    write_spread(tmp_path, others(0.1))
    rows, known = simulate(n=3)
    sheet_in(tmp_path, extra=BORROW)
    tables.write(SLUG, rows, tmp_path)
    tables.write_subjects(SLUG, known.values(), tmp_path)
    refit("toy", tmp_path)
    load_predictor("toy", tmp_path)
    write_spread(tmp_path, others(0.2))
    with pytest.raises(NasError, match="another state"):
        load_predictor("toy", tmp_path)


def test_few_networks_are_tried_where_many_are_known(tmp_path):
    rows, known = simulate(n=14, blocks=5, noise=0.03)
    posed, _, _ = posed_by(rows, known, sheet_in(tmp_path))
    found = tried(posed)
    assert set(found) == {"1", "2", "3", "4"}
    assert set(found["1"]) == {f"{ridge:g}" for ridge in RIDGES}
    # Four networks say more than one, whatever the ridge that suits each.
    error = {n: min(by["square"] * np.exp(2 * by["spread"]) for by in found[n].values()) for n in found}
    assert error["4"] < error["1"]
    three, known3 = simulate(n=3)
    assert set(tried(posed_by(three, known3, sheet_in(tmp_path))[0])) == {"1", "2"}


@pytest.mark.slow
def test_borrowed_intervals_cover_on_a_target_like_the_others(tmp_path):
    """Spread measured on simulated targets, used on others of the same make: the intervals hold what they promise."""
    sheet = sheet_in(tmp_path)
    found = {}
    for seed in range(5):
        posed, _, _ = posed_by(*simulate(n=9, noise=0.05, seed=100 + seed), sheet)
        found[f"t{seed}"] = tried(posed, seed)
    write_spread(tmp_path, found)
    inside, n = 0, 0
    for seed in range(8):
        rows, known = simulate(n=3, noise=0.05, seed=200 + seed)
        predictor = fit(rows, known, sheet_in(tmp_path, extra=BORROW), folder=tmp_path)
        x = networks(100, 300 + seed)
        truth = (x @ costs()) * np.exp(0.05 * np.random.default_rng(seed).standard_normal(100))
        _, low, high = predictor.predict(x, 0.8, unseen="prior")
        inside, n = inside + int(((low <= truth) & (truth <= high)).sum()), n + 100
    assert 0.65 < inside / n < 0.97


def test_the_shipped_spread_is_readable_and_has_witnesses():
    assert spread_path().is_file()
    told = borrowed(read(), ROOFLINE, {"galaxy-s24--qnn--w8a16"})
    assert set(told) == {1, 2, 3, 4}
    assert all(one.degrees >= 1 for one in told.values())
