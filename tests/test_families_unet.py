"""The UNet family's settings: skips, the middle, depths and heads per place, stages, added conditions, small copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product

import pytest
import torch

from nas.build import build, example_inputs
from nas.errors import NasError, UsageError
from nas.families import network, network_of, positions, scaled
from nas.network import BlockSpec, InputShape, NetworkSpec, Scalar, Scale
from nas.space import SearchSpace, list_spaces, load_space
from tests.unet_walk import walk

UNETS = [name for name in list_spaces() if load_space(name).family == "unet"]
INPUT = InputShape(channels=4, height=16, width=8, text_tokens=5, text_width=24)
BASE: dict[str, Scalar] = {
    "stages": 2,
    "head_width": 8,
    "norm_groups": 4,
    "width_0": 16,
    "width_1": 32,
    "resnets_0": 1,
    "resnets_1": 1,
    "depth_0": 0,
    "depth_1": 1,
}
PROXY = Scale(
    width_divisor=16, head_width=4, norm_groups=4, latent_channels=48, height=8, width=8, text_tokens=12, text_width=32
)


def net(shape: InputShape = INPUT, without: tuple[str, ...] = (), **changes: Scalar) -> NetworkSpec:
    settings = {name: value for name, value in {**BASE, **changes}.items() if name not in without}
    return network_of("unet", settings, shape, name="made for a test")


def named(spec: NetworkSpec) -> Mapping[str, BlockSpec]:
    return {block.name: block for block in spec.blocks}


def depths(spec: NetworkSpec) -> dict[str, int]:
    return {block.name: int(block.setting("depth")) for block in spec.blocks if block.kind == "transformer"}


def runs(spec: NetworkSpec) -> None:
    """Builds it and runs it once."""
    walk(spec)
    given = example_inputs(spec, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = build(spec, seed=0)(**given)
    assert output.shape == given["sample"].shape
    assert torch.isfinite(output).all()


# Skips


@pytest.mark.parametrize(
    ("resnets", "up", "expected"),
    [
        (2, 3, ["out.1", "out.0", "in"]),
        (1, 2, ["out.0", "in"]),
        (2, 2, ["out.1", "in"]),
        (3, 2, ["out.2", "in"]),
        (2, 1, ["in"]),
        (1, 3, ["out.0", None, "in"]),
        (1, 4, ["out.0", None, None, "in"]),
        (3, 4, ["out.2", "out.1", "out.0", "in"]),
    ],
)
@pytest.mark.parametrize("stage", [0, 1])
def test_up_units_take_the_outputs_last_first_and_the_last_takes_the_stages_input(
    resnets: int, up: int, expected: list[str | None], stage: int
):
    spec = net(**{f"resnets_{stage}": resnets, f"up_resnets_{stage}": up})
    part, source = ("resnets", "conv_in") if stage == 0 else ("attentions", "down_blocks.0.downsamplers.0")
    words = {None: None, "in": source, **{f"out.{i}": f"down_blocks.{stage}.{part}.{i}" for i in range(resnets)}}
    blocks = [b for b in spec.blocks if b.name.startswith(f"up_blocks.{1 - stage}.resnets")]
    assert [b.skip for b in blocks] == [words[word] for word in expected]
    runs(spec)


@pytest.mark.parametrize("name", UNETS)
def test_networks_of_every_space_fit_together_and_take_each_skip_once(name: str):
    space = load_space(name)
    for row in space.sample(150, seed=0):
        spec = network(space.from_row(row))
        walk(spec)
        skips = [block.skip for block in spec.blocks if block.skip is not None]
        assert len(set(skips)) == len(skips)


def test_a_skips_name_does_not_depend_on_depths_where_attention_is_said():
    space = load_space("sdxl_unet")
    for place in positions(space):
        if ".resnet." in place.name:
            assert [name for name in place.depends if "depth" in name] == []
    by_name = {place.name: place.depends for place in positions(space)}
    assert "attention_1" in by_name["up.1.resnet.0"]
    assert by_name["up.2.attention.1"] == ("up_resnets_2", "width_2", "up_depth_2_1")
    # A depth that is never 0 decides nothing about the skip either.
    places = {place.name: place.depends for place in positions(load_space("snapgen_unet"))}
    assert "depth_2" not in places["up.2.resnet.0"]
    assert "depth_1" in places["up.1.resnet.0"]


# The middle, depths and attention per place


@pytest.mark.parametrize(
    ("mid", "expected"),
    [
        ("full", ["resnets.0", "attentions.0", "resnets.1"]),
        ("residual", ["resnets.0"]),
        ("none", []),
    ],
)
def test_the_middle(mid: str, expected: list[str]):
    spec = net(mid=mid)
    assert [b.name for b in spec.blocks if b.name.startswith("mid")] == [f"mid_block.{name}" for name in expected]
    runs(spec)


def test_the_middles_depth_is_the_lowest_stages_unless_it_is_set():
    assert depths(net(depth_1=3))["mid_block.attentions.0"] == 3
    assert depths(net(depth_1=3, mid_depth=2))["mid_block.attentions.0"] == 2
    assert depths(net(depth_1=3, attention_1=False)) == {"mid_block.attentions.0": 3}
    assert depths(net(depth_1=0)) == {}
    with pytest.raises(UsageError, match="needs one of 'mid_depth', 'depth_1'"):
        net(without=("depth_1",), attention_1=False)


def test_depths_per_place():
    units: dict[str, Scalar] = {"depth_1_0": 2, "depth_1_1": 3, "up_depth_1_0": 4, "up_depth_1_2": 5}
    spec = net(resnets_1=2, **units)
    assert depths(spec) == {
        "down_blocks.1.attentions.0": 2,
        "down_blocks.1.attentions.1": 3,
        "mid_block.attentions.0": 1,
        "up_blocks.0.attentions.0": 4,
        "up_blocks.0.attentions.1": 1,  # depth_1, which stands for every place that is not set
        "up_blocks.0.attentions.2": 5,
    }
    assert depths(net(resnets_1=2, up_depth_1=6, **units))["up_blocks.0.attentions.1"] == 6
    with pytest.raises(UsageError, match="needs one of 'up_depth_1_1', 'up_depth_1', 'depth_1' in"):
        net(without=("depth_1",), resnets_1=2, mid_depth=1, **units)


def test_attention_per_side():
    assert set(depths(net(depth_0=1))) >= {"down_blocks.0.attentions.0", "up_blocks.1.attentions.1"}
    off = net(attention_1=False)
    assert list(depths(off)) == ["mid_block.attentions.0"]
    assert named(off)["up_blocks.0.resnets.0"].skip == "down_blocks.1.resnets.0"
    down = net(attention_1=True, up_attention_1=False)
    assert list(depths(down)) == ["down_blocks.1.attentions.0", "mid_block.attentions.0"]
    assert named(down)["up_blocks.0.resnets.0"].skip == "down_blocks.1.attentions.0"
    up = net(attention_1=False, up_attention_1=True)
    assert list(depths(up)) == ["mid_block.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1"]
    with pytest.raises(UsageError, match="depth_0 must be 1 or more where attention_0 is true, got 0"):
        net(attention_0=True)


def test_self_attention_is_on_by_default_and_always_in_the_middle():
    on = named(net())
    assert on["down_blocks.1.attentions.0"].setting("self_attention") is True
    off = named(net(self_attention_1=False))
    assert off["down_blocks.1.attentions.0"].setting("self_attention") is False
    assert off["mid_block.attentions.0"].setting("self_attention") is True


# Heads and other settings


@pytest.mark.parametrize(
    ("changes", "widths"),
    [
        ({}, (8, 8)),
        ({"head_layout": "8-heads"}, (8, 16)),
        ({"head_layout": "64-wide"}, (64, 64)),
        ({"heads_0": 2, "heads_1": 4}, (32, 32)),
        ({"head_layout": "8-heads", "heads_1": 2}, (8, 64)),
        ({"heads_1": 2}, (8, 64)),
    ],
)
def test_head_layouts(changes: dict[str, Scalar], widths: tuple[int, int]):
    spec = net(width_0=64, width_1=128, depth_0=1, **changes)
    blocks = named(spec)
    for path, width in zip(("down_blocks.0", "down_blocks.1", "mid_block"), (*widths, widths[1]), strict=True):
        block = blocks[f"{path}.attentions.0"]
        assert block.setting("head_width") == width
        assert block.setting("kv_heads") == int(block.setting("channels")) // width


def test_a_layout_needs_no_head_width():
    assert named(net(without=("head_width",), head_layout="8-heads"))["mid_block.attentions.0"].setting("kv_heads") == 8
    with pytest.raises(NasError, match="width 32 of stage 1 does not divide into heads of width 64"):
        net(head_layout="64-wide")
    with pytest.raises(NasError, match="width 32 of stage 1 does not divide into 5 heads"):
        net(heads_1=5)
    with pytest.raises(NasError, match="width 32 of stage 1 does not divide into heads of width 12"):
        net(heads_0=1, head_width=12)


def test_options_at_their_defaults_are_left_out_so_that_keys_stay():
    said = net(positions="none", projection="linear", norm_eps=1e-5, mid="full", conv_1="full", ffn_ratio=4)
    assert said.key == net().key
    names = {name for block in net().blocks for name, _ in block.settings}
    assert not names & {"rope", "projection", "norm_eps"}
    options = net(positions="rope", projection="conv", norm_eps=1e-6, out_channels=4, self_attention_1=False)
    blocks = named(options)
    assert blocks["mid_block.attentions.0"].setting("rope") is True
    assert "rope" not in dict(blocks["down_blocks.1.attentions.0"].settings)  # it has no self-attention to turn
    assert blocks["down_blocks.1.attentions.0"].setting("projection") == "conv"
    assert {b.setting("norm_eps") for b in options.blocks if b.kind in ("resnet", "head")} == {1e-6}
    runs(options)
    runs(net(conv_0="separable-1", conv_1="separable-2", norm_eps=1e-6, attention="gqa", qk_norm="rms_norm"))


def test_out_channels():
    assert named(net(out_channels=8))["head"].setting("out_channels") == 8
    assert named(net())["head"].setting("out_channels") == 4


# Added conditions


def test_pooled_text_and_sizes_change_the_time_embedding():
    shape = replace(INPUT, pooled_width=7, size_ids=3)
    spec = net(shape, size_embedding_width=6)
    assert [b.name for b in spec.blocks][1:3] == ["time_embedding", "add_embedding"]
    added = named(spec)["add_embedding"]
    assert added.writes == ("temb",)
    assert spec.inputs == {
        "x": (4, 16, 8),
        "text": (5, 24),
        "pooled": (7,),
        "size_ids": (3,),
        "timestep": (),
    }
    runs(spec)
    given = example_inputs(spec, generator=torch.Generator().manual_seed(0))
    built = build(spec, seed=0)
    with torch.no_grad():
        before = built(**given)
        for name in ("pooled", "size_ids"):
            assert not torch.allclose(built(**{**given, name: given[name] + 1}), before)
    with pytest.raises(UsageError, match="needs 'size_embedding_width' in"):
        net(shape)


# Stages


def test_three_and_four_stages_in_one_space():
    space = load_space("sd_unet")
    three, four = (named(network(space.reference(name))) for name in ("bk-sdm-tiny", "bk-sdm-small"))
    assert "down_blocks.1.downsamplers.0" in three
    assert "down_blocks.2.downsamplers.0" not in three  # Tiny's lowest stage keeps its resolution
    assert "down_blocks.2.downsamplers.0" in four
    assert three["up_blocks.0.resnets.0"].skip == "down_blocks.2.attentions.0"
    assert four["up_blocks.0.resnets.0"].skip == "down_blocks.3.resnets.0"
    assert four["up_blocks.1.resnets.0"].input("x") == (1280, 16, 16)
    assert three["up_blocks.0.resnets.0"].input("x") == (1280, 16, 16)
    middle = dict(space.reference("bk-sdm-tiny").choices) | {"mid": "full", "mid_depth": 2, "width_2": 768}
    block = named(network(space.candidate(**middle)))["mid_block.attentions.0"]
    assert (block.input("x"), block.setting("depth")) == ((768, 16, 16), 2)


def test_stages_as_a_choice_make_the_networks_that_a_fixed_number_makes():
    space = load_space("sd_unet")
    for row in space.sample(30, seed=1):
        candidate = space.from_row(row)
        settings = {**space.fixed, **candidate.values}
        alone = network_of("unet", settings, space.input.shape, name=str(candidate))
        assert alone == network(candidate)


@pytest.mark.parametrize("stages", [[3, 0], ["three", 4], [3.0, 4]])
def test_the_number_of_stages_is_a_count(stages: list[Scalar]):
    space = load_space("sd_unet")
    choices = tuple(replace(c, values=tuple(stages)) if c.name == "stages" else c for c in space.choices)
    with pytest.raises(UsageError, match="stages must be whole numbers above 0, got"):
        positions(replace(space, choices=choices))


# Small copies


@pytest.fixture(params=UNETS)
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return load_space(request.param)


def test_every_candidate_has_a_small_copy_of_the_same_structure(space: SearchSpace):
    for i, row in enumerate(space.sample(60, seed=2)):
        candidate = space.from_row(row)
        small, full = scaled(candidate, PROXY), network(candidate)
        structure = [(b.name, b.kind, b.skip) for b in full.blocks if b.kind != "text_time"]
        assert [(b.name, b.kind, b.skip) for b in small.blocks] == structure
        assert {b.setting("head_width") for b in small.blocks if b.kind == "transformer"} <= {4}
        assert (small.input.pooled_width, small.input.size_ids) == (0, 0)
        if i < 3:
            runs(small)


def test_widths_survive_the_proxys_division(space: SearchSpace):
    for choice, value in ((c.name, value) for c in space.choices for value in c.values if c.name.startswith("width_")):
        assert int(value) % 64 == 0, choice


def test_every_combination_of_skips_is_one_key():
    keys = {
        net(resnets_0=r, up_resnets_0=n, mid=mid, depth_0=d).key
        for r, n, mid, d in product((1, 2, 3), (1, 2, 3), ("full", "residual", "none"), (0, 1))
    }
    assert len(keys) == 3 * 3 * 3 * 2
