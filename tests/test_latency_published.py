"""The shipped tables of devices that others measured: what is fitted, what is not and why, and what a user may type."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from nas import components, families, tables
from nas.device import Budget, find_target, list_targets
from nas.errors import NasError
from nas.latency import load_predictor, posed_by, residuals
from nas.latency import ratios as quotients
from nas.latency.calibration import calibrated, chosen
from nas.latency.predictor import kinds_of
from nas.op import features
from nas.space import load_space
from nas.trace import block_trace

IPHONE = "iphone-16-pro-max--coreml--fp16"
SNAPDRAGON = "galaxy-s24--qnn--w8a16"
NVIDIA = "a100--torch--fp16"
FAMILIES = (IPHONE, SNAPDRAGON, NVIDIA, "m2-ultra--coreml--fp16")
PUBLISHED = (*FAMILIES, "exynos-2400--samsung-npu--fp16", "a100--tensorrt--fp32", "a10g--torch--fp32")
FITTED = [sheet.slug for sheet in list_targets() if sheet.slug in FAMILIES or sheet.family in FAMILIES]


def posed_iphone():
    sheet = find_target(IPHONE)
    return posed_by(tables.read(IPHONE), tables.subjects(IPHONE), sheet)[0]


@pytest.mark.parametrize(
    ("typed", "chip"),
    [
        ("iphone", "A18 Pro"),
        ("iphone-15-pro", "A17 Pro"),
        ("iPhone-14-Pro-Max", "A16"),
        ("ipad-pro-m2", "M2"),
        ("galaxy-s24", "Snapdragon 8 Gen 3"),
        ("galaxy-s25", "Snapdragon 8 Elite"),
        ("snapdragon-8-elite-gen-5", "Snapdragon 8 Elite Gen 5"),
        ("x-elite", "Snapdragon X Elite"),
        ("rtx-4090", "RTX 4090"),
        ("rtx-3060-ti", "RTX 3060 Ti"),
        ("a100", "A100"),
        ("m1-max", "M1 Max"),
        ("exynos-2400", "Exynos 2400"),
        ("t4", "T4"),
    ],
)
def test_a_budget_finds_the_device_that_a_user_types(typed, chip):
    assert find_target(Budget.parse(f"0.9s@{typed}").device).chip == chip


@pytest.mark.parametrize("slug", FITTED)
def test_every_shipped_predictor_belongs_to_its_table_and_covers_what_it_says(slug):
    predictor = load_predictor(slug)
    card = predictor.card
    assert predictor.target == slug
    assert card["networks"] >= 2
    # 90 % intervals are what a cautious user asks for; rows are few and depend on each other, hence the margin.
    assert card["held_out"]["coverage"]["0.9"]["measured"] >= 0.75
    assert card["newest"] >= "2023"


@pytest.mark.parametrize("slug", [slug for slug in PUBLISHED if slug not in FAMILIES])
def test_one_network_makes_no_predictor_and_the_message_says_so(slug):
    with pytest.raises(NasError, match="has no fitted latency predictor"):
        load_predictor(slug)
    sheet = find_target(slug)
    assert len(posed_by(tables.read(slug), tables.subjects(slug), sheet)[0].groups) == 1


def test_a_members_prediction_is_for_its_own_chip():
    """SD 1.5 was timed on every Snapdragon: each member must put it near its own chip's time, not the head's."""
    key = "sd-1.5-unet-512"
    seen = set()
    for name in ("galaxy-s24", "galaxy-s25", "snapdragon-7-gen-4", "qcm6690"):
        sheet = find_target(name)
        posed, _, _ = posed_by(tables.read(sheet.slug), tables.subjects(sheet.slug), sheet)
        ms = float(posed.rows.ms[(posed.subjects == key) & (posed.chips == sheet.chip)][0])
        predicted = float(load_predictor(name).predict(tables.subjects(sheet.slug)[key].vector[None])[0][0])
        assert predicted == pytest.approx(ms, rel=0.3)
        seen.add(round(predicted))
    assert len(seen) == 4
    assert max(seen) > 10 * min(seen)


def test_residuals_name_each_row_with_its_source():
    rows = residuals("iphone")
    assert {(row.subject, row.chip) for row in rows} >= {("snapgen-unet-1024", "A18 Pro"), ("sd-2.1-base-512", "A15")}
    assert all("http" in row.source for row in rows)
    assert all(row.intervals["0.8"][0] < row.predicted < row.intervals["0.8"][1] for row in rows)
    snapgen = next(row for row in rows if row.subject == "snapgen-unet-1024")
    assert snapgen.ms == 274.0


def test_snapgen_left_out_of_the_fit_lies_inside_its_interval():
    """274 ms per step, predicted by a fit that saw neither the network nor its chip."""
    posed = posed_iphone()
    out = posed.networks == "snapgen-unet-1024"
    assert out.sum() == 1
    assert posed.rows.ms[out][0] == 274.0
    assert posed.chips[out][0] == "A18 Pro"
    assert "A18 Pro" not in posed.chips[~out]
    predictor = calibrated(chosen(posed, ~out), ~out).at(posed.target_effects)
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
    for slug in PUBLISHED:
        used = [row for row in tables.read(slug) if row.used]
        assert len({(row.subject, row.chip, row.session, row.latency_ms) for row in used}) == len(used), slug
        assert {row.subject for row in used} <= set(tables.subjects(slug)), slug
        for row in tables.read(slug):
            assert row.source.endswith(")"), row
            assert row.statistic == "published"
    iphone = [row for row in tables.read(IPHONE) if row.used]
    assert len({(row.subject, row.device) for row in iphone}) == len(iphone)
    assert not any(row.latency_ms == 1700.0 for row in iphone)


def test_rows_of_doubtful_quality_are_not_fitted_unless_the_sheet_accepts_them():
    doubtful = ("memory", "secondary", "derived", "chart-label", "marketing", "user-report", "rounded", "docs-example")
    for slug in PUBLISHED:
        accepted = find_target(slug).protocol.get("accepts", [])
        for row in tables.read(slug):
            quality = row.source.rpartition("(")[2].rstrip(")")
            if row.used:
                assert quality in accepted or not quality.startswith(doubtful), row
    assert find_target(NVIDIA).protocol["accepts"] == ["chart-label"]
    assert not any("accepts" in find_target(slug).protocol for slug in PUBLISHED if slug != NVIDIA)


def test_one_release_of_an_npu_runtime_is_fitted():
    rows = tables.read(SNAPDRAGON)
    assert {row.environment.split(", ")[1] for row in rows if row.used} == {"AI Hub v0.46.0"}
    older = [row for row in rows if "another release" in row.excluded_because]
    assert len(older) > 100
    # Why: a release is no common factor. On one phone the other lowering is as fast for one network, not for another.
    here = [row for row in rows if row.chip == "Snapdragon 8 Gen 3" and row.subject_kind == "reference"]

    def ratio(subject):
        fitted = [row.latency_ms for row in here if row.used and row.subject == subject]
        other = [
            row.latency_ms
            for row in older
            if row in here and row.subject == subject and "QAIRT 2.37" in row.environment
        ]
        return float(np.median(other) / np.median(fitted))

    assert ratio("sd-1.5-unet-512") > 1.0
    assert ratio("sd-vae-decoder-512px") < 0.85
    assert 188.59 in {row.latency_ms for row in older}


def test_the_parts_of_a_pipeline_are_charged_on_a_snapdragon():
    sheet, space = find_target("galaxy-s24"), load_space("sd_unet")
    text, decoder = (components.charge(part, 512, sheet, None, 0.8) for part in components.components(space))
    assert (text.basis, decoder.basis) == ("published", "published")
    # The rows of the fitted release alone.
    assert text.ms == pytest.approx(2.3, abs=0.1)
    assert decoder.ms == pytest.approx(202.1, abs=0.1)


def test_the_ladder_is_kept_and_not_fitted():
    rows = quotients.read(IPHONE)
    assert {row.subject for row in rows} == {"snapgen-ladder-1", "snapgen-ladder-2b"}
    assert all(row.excluded_because.startswith("secondary") for row in rows)
    assert quotients.read("iphone-15-pro--coreml--fp16") == rows


def test_the_ladders_steps_are_predicted_in_direction_and_rough_size():
    """None of the ladder is in the fit. Published: -24 %, and 2.4 times faster, of the exchanged blocks at least."""
    predictor, subjects = load_predictor("iphone-15-pro"), tables.subjects(IPHONE)

    def ratio(over, under, confidence=0.9):
        return [float(v[0]) for v in predictor.ratio(over[None], under[None], confidence)]

    first = ratio(subjects["snapgen-ladder-1"].vector, subjects["snapgen-thin-short-sdxl"].vector)
    assert first[0] == pytest.approx(0.76, abs=0.2)
    whole = ratio(subjects["snapgen-ladder-2b"].vector, subjects["snapgen-ladder-1"].vector)
    assert whole[2] < 1.1
    assert whole[0] < 0.95
    # Only this much of the network was exchanged, and the rows of other networks bound what dense convolutions take.
    blocks, low, high = ratio(convolutions("ladder-2b"), convolutions("ladder-1"))
    assert low < 1 / 2.4 < high
    assert blocks < 0.7


def convolutions(reference):
    space = load_space("snapgen_unet")
    spec = families.network(space.with_text_width(768).reference(reference))
    kinds = [block for block in spec.blocks if block.kind in ("resnet", "separable")]
    return np.sum([features(block_trace(block).ops) for block in kinds], axis=0)


def test_the_ladder_rows_move_the_fit_where_they_are_read():
    sheet, subjects = find_target("iphone-15-pro"), tables.subjects(IPHONE)
    read = [replace(row, excluded_because="") for row in quotients.read(IPHONE)]
    everything = tables.read(sheet.slug)
    plain, _, _ = posed_by(everything, subjects, sheet)
    told, _, _ = posed_by(everything, subjects, sheet, ratios=read)

    def off(posed):
        costs = posed.shrunk(ridge=0.01).solve().costs
        pairs = [(subjects[row.subject].vector, subjects[row.relative_to].vector, row.ratio) for row in read]
        return sum(abs(math.log((over @ costs) / (under @ costs) / ratio)) for over, under, ratio in pairs)

    assert off(told) < 0.75 * off(plain)


def test_the_published_files_agree_with_the_tables():
    folder = tables.table_path(IPHONE, "").parent / "published"
    networks = json.loads((folder / "networks.json").read_text())
    with (folder / "rows.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["target"] for row in rows} == set(PUBLISHED)
    for slug in PUBLISHED:
        assert sum(row["target"] == slug for row in rows) == len(tables.read(slug))
        assert set(tables.subjects(slug)) <= set(networks)
