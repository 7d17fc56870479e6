"""A network block by block, and the page of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from nas import families
from nas.device import find_target
from nas.op import FEATURES, Op
from nas.page import as_json
from nas.pricing import Pricer
from nas.profile import Roof, candidate_subject, profile, profile_page, profile_space, space_page, with_pipeline
from nas.profile.counters import count
from nas.profile.measured import Measured
from nas.profile.network_figures import icicle, roofline_figure, shares_figure, times_figure
from nas.profile.operators import OPERATIONS, PARTS, part, stage
from nas.profile.shares import headline, holders
from nas.profile.statements import measured_statements, roof_statements
from nas.profile.words import change, difference
from nas.space import load_space
from tests.profile_cases import Linear


@pytest.fixture(scope="module")
def space():
    """At 64 px every block is traced in milliseconds; the structure is that of the real space."""
    return load_space("snapgen_unet").at_resolution(64)


@pytest.fixture(scope="module")
def candidate(space):
    return space.reference("snapgen")


@pytest.fixture(scope="module")
def snapgen(candidate):
    return profile(candidate_subject(candidate, "snapgen", reference="snapgen"), Linear(), precision="fp16")


@pytest.fixture(scope="module")
def timed(candidate):
    """With a roof, and measured: each block takes twice its prediction alone, the whole a little more."""
    found = profile(candidate_subject(candidate, "snapgen"), Linear(), sheet=find_target("iphone"), precision="fp16")
    alone = {name: 2 * ms for name, ms in zip(found.blocks["name"], found.blocks["step_ms"], strict=True)}
    measured = Measured(
        whole_ms=2.2 * found.latency.ms,
        samples_ms=(1.0,) * 7,
        cpu_samples_ms=(1.0,) * 7,
        blocks_ms=alone,
        distinct=3,
        statistic="min_cpu",
        protocol="min_cpu of >= 7",
        contention=1.25,
        environment={"runtime": "a-runtime", "threads": 1},
        chip="this chip",
        other_chip="that chip",
    )
    return replace(found, measured=measured)


@pytest.fixture(scope="module")
def whole(space):
    return profile_space(space, Linear(), n=24, seed=1)


def test_the_reference_has_its_published_parameters(snapgen):
    assert snapgen.total.params == snapgen.blocks["params"].sum() == 383_670_276


def test_blocks_add_up_to_the_network(snapgen, candidate):
    blocks, total = snapgen.blocks, snapgen.total
    assert blocks["macs"].sum() == total.macs
    assert blocks["weight_bytes"].sum() == total.weight_bytes == 2 * total.params
    assert blocks["step_ms"].sum() == pytest.approx(snapgen.latency.ms, rel=1e-12)
    assert blocks["share"].sum() == pytest.approx(1.0)
    assert blocks["name"].tolist() == [b.name for b in families.network(candidate).blocks]
    assert total.peak_activation_bytes >= blocks["peak_bytes"].max()


def test_a_network_costs_what_its_candidate_is_priced_at(snapgen, candidate):
    assert snapgen.total == Pricer(candidate.space, "fp16").candidate(candidate)


def test_stages_and_operations_add_up_to_the_network(snapgen):
    stages = snapgen.stages
    assert list(stages.index[:3]) == ["conv_in", "time_embedding", "down_blocks.0"]
    assert stages["params"].sum() == snapgen.total.params
    assert stages["step_ms"].sum() == pytest.approx(snapgen.latency.ms, rel=1e-12)
    own = snapgen.blocks[snapgen.blocks["stage"] == "down_blocks.1"]
    assert stages.loc["down_blocks.1", "macs"] == own["macs"].sum() > 0
    assert sum(snapgen.operations.values()) == snapgen.total.macs
    assert set(snapgen.operations) == set(OPERATIONS)
    priced = Pricer(snapgen.subject.candidate.space).blocks(snapgen.subject.candidate)
    attention = sum(block.features[FEATURES.index("attention.macs")] for block in priced)
    assert snapgen.operations["attention"] == pytest.approx(1e9 * attention, rel=1e-9)


def test_bytes_follow_the_precision(snapgen, candidate):
    full = profile(candidate_subject(candidate), precision="fp32")
    for column in ("weight_bytes", "activation_bytes", "peak_bytes"):
        assert full.blocks[column].tolist() == [2 * v for v in snapgen.blocks[column]]
    assert full.latency is None
    assert full.blocks["step_ms"].isna().all()
    assert full.stages["step_ms"].isna().all()


@pytest.mark.parametrize(
    ("block", "found"),
    [("down_blocks.0.resnets.1", "down_blocks.0"), ("mid_block.resnets.0", "mid_block"), ("conv_in", "conv_in")],
)
def test_stage(block, found):
    assert stage(block) == found


def test_a_profile_is_json(snapgen, whole, candidate):
    data = json.loads(json.dumps(snapgen.to_json()))
    assert data["latency"]["ms"] == snapgen.latency.ms
    assert (data["space"], data["references"], data["key"]) == ("snapgen_unet", ["snapgen"], candidate.key)
    assert len(data["blocks"]) == len(snapgen.blocks)
    assert {"name", "kind", "params", "macs", "weight_bytes", "activation_bytes"} <= set(data["blocks"][0])
    assert {"params", "macs", "weight_bytes", "peak_activation_bytes", "counters", "pipeline"} <= set(data)
    bare = json.loads(json.dumps(profile(candidate_subject(candidate)).to_json(), allow_nan=False))
    assert bare["blocks"][0]["step_ms"] is None
    assert bare["stages"][0]["step_ms"] is None
    spread = json.loads(json.dumps(whole.to_json()))
    assert set(spread["quantiles"]) == {"0", "0.05", "0.25", "0.5", "0.75", "0.95", "1"}
    assert spread["candidates"] == whole.space.count < spread["combinations"]


def test_a_whole_image_is_its_parts(snapgen):
    found = with_pipeline(snapgen, predictor=Linear())
    data = json.loads(json.dumps(found.to_json()))["pipeline"]
    assert [part["role"] for part in data["parts"]][-2:] == ["denoiser", "decoder"]
    denoiser, decoder = data["parts"][-2:]
    assert (denoiser["calls"], denoiser["params"]) == (4, 383_670_276)
    assert denoiser["ms"] == pytest.approx(4 * snapgen.latency.ms)
    assert data["total"]["macs"] == 4 * denoiser["macs"] + decoder["macs"]
    assert (data["steps"], data["guidance"], data["decoder"]) == (4, False, "snapgen-tiny")


def test_a_space_without_a_pipeline_has_no_whole_image():
    taesd = load_space("decoder").at_resolution(64).reference("taesd")
    found = with_pipeline(profile(candidate_subject(taesd, "taesd")))
    assert found.whole is None
    assert found.subject.call == "decoder call"


# Operators, parts, roof and shares


def test_operators_add_up_to_blocks(snapgen):
    parts = snapgen.operators.groupby("block", sort=False)[["macs", "params", "bytes", "step_ms", "share"]].sum()
    blocks = snapgen.blocks.set_index("name")
    assert parts["macs"].tolist() == blocks["macs"].tolist()
    assert parts["params"].tolist() == blocks["params"].tolist()
    np.testing.assert_allclose(parts["step_ms"], blocks["step_ms"], rtol=1e-12)
    np.testing.assert_allclose(parts["bytes"], blocks["weight_bytes"] + blocks["activation_bytes"], atol=20)
    kinds = snapgen.kinds
    assert kinds["step_ms"].is_monotonic_decreasing
    assert kinds["share"].sum() == pytest.approx(1.0)
    assert kinds.loc["attention", "macs"] == snapgen.operations["attention"]


def test_a_kind_of_operator_costs_what_its_features_do(snapgen):
    softmax = snapgen.operators.query("operator == 'softmax'")
    bytes_at = FEATURES.index("softmax.bytes")
    expected = 2 * softmax["bytes"].sum() / 1e9 * Linear.costs[bytes_at]  # bytes at fp16, features at fp32
    expected += softmax["count"].sum() / 1e3 * Linear.costs[FEATURES.index("softmax.count")]
    assert softmax["step_ms"].sum() == pytest.approx(expected)


def test_parts_are_told_by_place_kind_and_attention():
    blocks = {b.name: b for b in families.network(load_space("sd_unet").reference("sd-v1.5")).blocks}
    found = {name: part(block, ()) for name, block in blocks.items()}
    assert found["down_blocks.0.resnets.0"] == "resnets"
    assert found["down_blocks.0.attentions.0"] == "transformers"
    assert found["down_blocks.0.downsamplers.0"] == found["up_blocks.1.upsamplers.0"] == "samplers"
    assert found["conv_in"] == found["time_embedding"] == found["head"] == "other"
    assert part(blocks["head"], [Op(kind="attention", macs=1)]) == "transformers"


def test_a_roof_is_the_sheets(timed):
    sheet = find_target("iphone")
    roof = Roof.of(sheet)
    assert roof.gmac_s == pytest.approx(1e3 / sheet.roofline["ms_per_gmac"])
    assert roof.gb_s == pytest.approx(1e3 / sheet.roofline["ms_per_gb"])
    assert roof.source in "; ".join(sheet.sources)
    assert roof.least_ms(1e9, 0) == pytest.approx(sheet.roofline["ms_per_gmac"])
    assert roof.least_ms(1e6, 1e9) == pytest.approx(sheet.roofline["ms_per_gb"])
    rates = timed.rates
    np.testing.assert_allclose(rates["predicted_of_roof"], 2 * rates["measured_of_roof"])
    at = rates.loc["down_blocks.1.resnets.0"]
    assert at["predicted_of_roof"] == pytest.approx(roof.least_ms(at["macs"], at["bytes"]) / at["predicted_ms"])
    above = int((rates["measured_of_roof"] > 1).sum())
    assert any(f"{above} of {len(rates)} blocks lie above" in s for s in roof_statements(timed)) == (above > 0)


def test_shares_add_up_and_the_headline_is_computed_from_them(snapgen):
    found = snapgen.shares
    for measure in ("params", "macs", "step_ms"):
        assert found[measure].sum() == pytest.approx(1.0)
    assert found["blocks"].sum() == len(snapgen.blocks)
    table = pd.DataFrame(
        {
            "stage": ["in", "down.0", "down.1", "down.1", "up.0", "up.1"],
            "part": ["other", "resnets", "resnets", "transformers", "transformers", "resnets"],
            "params": [0.01, 0.09, 0.1, 0.4, 0.35, 0.05],
            "macs": [0.0, 0.3, 0.1, 0.1, 0.2, 0.3],
            "activation_bytes": [np.nan] * 6,
            "step_ms": [0.0, 0.2, 0.1, 0.25, 0.3, 0.15],
        }
    )
    assert holders(table) == ("down.1", "up.0")
    assert headline(table) == (
        "down.1 and up.0 hold 85 % of the parameters (75 % in transformers) and take 65 % of the time;"
        " transformers take 55 % of the time, resnets 45 %"
    )
    untimed = headline(table.assign(step_ms=np.nan))
    assert "take 40 % of the MACs; resnets take 70 % of the MACs, transformers 30 %" in untimed
    spread = pd.DataFrame(
        {"stage": [f"s{i}" for i in range(20)], "part": "transformers", "params": 0.05, "macs": 0.05}
    ).assign(activation_bytes=np.nan, step_ms=0.05)
    assert holders(spread) == ()
    assert headline(spread).startswith("transformers hold 100 % of the parameters; transformers take")


def test_what_was_measured_is_said(timed):
    said = " ".join(measured_statements(timed))
    assert "−55 % against measured, which lies outside the 80 % interval" in said
    assert "(3 distinct) timed alone" in said
    assert f"{100 / 1.1:.0f} % of the whole" in said
    assert "another chip (that chip)" in said
    data = json.loads(json.dumps(timed.to_json(), allow_nan=False))
    assert data["measured"]["block_sum_over_whole"] == pytest.approx(1 / 1.1)
    assert data["roof"]["gmac_s"] == timed.roof.gmac_s
    assert {"shares", "kinds", "operators", "rates", "headline"} <= set(data)
    assert measured_statements(replace(timed, measured=None)) == []


# Pages


def drawn(content):
    return go.Figure(json.loads(re.sub(r'"@\w+"', '"#123456"', as_json(content))))


def test_icicle_heights_add_up(timed):
    for measure in ("step_ms", "macs", "params", "bytes"):
        trace = drawn(icicle(timed, measure)).data[0]
        inside = {}
        for parent, value in zip(trace.parents, trace.values, strict=True):
            inside[parent] = inside.get(parent, 0) + value
        whole = inside.pop("")
        assert whole == pytest.approx(timed.operators[measure].sum())
        for name, value in zip(trace.ids, trace.values, strict=True):
            if "/" not in name:  # operators of less than a ten-thousandth are left out
                assert value - 12e-4 * whole <= inside.pop(name, 0.0) <= value * (1 + 1e-9)
        assert not inside


def test_shares_are_bars_of_all(timed):
    for column in ("part", "stage"):
        figure = drawn(shares_figure(timed.shares, column))
        for row in range(3):
            assert sum(trace.x[row] for trace in figure.data) == pytest.approx(100)
    names = [trace.name for trace in drawn(shares_figure(timed.shares, "part")).data]
    assert names == [name for name in PARTS if name in set(timed.blocks["part"])]


def test_blocks_stand_under_the_roof_where_they_run(timed):
    line, *points = drawn(roofline_figure(timed)).data
    roof = timed.roof
    assert (max(line.y), line.x[1]) == (roof.gmac_s, pytest.approx(roof.gmac_s / roof.gb_s))
    placed = {name: (x, y) for trace in points for name, x, y in zip(trace.ids, trace.x, trace.y, strict=True)}
    blocks = timed.blocks[timed.blocks["macs"] > 0].set_index("name")
    assert len(placed) == 2 * len(blocks)
    for name, row in blocks.iterrows():
        x, y = placed[f"{name} predicted"]
        assert x == pytest.approx(row["macs"] / (row["weight_bytes"] + row["activation_bytes"]))
        assert y == pytest.approx(row["macs"] / 1e6 / row["step_ms"])
        assert placed[f"{name} measured"] == (pytest.approx(x), pytest.approx(y / 2))


def test_times_stand_side_by_side(timed):
    series = {trace.name: dict(zip(trace.y, trace.x, strict=True)) for trace in drawn(times_figure(timed)).data}
    assert set(series) == {"predicted", "measured alone"}
    assert series["measured alone"]["conv_in"] == pytest.approx(2 * series["predicted"]["conv_in"])


def test_difference():
    shown = [difference(v) for v in (0.0026, -0.08, 0.0, None, 0.0005, -0.0005)]
    assert shown == ["+0.3 %", "−8.0 %", "equal", "–", "under 0.1 % more", "under 0.1 % less"]


def test_change():
    assert [change("macs", v) for v in (3.1e7, -6e10, 0.0)] == ["+31.0 M", "−60.0 G", "0"]
    assert change("step_ms", -12.0) == "−12.0 ms"


@pytest.mark.parametrize("kind", ["network", "space"])
def test_pages_are_whole_and_offline(kind, snapgen, timed, whole, tmp_path):
    path = tmp_path / "page.html"
    counted = replace(with_pipeline(snapgen), counts=tuple(count(snapgen.subject.spec, "nas")))
    written = profile_page(counted, path) if kind == "network" else space_page(whole, path)
    assert written == path
    page = path.read_text()
    body = page[page.index("<body>") :]
    contents = re.findall(r'class="figure-data">(.*?)</script>', body)
    assert len(contents) == (6 if kind == "network" else 5)
    for content in contents:
        assert drawn(json.loads(content)).data
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=", body)
    if kind == "network":
        assert "383,670,276" in body
        assert "far outside what was fitted" in body
        assert "It is the reference snapgen of the space snapgen_unet." in body
        tables = [re.search(rf'<section id="{slug}">.*?</section>', body, re.DOTALL) for slug in ("stages", "blocks")]
        rows = [found.group().count("<tr>") - 1 for found in tables]
        assert rows == [len(snapgen.stages), len(snapgen.blocks)]
        for slug in ("pipeline", "counters", "choices", "kinds", "glance"):
            assert f'<section id="{slug}">' in body
        assert '<section id="measured">' not in body
        assert f'<p class="headline">{snapgen.headline}.</p>' in body
        more = profile_page(timed, path).read_text()
        assert len(re.findall('class="figure-data">', more)) == len(contents) + 2
        assert "this chip" in more
        assert '<section id="roof">' in more
    else:
        assert "24 of them drawn uniformly" in body
        assert f"{whole.space.count:,} distinct candidates" in body
        assert "moves latency most" in body
