"""The choice of what is measured: diverse blocks and networks, what a table already has, pipeline parts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nas import families, measure
from nas.evaluate import with_pipeline
from nas.measure import sampling
from nas.measure import subjects as subjects_module
from nas.space import SearchSpace, load_space

SPACE: SearchSpace = load_space("snapgen_unet")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_CANDIDATES_FOR_BLOCKS", 2)
    monkeypatch.setattr(sampling, "_RESOLUTION_DIVISORS", (2, 4))


@pytest.mark.usefixtures("few")
def test_blocks_are_distinct_small_and_of_every_kind() -> None:
    blocks = sampling.sample_blocks(SPACE, 24, seed=1, most_gmac=2.0)
    assert len({b.key for b in blocks}) == len(blocks) == 24
    assert all(0 <= b.macs / 1e9 <= 2.0 for b in blocks)
    kinds = {str(b.spec["kind"]) for b in blocks if b.spec}
    assert {"stem", "head", "time_embedding", "transformer", "downsample", "upsample", "separable"} <= kinds
    assert {b.resolution_px for b in blocks} == {256, 512}
    assert [b.key for b in sampling.sample_blocks(SPACE, 24, seed=1, most_gmac=2.0)] == [b.key for b in blocks]


def test_networks_begin_with_the_references_and_keep_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_NETWORK_SCALES", ((4, 16),))
    networks = sampling.sample_networks(SPACE, 4, least_gmac=0.3, most_gmac=2.0)
    assert len(networks) == 4
    assert networks[0].name.startswith(str(SPACE.reference(SPACE.references[0].name)))
    assert all(0.3 <= n.macs / 1e9 <= 2.0 for n in networks)
    for network in networks:
        module, inputs = network.build(1)
        assert sum(p.numel() for p in module.parameters()) == network.params
        assert inputs["sample"].shape == (1, 4, 16, 16)
        assert network.features is not None
        assert network.features.sum() > 0


def test_none_asked_for_none_chosen() -> None:
    limits = measure.Limits(components=False)
    assert measure.choose([SPACE], 0, 0, limits=limits) == ()


def test_known_subjects_come_back_the_same_with_fresh_features() -> None:
    limits = measure.Limits(components=False, most_block_gmac=0.3, most_network_gmac=0.3, least_network_gmac=0.0)
    drawn = [
        subjects_module.block_subject(spec, SPACE.name, 64, 1)
        for spec in families.network(SPACE.reference("snapgen").space.at_resolution(64).reference("snapgen")).blocks[:4]
    ]
    recorded = {s.key: replace(measure.table_subject(s), features={"conv.macs": 1.0}, macs=7) for s in drawn}
    known = sampling.known_subjects([SPACE], recorded, {drawn[0].key: 64}, batch=1)
    assert [(k.key, k.name, k.macs, k.params) for k in known] == [(d.key, d.name, d.macs, d.params) for d in drawn]
    for again, once in zip(known, drawn, strict=True):
        np.testing.assert_array_equal(again.features, once.features)
    assert [k.resolution_px for k in known] == [64, None, None, None]
    elsewhere = {key: replace(r, spec={**r.spec, "space": "another"}) for key, r in recorded.items()}
    assert sampling.known_subjects([SPACE], elsewhere, {}, batch=1) == ()
    chosen = measure.choose([SPACE], 3, 0, limits=limits, known=known)
    assert [s.key for s in chosen] == [k.key for k in known[:3]]


def test_components_are_those_of_the_pipeline_that_can_be_built() -> None:
    asked = with_pipeline(SPACE, decoder="taesd", text_encoders=("snapgen-text-encoders", "clip-l", "t5-xxl"))
    parts = subjects_module.components(asked, pixels=(64, 128))
    assert [(p.key, p.role, p.resolution_px) for p in parts] == [
        ("taesd-decoder-64px", "decoder", 64),
        ("taesd-decoder-128px", "decoder", 128),
        ("clip-l-text-encoder", "text_encoders", None),
    ]
    assert parts[2].params == 123_060_480
    assert all(p.features is None for p in parts)
    module, inputs = parts[0].build(1)
    with torch.no_grad():
        assert module(**inputs).shape == (1, 3, 64, 64)
    smaller = subjects_module.components(asked, pixels=(64, 128), most_gmac=2.0)
    assert [p.key for p in smaller] == ["taesd-decoder-64px"]
    assert subjects_module.components(replace(asked, pipeline=None)) == ()


def test_diverse_takes_the_first_then_new_tags_then_the_farthest() -> None:
    points = np.array([[0.0], [1.0], [2.0], [3.0], [10.0]])
    tags: list[set[str]] = [{"a"}, {"b"}, {"a"}, {"b", "c"}, {"a"}]
    assert sampling.diverse(points, tags, 3, seed=0, first=1) == [0, 3, 4]
    assert sampling.diverse(points, tags, 99, seed=0, first=1)[:3] == [0, 3, 4]
    assert sorted(sampling.diverse(points, tags, 99, seed=0)) == [0, 1, 2, 3, 4]
    assert sampling.diverse(np.zeros((0, 1)), [], 3, seed=0) == []


def test_log_scale_counts_ratios_alike_and_keeps_zero_apart() -> None:
    scaled = sampling.log_scaled(np.array([[0.0], [1000.0], [2000.0], [4000.0]]))
    steps = np.diff(scaled[:, 0])
    assert steps[1] < steps[2] < 1.5 * steps[1]
    assert steps[0] > 0
