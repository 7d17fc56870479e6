"""Edits lead exactly to the published small networks; every legal move leaves a network that fits together and runs."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from nas import families
from nas.build import build, example_inputs
from nas.cost import cost
from nas.edit import (
    AddBlock,
    Edited,
    RemoveBlock,
    RemoveInnermost,
    RemoveMiddle,
    RemoveUnit,
    SetDepth,
    check_wiring,
    edited,
    from_json,
    moves,
    walk,
)
from nas.edit.steps import is_step
from nas.edit.wiring import changed
from nas.errors import NasError
from nas.inherit import plan
from nas.network import Scale, block
from nas.space import load_space
from nas.trace import block_trace

SMALL = Scale(
    width_divisor=40, head_width=8, norm_groups=8, latent_channels=4, height=16, width=16, text_tokens=3, text_width=12
)


def network(space, reference):
    return families.network(load_space(space).reference(reference))


@pytest.fixture(scope="module")
def sdxl():
    return network("sdxl_unet", "sdxl-base")


@pytest.fixture(scope="module")
def sd15():
    return network("sd_unet", "sd-v1.5")


def depths(stage, layers, *units):
    return [SetDepth(block=f"{stage}.attentions.{unit}", depth=layers) for unit in units]


def one_unit_less(stages):
    return [RemoveUnit(stage=stage, unit=1) for stage in range(stages)]


def koala(layers, mid):
    middle = [RemoveMiddle()] if mid is None else [SetDepth(block="mid_block.attentions.0", depth=mid)]
    return [*one_unit_less(3), *middle, *depths("down_blocks.2", layers, 0), *depths("up_blocks.0", layers, 0, 1)]


FROM_SDXL = {
    "ssd-1b": [
        RemoveMiddle(keep_first=True),
        *depths("down_blocks.2", 4, 0, 1),
        *depths("up_blocks.0", 4, 0, 1),
        *depths("up_blocks.1", 1, 1, 2),
    ],
    "segmind-vega": [
        RemoveMiddle(keep_first=True),
        *depths("down_blocks.1", 1, 0, 1),
        *depths("down_blocks.2", 2, 0, 1),
        *depths("up_blocks.0", 2, 0, 1, 2),
        *depths("up_blocks.1", 1, 0, 1, 2),
    ],
    "koala-1b": koala(6, 6),
    "koala-700m": koala(5, None),
}
FROM_SD15 = {
    "bk-sdm-base": one_unit_less(4),
    "bk-sdm-small": [*one_unit_less(4), RemoveMiddle()],
    "bk-sdm-tiny": [*one_unit_less(4), RemoveMiddle(), RemoveInnermost()],
}


def assert_arrives(teacher, edits, wanted):
    found = edited(teacher, edits)
    assert found.spec.key == wanted.key
    # Names and skips too, so that the result can be saved under diffusers' names.
    assert found.spec.blocks == wanted.blocks
    old, new = ({b.name: b for b in spec.blocks} for spec in (teacher, found.spec))
    # Handing weights down by structure alone finds the same blocks.
    assert found.origin == plan(found.spec, teacher)
    for name, origin in found.origin.items():
        # A block that comes from the teacher has the teacher's shapes; only its layers may be fewer.
        assert changed(old[origin], {"depth": 0} if "depth" in dict(old[origin].settings) else {}).signature == (
            changed(new[name], {"depth": 0} if "depth" in dict(new[name].settings) else {}).signature
        )
        if name in found.kept_layers:
            assert len(found.kept_layers[name]) == new[name].setting("depth")
            assert found.kept_layers[name] == tuple(range(new[name].setting("depth")))
        else:
            assert old[origin].settings == new[name].settings
    return found


@pytest.mark.parametrize("student", FROM_SDXL)
def test_sdxl_becomes_its_published_students(sdxl, student):
    assert_arrives(sdxl, FROM_SDXL[student], network("sdxl_unet", student))


@pytest.mark.parametrize("student", FROM_SD15)
def test_stable_diffusion_becomes_its_published_students(sd15, student):
    found = assert_arrives(sd15, FROM_SD15[student], network("sd_unet", student))
    # BK-SDM's own weight copy: the student's second up unit is the teacher's third, Tiny's stages are one further in.
    shift = student == "bk-sdm-tiny"
    assert found.origin["up_blocks.1.resnets.1"] == f"up_blocks.{1 + shift}.resnets.2"
    assert found.origin["up_blocks.1.attentions.0"] == f"up_blocks.{1 + shift}.attentions.0"
    assert found.origin["down_blocks.1.attentions.0"] == "down_blocks.1.attentions.0"


def test_half_of_pixart_is_the_small_transformer():
    """KOALA's DiT-M (arXiv 2312.04005, appendix A.4) is the first 14 of PixArt-Sigma's 28 blocks."""
    teacher = network("dit", "pixart-sigma-xl")
    edits = [RemoveBlock(block=f"transformer_blocks.{i}") for i in range(14, 28)]
    assert edited(teacher, edits).spec.blocks == network("dit", "koala-dit-m").blocks


# Single steps


def test_a_removed_skip_source_is_the_identity(sd15):
    after = RemoveBlock(block="down_blocks.1.attentions.1").apply(sd15)
    assert len(after.blocks) == len(sd15.blocks) - 1
    taker = next(b for b in after.blocks if b.name == "up_blocks.2.resnets.0")
    assert taker.skip == "down_blocks.1.resnets.1"
    # Without the whole unit, both units of the up side take the unit before it.
    both = edited(sd15, [RemoveBlock(block=f"down_blocks.1.{part}.1") for part in ("attentions", "resnets")]).spec
    skips = [b.skip for b in both.blocks if b.name.startswith("up_blocks.2.resnets")]
    assert skips == ["down_blocks.1.attentions.0", "down_blocks.1.attentions.0", "down_blocks.0.downsamplers.0"]
    build(both, "meta")(**example_inputs(both, device="meta"))


def test_a_layer_that_is_kept_is_recorded(sd15, sdxl):
    found = edited(
        sdxl,
        [
            SetDepth(block="mid_block.attentions.0", depth=5, layers=(0, 2, 4, 6, 8)),
            SetDepth(block="mid_block.attentions.0", depth=3),
            SetDepth(block="mid_block.attentions.0", depth=4),
        ],
    )
    assert found.kept_layers == {"mid_block.attentions.0": (0, 2, 4, 4)}
    deeper = SetDepth(block="mid_block.attentions.0", depth=3).edited(sd15)
    assert deeper.kept_layers == {"mid_block.attentions.0": (0, 0, 0)}


def test_snapfusions_moves_apply_to_stable_diffusion(sd15):
    """Table 3 of arXiv 2306.00980: transformers leave the outermost down stage, and join the innermost up stage."""
    outer = [RemoveBlock(block=f"down_blocks.0.attentions.{i}") for i in (0, 1)]
    last = [RemoveBlock(block=f"up_blocks.3.attentions.{i}") for i in range(3)]
    thinner = [RemoveBlock(block="down_blocks.2.resnets.1")]
    spec = edited(sd15, [*outer, *last, *thinner]).spec
    more = [AddBlock.copy(spec, f"up_blocks.1.attentions.{i}") for i in range(3)]
    assert [edit.block.name for edit in more] == ["up_blocks.1.attentions.3"] * 3
    for i in range(3):
        spec = AddBlock.copy(spec, f"up_blocks.1.attentions.{i}").apply(spec)
    check_wiring(spec)
    names = [b.name for b in spec.blocks if b.name.startswith("up_blocks.1.")]
    assert names == [
        f"up_blocks.1.{part}"
        for part in (
            *("resnets.0", "attentions.0", "attentions.3"),
            *("resnets.1", "attentions.1", "attentions.4"),
            *("resnets.2", "attentions.2", "attentions.5", "upsamplers.0"),
        )
    ]
    transformers = {
        f"{side}.{i}": sum(b.name.startswith(f"{side}.{i}.attentions") for b in spec.blocks)
        for side in ("down_blocks", "up_blocks")
        for i in range(4)
    }
    assert [transformers[f"down_blocks.{i}"] for i in range(4)] == [0, 2, 2, 0]
    assert [transformers[f"up_blocks.{i}"] for i in range(4)] == [0, 6, 3, 0]
    built = build(spec, "meta")
    assert built(**example_inputs(spec, device="meta")).shape == (1, 4, 64, 64)


def test_a_copy_takes_the_skips_and_the_weights_of_its_model(sd15):
    edit = AddBlock.copy(sd15, "down_blocks.1.attentions.1")
    found = edit.edited(sd15)
    assert found.origin["down_blocks.1.attentions.2"] == "down_blocks.1.attentions.1"
    assert next(b.skip for b in found.spec.blocks if b.name == "up_blocks.2.resnets.0") == "down_blocks.1.attentions.2"


@pytest.mark.parametrize(
    "edit",
    [
        RemoveBlock(block="down_blocks.1.attentions.1"),
        RemoveBlock(block="mid_block.resnets.1"),
        SetDepth(block="down_blocks.2.attentions.0", depth=3),
        SetDepth(block="up_blocks.0.attentions.2", depth=12),
    ],
    ids=lambda edit: edit.name,
)
def test_an_edit_and_its_inverse_leave_the_network_as_it_was(sdxl, edit):
    after = edit.apply(sdxl)
    assert after.key != sdxl.key
    back = edit.invert(sdxl)
    assert back.apply(after) == sdxl
    assert back.invert(after).apply(sdxl) == after


def test_every_move_that_has_an_inverse_is_undone_by_it(sd15):
    undone = 0
    for edit in moves(sd15):
        if isinstance(edit, RemoveUnit | RemoveMiddle):
            with pytest.raises(NasError, match="no single edit undoes") as caught:
                edit.invert(sd15)
            assert caught.value.hint == "keep the network from before the edit"
        else:
            assert edit.invert(sd15).apply(edit.apply(sd15)) == sd15
            undone += 1
    assert undone > 60


def test_edits_survive_json_and_have_different_names(sdxl):
    legal = [*moves(sdxl), RemoveInnermost(), SetDepth(block="a", depth=2, layers=(0, 3))]
    assert [from_json(json.loads(json.dumps(edit.to_json()))) for edit in legal] == legal
    assert len({edit.name for edit in legal}) == len(legal)
    with pytest.raises(NasError, match="unknown edit 'remove_blok'"):
        from_json({"edit": "remove_blok", "block": "mid_block.resnets.0"})


# What is refused

REFUSED = [
    (RemoveBlock(block="down_blocks.1.resnets.0"), r"'down_blocks.1.resnets.0' cannot be removed: it makes \(640, "),
    (RemoveBlock(block="up_blocks.1.resnets.0"), "'up_blocks.1.resnets.0' cannot be removed: it takes the skip of"),
    (RemoveBlock(block="down_blocks.0.downsamplers.0"), "'down_blocks.0.downsamplers.0' cannot be removed: a downsam"),
    (RemoveBlock(block="time_embedding"), "'time_embedding' cannot be removed: a time_embedding block is no step"),
    (RemoveBlock(block="mid_block.attentions.7"), "unknown block 'mid_block.attentions.7'"),
    (SetDepth(block="mid_block.attentions.0", depth=1), "'mid_block.attentions.0' has these 1 layers already"),
    (SetDepth(block="mid_block.attentions.0", depth=0), "'mid_block.attentions.0' cannot have 0 layers"),
    (SetDepth(block="mid_block.attentions.0", depth=2, layers=(0,)), "cannot have 2 layers of which 1 are named"),
    (SetDepth(block="mid_block.attentions.0", depth=1, layers=(1,)), "has layers 0 to 0, so it cannot keep"),
    (SetDepth(block="mid_block.resnets.0", depth=1), "'mid_block.resnets.0' of kind 'resnet' has no layers"),
    (RemoveUnit(stage=4, unit=0), "has 4 UNet stages, so none numbered 4"),
    (RemoveUnit(stage=1, unit=2), "no block 'down_blocks.1.resnets.2'"),
    (RemoveUnit(stage=1, unit=1, up_unit=3), "no block 'up_blocks.2.resnets.3'"),
    (RemoveInnermost(), "while block 'mid_block.resnets.0' stands there"),
    (
        AddBlock(after="time_embedding", block=block("a.0", "resnet", {"x": (8, 4, 4)}, in_channels=8, out_channels=8)),
        "nothing can be added after 'time_embedding'",
    ),
    (
        AddBlock(after="conv_in", block=block("a.0", "resnet", {"x": (8, 4, 4)}, in_channels=8, out_channels=8)),
        r"'a.0' takes x of shape \(8, 4, 4\), but is given \(320, 64, 64\)",
    ),
    (
        AddBlock(after="conv_in", block=block("a.0", "resnet", {"x": (8, 4, 4)}, in_channels=8, out_channels=4)),
        "'a.0' cannot be added: it makes",
    ),
]


@pytest.mark.parametrize(("edit", "words"), REFUSED, ids=[edit.name for edit, _ in REFUSED])
def test_an_illegal_edit_names_the_block_and_the_reason(sd15, edit, words):
    with pytest.raises(NasError, match=words):
        edit.apply(sd15)


def test_copies_must_be_copies_and_skips_must_be_there(sd15):
    copy = AddBlock.copy(sd15, "down_blocks.0.attentions.0")
    with pytest.raises(NasError, match=r"cannot be a copy of 'down_blocks.0.resnets.0', which differs"):
        replace(copy, like="down_blocks.0.resnets.0").apply(sd15)
    with pytest.raises(NasError, match=r"\['head'\] take no skip from block 'down_blocks.0.attentions.0'"):
        replace(copy, skip_for=("head",)).apply(sd15)
    middle = AddBlock.copy(sd15, "mid_block.attentions.0")
    with pytest.raises(NasError, match=r"two blocks are named 'mid_block.attentions.1'"):
        middle.apply(middle.apply(sd15))
    with pytest.raises(NasError, match="'conv_in' has no number"):
        AddBlock.copy(sd15, "conv_in")


def test_what_is_gone_cannot_be_removed_again(sd15):
    last = edited(sd15, one_unit_less(4)).spec
    with pytest.raises(NasError, match=r"'down_blocks.1.resnets.0' is the only unit of down_blocks.1"):
        RemoveUnit(stage=1, unit=0).apply(last)
    without = RemoveMiddle().apply(sd15)
    with pytest.raises(NasError, match="the middle has no blocks"):
        RemoveMiddle().apply(without)
    thin = RemoveMiddle(keep_first=True).apply(sd15)
    assert [b.name for b in thin.blocks if b.name.startswith("mid_block")] == ["mid_block.resnets.0"]
    with pytest.raises(NasError, match=r"the middle has \['mid_block.resnets.0'\]"):
        RemoveMiddle(keep_first=True).apply(thin)


def test_a_unit_whose_output_is_taken_twice_stays(sd15):
    spec = edited(sd15, [RemoveBlock(block=f"down_blocks.1.{part}.1") for part in ("attentions", "resnets")]).spec
    spec = AddBlock.copy(spec, "down_blocks.1.attentions.0").apply(spec)
    with pytest.raises(NasError, match=r"no block 'down_blocks.1.resnets.1'"):
        RemoveUnit(stage=1, unit=1).apply(spec)
    three = edited(sd15, [RemoveBlock(block="down_blocks.3.resnets.1")]).spec
    with pytest.raises(NasError, match=r"'down_blocks.3.resnets.0' is the only unit"):
        RemoveUnit(stage=3, unit=0).apply(three)


def test_removing_the_outer_unit_refits_the_next_one(sd15):
    """Without a stage's first unit, the second takes over the change of width."""
    after = RemoveUnit(stage=1, unit=0, up_unit=2).apply(sd15)
    first = next(b for b in after.blocks if b.name == "down_blocks.1.resnets.0")
    assert (first.setting("in_channels"), first.setting("out_channels"), first.input("x")) == (320, 640, (320, 32, 32))
    outer = next(b for b in after.blocks if b.name == "up_blocks.2.resnets.1")
    assert (outer.skip, outer.input("skip"), outer.setting("in_channels")) == (
        "down_blocks.0.downsamplers.0",
        (320, 32, 32),
        960,
    )
    build(after, "meta")(**example_inputs(after, device="meta"))


# Walks


def wander(spec, seed, steps):
    """Random legal moves, by kind first so that the rare kinds come up."""
    draw = random.Random(seed)
    found = Edited.nothing(spec)
    for _ in range(steps):
        by_kind = {}
        for edit in moves(found.spec):
            by_kind.setdefault(type(edit), []).append(edit)
        found = found.then(draw.choice(by_kind[draw.choice(sorted(by_kind, key=lambda kind: kind.kind))]))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_random_walks_stay_valid_and_build(request, seed):
    teacher = request.getfixturevalue("sd15" if seed % 2 else "sdxl")
    found = wander(teacher, seed, 12)
    check_wiring(found.spec)
    old = {b.name: b for b in teacher.blocks}
    for name, origin in found.origin.items():
        new = next(b for b in found.spec.blocks if b.name == name)
        assert new.kind == old[origin].kind
        if "depth" in dict(new.settings):
            layers = found.kept_layers.get(name, tuple(range(old[origin].setting("depth"))))
            assert len(layers) == new.setting("depth")
            assert max(layers) < old[origin].setting("depth")
    made = build(found.spec, "meta")
    assert made(**example_inputs(found.spec, device="meta")).shape == (1, 4, teacher.input.height, teacher.input.width)


@pytest.mark.parametrize("seed", range(3))
def test_random_walks_of_a_small_network_run(seed):
    space = load_space("sd_unet")
    teacher = families.scaled(space.reference("sd-v1.5"), SMALL)
    spec = wander(teacher, seed, 10).spec
    with torch.no_grad():
        out = build(spec, seed=seed)(**example_inputs(spec, 2, generator=torch.Generator().manual_seed(seed)))
    assert out.shape == (2, 4, 16, 16)
    assert bool(out.isfinite().all())


def total(spec):
    traces = [block_trace(b) for b in spec.blocks]
    return cost([op for trace in traces for op in trace.ops], 0)


def test_a_walk_says_what_each_edit_changes(sdxl):
    steps = walk(sdxl, FROM_SDXL["koala-700m"], total)
    assert steps[-1].cost.params == 782_822_724
    assert sum(step.params_change for step in steps) == 782_822_724 - 2_567_463_684
    before = total(sdxl)
    assert sum(step.macs_change for step in steps) == steps[-1].cost.macs - before.macs
    middle = next(step for step in steps if step.edit == RemoveMiddle())
    own = [block_trace(b) for b in sdxl.blocks if b.name.startswith("mid_block.")]
    assert middle.params_change == -sum(trace.params for trace in own)
    assert middle.macs_change == -sum(trace.macs for trace in own)
    assert steps[0].edited.origin["up_blocks.2.resnets.1"] == "up_blocks.2.resnets.2"


def test_every_step_may_be_left_out(sd15):
    steps = [b.name for b in sd15.blocks if is_step(b)]
    out = [edit.block for edit in moves(sd15) if isinstance(edit, RemoveBlock)]
    assert out == steps
    assert "mid_block.resnets.0" in steps
    assert "conv_in" not in steps
