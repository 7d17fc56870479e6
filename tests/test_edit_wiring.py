"""Shapes followed through a network: every reference fits together, and what does not is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nas import families
from nas.build import build_block
from nas.edit import RemoveBlock, RemoveUnit, check_wiring, edited
from nas.edit.wiring import KNOWN, gives
from nas.errors import NasError
from nas.network import InputShape, NetworkSpec, block
from nas.registry import plugins
from nas.space import list_spaces, load_space
from nas.trace.recorder import Uninitialised


def references(space):
    opened = load_space(space)
    return [families.network(opened.reference(reference.name)) for reference in opened.references]


@pytest.mark.parametrize("space", list_spaces())
def test_every_reference_fits_together(space):
    for spec in references(space):
        check_wiring(spec)


@pytest.mark.parametrize("space", list_spaces())
def test_what_a_block_gives_is_what_it_gives_when_run(space):
    distinct = {b.signature: b for spec in references(space) for b in spec.blocks}
    for spec in distinct.values():
        with torch.device("meta"), Uninitialised():
            module = build_block(spec)
            outputs = module(**{name: torch.empty(1, *shape) for name, shape in spec.inputs})
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert gives(spec) == tuple(tuple(output.shape[1:]) for output in outputs), spec


def test_a_block_that_writes_image_and_text_gives_both():
    shapes = {"x": (64, 12), "text": (5, 12), "temb": (12,)}
    joint = block("j", "mmdit_block", shapes, writes=("x", "text"), width=12, heads=2, kv_heads=2, ffn_ratio=2)
    with torch.device("meta"):
        outputs = build_block(joint)(**{name: torch.empty(1, *shape) for name, shape in joint.inputs})
    assert gives(joint) == tuple(tuple(output.shape[1:]) for output in outputs) == ((64, 12), (5, 12))


def test_every_kind_in_the_tree_is_known():
    assert set(plugins("nas.blocks")) == KNOWN


def toy(*blocks):
    return NetworkSpec(name="toy", input=InputShape(channels=4, height=8, width=8), blocks=blocks)


def stem(**changes):
    return block("in", "stem", {"x": (4, 8, 8)}, **{"in_channels": 4, "out_channels": 8, **changes})


def resnet(x, skip=None, source=None, **changes):
    settings = {"in_channels": x[0] + (skip[0] if skip else 0), "out_channels": 8, "time_width": 0, "norm_groups": 4}
    inputs = {"x": x, "skip": skip} if skip else {"x": x}
    return block("r", "resnet", inputs, skip=source, **{**settings, **changes})


BROKEN = [
    ((stem(), resnet((6, 8, 8))), r"'r' takes x of shape \(6, 8, 8\), but is given \(8, 8, 8\)"),
    ((stem(), resnet((8, 4, 4))), r"'r' takes x of shape \(8, 4, 4\), but is given \(8, 8, 8\)"),
    ((stem(), resnet((8, 8, 8), (4, 8, 8), "in")), r"'r' takes skip of shape \(4, 8, 8\), but is given \(8, 8, 8\)"),
    ((stem(), resnet((8, 8, 8), None, "in")), "'r' skips from 'in', but has no input of that name"),
    ((stem(), resnet((8, 8, 8), in_channels=9)), "'r' has in_channels = 9, but its inputs have 8"),
    ((stem(in_channels=3),), "'in' has in_channels = 3, but its inputs have 4"),
    (
        (stem(), block("d", "downsample", {"x": (8, 8, 8)}, channels=8), resnet((8, 8, 8))),
        r"'r' takes x of shape \(8, 8, 8\), but is given \(8, 4, 4\)",
    ),
    (
        (stem(), block("r", "resnet", {"x": (8, 8, 8), "temb": (4,)}, in_channels=8, out_channels=8, time_width=4)),
        "'r' reads temb, which neither the network nor an earlier block gives",
    ),
    (
        (
            block("t", "time_embedding", {"timestep": ()}, writes=("temb",), frequency_width=8, time_width=16),
            stem(),
            block("r", "resnet", {"x": (8, 8, 8), "temb": (16,)}, in_channels=8, out_channels=8, time_width=4),
        ),
        "'r' has time_width = 4, but its inputs have 16",
    ),
    (
        (
            block("t", "time_embedding", {"timestep": ()}, writes=("temb",), frequency_width=8, time_width=16),
            stem(),
            block("r", "resnet", {"x": (8, 8, 8), "temb": (4,)}, in_channels=8, out_channels=8, time_width=4),
        ),
        r"'r' takes temb of shape \(4,\), but is given \(16,\)",
    ),
]


@pytest.mark.parametrize(("blocks", "words"), BROKEN, ids=[words for _, words in BROKEN])
def test_broken_wiring_is_named(blocks, words):
    with pytest.raises(NasError, match=f"network toy: block {words}"):
        check_wiring(toy(*blocks))


def test_an_unknown_kind_gives_what_the_next_block_takes():
    """A block from outside the tree: its output is not known, but what others declare still has to agree."""
    odd = block("odd", "my_block.py", {"x": (8, 8, 8)}, some=1)
    check_wiring(toy(stem(), odd, resnet((16, 4, 4))))
    with pytest.raises(NasError, match="'odd' takes x"):
        check_wiring(toy(stem(out_channels=6), odd))
    second = replace(resnet((9, 4, 4)), name="second")
    with pytest.raises(NasError, match="'second' takes x"):
        check_wiring(toy(stem(), odd, resnet((16, 4, 4)), second))


def test_stages_keep_their_numbers_when_one_has_no_step_left_on_the_way_down():
    sd15 = families.network(load_space("sd_unet").reference("sd-v1.5"))
    spec = edited(sd15, [RemoveBlock(block=f"down_blocks.3.resnets.{unit}") for unit in (0, 1)]).spec
    after = RemoveUnit(stage=1, unit=1).apply(spec)
    gone = {b.name for b in spec.blocks} - {b.name for b in after.blocks}
    lost = {
        "down_blocks.1.resnets.1",
        "down_blocks.1.attentions.1",
        "up_blocks.2.resnets.2",
        "up_blocks.2.attentions.2",
    }
    assert gone == lost
    with pytest.raises(NasError, match=r"no block 'down_blocks\.3\.resnets\.0' to remove"):
        RemoveUnit(stage=3, unit=0).apply(spec)
