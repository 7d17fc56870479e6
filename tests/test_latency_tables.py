"""From sheets and tables to fits: priors, pooled chips, files."""

from __future__ import annotations

import json
from dataclasses import replace

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

from nas import tables
from nas.device import load_sheet
from nas.errors import NasError, UsageError
from nas.latency import fit, inputs_sha, load_predictor, refit
from nas.latency.calibration import calibrated, chosen, held_out_chips, trials
from nas.latency.card import chip_factors
from nas.latency.problem import RIDGES, problem, roofline
from nas.op import FEATURES


def test_the_roofline_is_stated_per_byte_really_moved(tmp_path):
    prior = roofline(sheet_in(tmp_path))
    # fp16: a feature's gigabyte at float32 is half a gigabyte on the wire.
    assert prior[FEATURES.index("conv.read")] == 100.0
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
    predictor = calibrated(final, everything).at(posed.target_effects)
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


ADAPTED = "toy--openvino--fp16"


def adapted(folder, rows, known, extra=""):
    """A target whose sheet names the toy target as its prior, with these rows."""
    sheet = (folder / f"{SLUG}.toml").read_text().replace('"onnxruntime"', '"openvino"').replace('["toy"]', '["toy2"]')
    (folder / f"{ADAPTED}.toml").write_text(sheet + f'[fit]\nprior = "toy"\n{extra}')
    tables.write(ADAPTED, [replace(row, target=ADAPTED) for row in rows], folder)
    tables.write_subjects(ADAPTED, known.values(), folder)


def fitted_source(folder):
    rows, known = simulate(n=40, seed=5)
    sheet_in(folder)
    tables.write(SLUG, rows, folder)
    tables.write_subjects(SLUG, known.values(), folder)
    return refit("toy", folder)


def test_three_networks_are_enough_with_another_target_as_the_prior(tmp_path):
    source = fitted_source(tmp_path)
    rows, known = simulate(n=3, seed=60)
    adapted(tmp_path, [replace(row, latency_ms=1.7 * row.latency_ms) for row in rows], known)
    predictor = refit("toy2", tmp_path)
    x = networks(100, 3)
    assert np.abs(predictor.predict(x, unseen="prior")[0] / (1.7 * x @ costs()) - 1).mean() < 0.05
    assert predictor.card["prior"] == {
        "kind": "target",
        "target": SLUG,
        "inputs_sha": inputs_sha(SLUG, tmp_path),
    }
    assert predictor.card["interval"]["method"] == "Student-t with 2 degrees of freedom"
    assert predictor.degrees == 2
    assert source.target == SLUG


def test_two_networks_are_refused_even_with_a_prior(tmp_path):
    fitted_source(tmp_path)
    adapted(tmp_path, *simulate(n=2, seed=60))
    with pytest.raises(
        NasError,
        match=r"2 measured networks of the chip .new.; a fit with another target's costs as its prior needs at least 3",
    ):
        refit("toy2", tmp_path)


def test_a_changed_prior_makes_what_rests_on_it_stale(tmp_path):
    fitted_source(tmp_path)
    adapted(tmp_path, *simulate(n=4, seed=60))
    refit("toy2", tmp_path)
    load_predictor("toy2", tmp_path)
    tables.append(SLUG, [measured("network001", 3.0, session="s9")], tmp_path)
    with pytest.raises(NasError, match="another state"):
        load_predictor("toy2", tmp_path)
    with pytest.raises(NasError, match="another state"):
        refit("toy2", tmp_path)


def test_a_prior_that_does_not_exist_is_named(tmp_path):
    fitted_source(tmp_path)
    adapted(tmp_path, *simulate(n=4, seed=60))
    path = tmp_path / f"{ADAPTED}.toml"
    path.write_text(path.read_text().replace('prior = "toy"', 'prior = "toi"'))
    with pytest.raises(UsageError, match=r"'toi'.*did you mean 'toy'"):
        refit("toy2", tmp_path)
