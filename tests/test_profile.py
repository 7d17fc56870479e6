"""A network block by block, and the page of it."""

from __future__ import annotations

import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest

from nas import families
from nas.op import FEATURES
from nas.page import as_json
from nas.pricing import Pricer
from nas.profile import candidate_subject, profile, profile_page, profile_space, space_page, with_pipeline
from nas.profile.counters import count
from nas.profile.network import OPERATIONS, stage
from nas.profile.network_page import treemap
from nas.profile.words import change, difference
from nas.space import load_space


class Linear:
    """A predictor that is a product: what a profile needs of one."""

    target = "a-device--a-runtime--fp16"
    costs = np.linspace(0.5, 1.5, len(FEATURES))

    def contributions(self, features):
        return features @ self.costs

    def predict(self, features, confidence=0.8):
        ms = features @ self.costs
        return ms, 0.9 * ms, 1.2 * ms

    def lower(self, features, confidence=0.8):
        return 0.9 * features @ self.costs

    def upper(self, features, confidence=0.8):
        return 1.2 * features @ self.costs

    def warnings(self, features):
        return ("far outside what was fitted",)


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


# Pages


def drawn(content):
    return go.Figure(json.loads(re.sub(r'"@\w+"', '"#123456"', as_json(content))))


def test_treemap_areas_add_up(snapgen):
    for measure in ("step_ms", "macs", "params"):
        trace = drawn(treemap(snapgen.blocks, measure)).data[0]
        inside = {}
        for name, parent, value in zip(trace.ids, trace.parents, trace.values, strict=True):
            inside[parent] = inside.get(parent, 0) + value
            assert not parent or name.startswith(parent)
        assert inside.pop("") == pytest.approx(snapgen.blocks[measure].sum())
        for name, value in zip(trace.ids, trace.values, strict=True):
            assert inside.pop(name, value) == pytest.approx(value)
        assert not inside


def test_difference():
    shown = [difference(v) for v in (0.0026, -0.08, 0.0, None, 0.0005, -0.0005)]
    assert shown == ["+0.3 %", "−8.0 %", "equal", "–", "under 0.1 % more", "under 0.1 % less"]


def test_change():
    assert [change("macs", v) for v in (3.1e7, -6e10, 0.0)] == ["+31.0 M", "−60.0 G", "0"]
    assert change("step_ms", -12.0) == "−12.0 ms"


@pytest.mark.parametrize("kind", ["network", "space"])
def test_pages_are_whole_and_offline(kind, snapgen, whole, tmp_path):
    from dataclasses import replace

    path = tmp_path / "page.html"
    counted = replace(with_pipeline(snapgen), counts=tuple(count(snapgen.subject.spec, "nas")))
    written = profile_page(counted, path) if kind == "network" else space_page(whole, path)
    assert written == path
    page = path.read_text()
    body = page[page.index("<body>") :]
    contents = re.findall(r'class="figure-data">(.*?)</script>', body)
    assert len(contents) == (4 if kind == "network" else 5)
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
        for slug in ("pipeline", "counters", "choices"):
            assert f'<section id="{slug}">' in body
    else:
        assert "24 of them drawn uniformly" in body
        assert f"{whole.space.count:,} distinct candidates" in body
        assert "moves latency most" in body
