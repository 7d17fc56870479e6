"""Networks made by edits start from the blocks and layers that the edits kept."""

from __future__ import annotations

import pytest
import torch
from inherit_cases import XL, outputs, unet, weights

from nas.edit import AddBlock, RemoveBlock, SetDepth, edited
from nas.errors import UsageError
from nas.inherit import inherit

DEEP = "down_blocks.2.attentions.0"


def test_the_layers_that_an_edit_kept_are_inherited():
    teacher = unet(XL)
    depth = int(next(block for block in teacher.blocks if block.name == DEEP).setting("depth"))
    kept = (0, depth - 1)
    made = edited(teacher, [SetDepth(block=DEEP, depth=2, layers=kept)])
    state = weights(teacher)
    found, report = inherit(made.spec, teacher, state, origin=made.origin, kept_layers=made.kept_layers)
    for own, there in enumerate(kept):
        name = "attn1.to_q.weight"
        assert torch.equal(
            found[f"{DEEP}.transformer_blocks.{own}.{name}"], state[f"{DEEP}.transformer_blocks.{there}.{name}"]
        )
    assert report.tensors("new") == report.tensors("sliced") == 0


def test_a_copied_block_starts_from_the_block_that_it_copies():
    teacher = unet(XL)
    state = weights(teacher)
    made = edited(teacher, [AddBlock.copy(teacher, DEEP)])
    (new,) = {block.name for block in made.spec.blocks} - {block.name for block in teacher.blocks}
    found, report = inherit(made.spec, teacher, state, origin=made.origin, kept_layers=made.kept_layers)
    mine = {name.removeprefix(new): tensor for name, tensor in found.items() if name.startswith(f"{new}.")}
    assert mine
    assert all(torch.equal(tensor, state[f"{DEEP}{name}"]) for name, tensor in mine.items())
    assert dict(report.moved_blocks) == {new: DEEP}
    assert inherit(made.spec, teacher, state)[1].new_blocks == (new,)  # the published maps know nothing of a copy


def test_an_edited_network_computes_what_is_left_of_the_teacher():
    teacher = unet(XL)
    state = weights(teacher)
    made = edited(teacher, [RemoveBlock(block=DEEP)])
    found, _ = inherit(made.spec, teacher, state, origin=made.origin)
    silenced = dict(state)
    for name in ("weight", "bias"):  # a transformer adds proj_out of its tokens: without it, it is the identity
        silenced[f"{DEEP}.proj_out.{name}"] = torch.zeros_like(state[f"{DEEP}.proj_out.{name}"])
    torch.testing.assert_close(outputs(made.spec, found), outputs(teacher, silenced))


def test_an_origin_that_the_teacher_lacks_is_refused():
    teacher = unet(XL)
    with pytest.raises(UsageError, match=r"unknown block 'conv_inn'.* did you mean 'conv_in'"):
        inherit(teacher, teacher, weights(teacher), origin={"conv_in": "conv_inn"})
