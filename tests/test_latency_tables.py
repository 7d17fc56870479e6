"""From sheets and tables to fits: priors, pooled chips, files, and the shipped iPhone table."""

from __future__ import annotations

import json

import numpy as np
import pytest
from latency_cases import (
    CHIPS,
    SLUG,
    costs,
    measured,
    networks,
    sheet_in,
    simulate,
    subject,
)

from nas import components, tables
from nas.device import find_target, load_sheet
from nas.errors import NasError, UsageError
from nas.latency import fit, load_predictor, refit
from nas.latency.calibration import calibrated, chip_factors, chosen, held_out_chips, trials
from nas.latency.predictor import kinds_of
from nas.latency.problem import RIDGES, problem, roofline
from nas.op import FEATURES
from nas.space import load_space


def test_the_roofline_is_stated_per_byte_really_moved(tmp_path):
    prior = roofline(sheet_in(tmp_path))
    # fp16: a feature's gigabyte at float32 is half a gigabyte on the wire.
    assert prior[FEATURES.index("conv.bytes")] == 100.0
    assert prior[FEATURES.index("conv.macs")] == 25.0
    assert prior[FEATURES.index("norm.count")] == 10.0


def test_a_sheet_without_a_roofline_or_with_unknown_settings_is_refused(tmp_path):
    rows, known = simulate(n=6)
    with pytest.raises(UsageError, match=r"fit\.chip_ds.*did you mean 'fit\.chip_sd'"):
        fit(rows, known, sheet_in(tmp_path, extra="[fit]\nchip_ds = 0.1\n"))
    path = tmp_path / f"{SLUG}.toml"
    path.write_text(path.read_text().replace("ms_per_gb = 200.0", "ms_per_gb = 0.0"))
    with pytest.raises(UsageError, match=r"roofline\.ms_per_gb must be a positive number"):
        roofline(load_sheet(path))


def test_another_predictor_can_be_the_prior(tmp_path):
    rows, known = simulate(n=5, noise=0.0, seed=40)
    slower = [measured(r.subject, 2 * r.latency_ms) for r in rows]
    sheet = sheet_in(tmp_path)
    x = networks(100, 3)
    truth = 2 * x @ costs()

    def error(predictor):
        return np.abs(predictor.predict(x, unseen="prior")[0] / truth - 1).mean()

    assert error(fit(slower, known, sheet, prior=np.maximum(costs(), 1e-6))) < 0.5 * error(fit(slower, known, sheet))


def pooled(noise=0.01, seed=0):
    """Five networks on three chips whose speeds follow tops to the power 0.7; the target's chip ran only two."""
    rng = np.random.default_rng(seed)
    x = networks(5, seed)
    rows, known = [], {}
    for i, vector in enumerate(x):
        known[f"n{i}"] = subject(f"n{i}", vector)
        for chip, tops in (("new", 40.0), ("old", 10.0), ("older", 5.0)):
            if chip != "new" or i < 2:
                ms = vector @ costs() * (tops / 40.0) ** -0.7 * np.exp(noise * rng.standard_normal())
                rows.append(measured(f"n{i}", ms, chip=chip, kind="reference"))
    return rows, known


def test_chips_are_pooled_and_predictions_are_the_targets(tmp_path):
    rows, known = pooled()
    sheet = sheet_in(tmp_path, extra=CHIPS)
    posed, _ = problem(rows, known, sheet)
    everything = np.ones(len(posed.names), bool)
    final = chosen(posed, everything)
    predictor = calibrated(final, everything, posed.target_effects)
    # Choosing again starts from the sheet, so that a held-out fit inherits nothing from a fit of everything.
    again = chosen(final, everything)
    assert np.array_equal(again.shrinkage.effect_ridge, final.shrinkage.effect_ridge)
    assert np.array_equal(final.shrunk(ridge=RIDGES[0]).shrinkage.effect_ridge, posed.shrinkage.effect_ridge)
    factors = chip_factors(final)
    assert factors["older"] == pytest.approx(8**0.7, rel=0.1)
    assert factors["new"] == 1.0
    x = np.array([known[f"n{i}"].vector for i in range(5)])
    assert predictor.predict(x)[0] == pytest.approx(x @ costs(), rel=0.1)


def test_every_part_of_a_pooled_model_is_tried(tmp_path):
    rows, known = pooled()
    posed, _ = problem(rows, known, sheet_in(tmp_path, extra=CHIPS))
    by_network, by_row, by_chip = trials(posed, np.ones(len(posed.names), bool))
    assert [len(by_network), len(by_row), len(by_chip)] == [5, 12, 3]
    assert all(mask.sum() == 1 for mask in by_row)
    assert sum(int(mask.sum()) for mask in by_network) == sum(int(mask.sum()) for mask in by_chip) == 12


def test_a_chip_held_out_is_priced_by_the_trend(tmp_path):
    rows, known = pooled(noise=0.0)
    two = [row for row in rows if row.chip != "older"]
    posed, _ = problem(two, known, sheet_in(tmp_path, extra=CHIPS))
    found = {(row.name, row.chip): row.error for row in held_out_chips(posed)}
    assert len(found) == 7
    # Without "old" only the first guess of the exponent is left: 0.5 where the truth is 0.7, so 4^0.2 too fast.
    assert found["n1", "old"] == pytest.approx(4**-0.2 - 1, abs=0.15)


def test_a_chip_that_the_sheet_does_not_list_is_an_error(tmp_path):
    rows, known = pooled()
    rows.append(measured("n0", 3.0, chip="mew", kind="reference"))
    with pytest.raises(UsageError, match=r"unknown chip 'mew'.*did you mean 'new'"):
        fit(rows, known, sheet_in(tmp_path, extra=CHIPS))


def test_refit_writes_what_load_reads_and_a_changed_table_is_stale(tmp_path):
    rows, known = simulate(n=6)
    sheet_in(tmp_path)
    with pytest.raises(NasError, match="has no fitted latency predictor") as caught:
        load_predictor("toy", tmp_path)
    assert caught.value.hint == "nas measure --target toy --fit-only"
    tables.append(SLUG, rows, tmp_path)
    tables.write_subjects(SLUG, known.values(), tmp_path)
    written = refit("toy", tmp_path)
    first = (tmp_path / f"{SLUG}.predictor.json").read_bytes()
    assert json.dumps(load_predictor(SLUG, tmp_path).to_json()) == json.dumps(written.to_json())
    refit("toy", tmp_path)
    assert (tmp_path / f"{SLUG}.predictor.json").read_bytes() == first
    tables.append(SLUG, [measured("network000", 5.0, session="s2")], tmp_path)
    with pytest.raises(NasError, match="another state of the table"):
        load_predictor("toy", tmp_path)


IPHONE = "iphone-16-pro-max--coreml--fp16"


def iphone_problem():
    sheet = load_sheet(tables.table_path(IPHONE, ".toml"))
    return problem(tables.read(IPHONE), tables.subjects(IPHONE), sheet)[0]


def test_snapgen_left_out_of_the_fit_lies_inside_its_interval():
    """Show 3 of the first issue: 274 ms per step, predicted by a fit that saw neither the network nor its chip."""
    posed = iphone_problem()
    out = posed.networks == "snapgen-unet-1024"
    assert out.sum() == 1
    assert posed.rows.ms[out][0] == 274.0
    assert posed.chips[out][0] == "A18 Pro"
    assert "A18 Pro" not in posed.chips[~out]
    predictor = calibrated(chosen(posed, ~out), ~out, posed.target_effects)
    x = posed.rows.features[out]
    assert kinds_of(x) - set(predictor.seen) == {"depthwise"}
    with pytest.raises(NasError, match="kind depthwise"):
        predictor.predict(x)
    for level in (0.8, 0.9):
        _, low, high = predictor.predict(x, level, unseen="prior")
        assert low[0] < 274.0 < high[0]
        assert high[0] / low[0] < 2.5


def test_the_shipped_iphone_predictor_belongs_to_its_table():
    predictor = load_predictor("iphone")
    subjects = tables.subjects(IPHONE)
    x = subjects["snapgen-unet-1024"].vector[None]
    ms, low, high = (float(v[0]) for v in predictor.predict(x, 0.8))
    assert low < 274.0 < high
    assert ms == pytest.approx(274.0, rel=0.05)
    assert predictor.card["never_seen"] == []
    assert predictor.card["interval"]["method"] == "Student-t with 4 degrees of freedom"
    held = predictor.card["held_out"]
    assert held["rows"] == 15
    assert held["mape"] < 0.12
    for share in held["coverage"].values():
        assert share["measured"] >= share["nominal"] - 0.1


def test_the_iphones_components_make_the_headline():
    sheet, space = find_target(IPHONE), load_space("snapgen_unet")
    text, decoder = (components.charge(part, 1024, sheet, None, 0.8) for part in components.components(space))
    assert (decoder.ms, text.ms) == (119.0, 185.0)
    assert (decoder.basis, text.basis) == ("published", "published")
    assert "derived" in text.source
    assert 4 * 274.0 + decoder.ms + text.ms == 1400.0


def test_published_rows_are_used_once_and_exclusions_have_reasons():
    used = [row for row in tables.read(IPHONE) if row.used]
    assert len({(row.subject, row.device) for row in used}) == len(used)
    assert all("memory" not in row.source for row in tables.read(IPHONE))
    assert {row.subject for row in used} == set(tables.subjects(IPHONE))
    assert not any(row.latency_ms == 1700.0 for row in used)
