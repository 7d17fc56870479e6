import json
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from torch import nn

from nas import families
from nas.build import build
from nas.network import NetworkSpec
from nas.op import FEATURES
from nas.page import as_json
from nas.pricing import Pricer
from nas.profile import compare, profile, profile_page, profile_space, space_page
from nas.profile.candidate import stage
from nas.profile.candidate_page import treemap
from nas.profile.counters import FVCORE, FVCORE_SDPA, OURS, THOP, TORCH, count, weightless
from nas.profile.space import effects
from nas.profile.space_page import log_ticks
from nas.profile.words import difference
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

    def warnings(self, features):
        return ("far outside what was fitted",)


@pytest.fixture(scope="module")
def space():
    """At 64 px every block is traced in milliseconds; the structure is that of the real space."""
    return load_space("snapgen_unet").at_resolution(64)


@pytest.fixture(scope="module")
def snapgen(space):
    return profile(space.reference("snapgen"), Linear(), name="snapgen", precision="fp16", counters=False)


@pytest.fixture(scope="module")
def whole(space):
    return profile_space(space, Linear(), n=24, seed=1)


def test_the_reference_has_its_published_parameters(snapgen):
    assert snapgen.total.params == snapgen.blocks["params"].sum() == 383_670_276


def test_blocks_add_up_to_the_network(snapgen, space):
    blocks, total = snapgen.blocks, snapgen.total
    assert blocks["macs"].sum() == total.macs
    assert blocks["weight_bytes"].sum() == total.weight_bytes == 2 * total.params
    assert blocks["step_ms"].sum() == pytest.approx(snapgen.latency.ms, rel=1e-12)
    assert blocks["share"].sum() == pytest.approx(1.0)
    assert blocks["block"].tolist() == [b.name for b in families.network(space.reference("snapgen")).blocks]
    assert total.peak_activation_bytes >= blocks["peak_bytes"].max()


def test_bytes_follow_the_precision(snapgen, space):
    full = profile(space.reference("snapgen"), precision="fp32", counters=False)
    for column in ("weight_bytes", "activation_bytes", "peak_bytes"):
        assert full.blocks[column].tolist() == [2 * v for v in snapgen.blocks[column]]
    assert full.latency is None
    assert full.blocks["step_ms"].isna().all()


@pytest.mark.parametrize(
    ("block", "found"),
    [("down_blocks.0.resnets.1", "down_blocks.0"), ("mid_block.resnets.0", "mid_block"), ("conv_in", "conv_in")],
)
def test_stage(block, found):
    assert stage(block) == found


def test_a_profile_is_json(snapgen, whole, space):
    data = json.loads(json.dumps(snapgen.to_json()))
    assert data["latency"]["ms"] == snapgen.latency.ms
    assert len(data["blocks"]) == len(snapgen.blocks)
    bare = json.loads(json.dumps(profile(space.reference("snapgen"), counters=False).to_json(), allow_nan=False))
    assert bare["blocks"][0]["step_ms"] is None
    assert set(json.loads(json.dumps(whole.to_json()))["quantiles"]) == {
        "0",
        "0.05",
        "0.25",
        "0.5",
        "0.75",
        "0.95",
        "1",
    }


# Counters


def part(space, *kinds):
    """The first blocks of a real network, so that a count is fast: down to the first of each of `kinds`."""
    spec = families.network(space.reference("snapgen"))
    return spec, [next(b for b in spec.blocks if b.kind == kind) for kind in kinds]


def test_torch_on_meta_agrees_with_ours_to_the_last_mac(space):
    spec, _ = part(space)
    (ours,), (theirs,) = count(spec, OURS), count(spec, TORCH)
    assert ours.macs == theirs.macs > 1e9
    assert ours.params == 383_670_276


@pytest.mark.slow
def test_thop_and_fvcore_leave_out_attention_and_the_rule_brings_it_back(space):
    found = {(c.counter, c.deployed): c for c in compare(space.reference("snapgen"))}
    ours = found[OURS, True].macs
    assert {name for name, _ in found} == {OURS, TORCH, THOP, FVCORE, FVCORE_SDPA}
    assert {c.latent for c in found.values()} == {"8×8"}
    attention = sum(
        block.features[FEATURES.index("attention.macs")] * 1e9
        for block in Pricer(space).blocks(space.reference("snapgen"))
    )
    without, with_rule = found[FVCORE, False].macs, found[FVCORE_SDPA, False].macs
    assert with_rule - without == pytest.approx(attention, rel=1e-9)
    # The rest is norms and resizes, which fvcore counts by element and we do not.
    assert 0 < with_rule - ours < 0.01 * ours
    assert 0 < found[THOP, True].macs - (ours - attention) < 0.01 * ours
    assert all(c.leaves_out for c in found.values())


def test_a_counter_that_is_not_installed_says_so(space, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "thop", None)
    (found,) = count(families.network(space.reference("snapgen")), THOP)
    assert found.macs is None
    assert found.leaves_out.startswith("could not run: ")


def test_weightless_parameters_take_no_memory_and_keep_their_shapes(space):
    spec = families.network(space.reference("snapgen"))
    small = NetworkSpec(name="start", input=spec.input, blocks=spec.blocks[:3])
    network = build(small, "meta")
    shapes = {name: p.shape for name, p in network.named_parameters()}
    emptied = weightless(network)
    assert {name: p.shape for name, p in emptied.named_parameters()} == shapes
    assert all(p.device.type == "cpu" and p.untyped_storage().nbytes() == 4 for p in emptied.parameters())
    assert all(isinstance(p, nn.Parameter) for p in emptied.parameters())
    assert not any(torch.count_nonzero(p) for p in emptied.parameters())


# The whole space


def test_quantiles_are_those_of_the_sample(whole, space):
    prices = Pricer(space).rows(space.sample(24, 1))
    assert whole.costs["macs"].tolist() == prices.macs.tolist()
    assert whole.quantiles.loc[0.5, "params"] == np.median(prices.params)
    assert whole.quantiles.loc[1.0, "step_ms"] == (prices.features @ Linear.costs).max()
    assert whole.sampled == 24


def test_effects_of_a_cost_that_is_known(space):
    """A cost that is a product of two choices has exactly those effects; an inactive choice is not counted."""
    rows = space.sample(1500, 3)
    width, depth = space.column["width_0"], space.column["depth_1"]
    cost = pd.DataFrame({"macs": 2.0 ** rows[:, width]})
    found = effects(space, rows, cost).set_index(["choice", "value"])["macs"]
    values = space.choice("width_0").values
    ratios = [found["width_0", v] for v in values]
    np.testing.assert_allclose(ratios, 2.0 ** (np.arange(len(values)) - np.mean(np.arange(len(values)))))
    off = effects(space, rows, cost).set_index("choice").loc["self_attention_1", "candidates"].sum()
    assert off == (rows[:, depth] > 0).sum()


def test_importance_is_sorted(whole):
    ranked = whole.importance("macs")
    assert (np.diff(ranked) <= 0).all()
    assert (ranked >= 1).all()
    assert set(ranked.index) == set(whole.effects["choice"])


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


def test_log_ticks_are_written_out():
    assert log_ticks(90, 1100) == {
        "tickvals": [100.0, 200.0, 500.0, 1000.0],
        "ticktext": ["100", "200", "500", "1,000"],
    }


def test_difference():
    assert [difference(v) for v in (0.0026, -0.08, 0.0, None)] == ["+0.3 %", "−8.0 %", "equal", "–"]


@pytest.mark.parametrize("kind", ["candidate", "space"])
def test_pages_are_whole_and_offline(kind, snapgen, whole, tmp_path):
    path = tmp_path / "page.html"
    written = profile_page(snapgen, path) if kind == "candidate" else space_page(whole, path)
    assert written == path
    page = path.read_text()
    body = page[page.index("<body>") :]
    contents = re.findall(r'class="figure-data">(.*?)</script>', body)
    assert len(contents) == (4 if kind == "candidate" else 5)
    for content in contents:
        assert drawn(json.loads(content)).data
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=", body)
    if kind == "candidate":
        assert "383,670,276" in body
        assert "far outside what was fitted" in body
        assert body.count("<tr>") == len(snapgen.blocks) + 1
    else:
        assert "24 candidates drawn uniformly" in body
        assert "moves latency most" in body
