"""What stages change of a student: removed blocks and layers, a guidance input, and the weights that stay."""

from __future__ import annotations

import pytest
import torch

from nas import families
from nas.build import build
from nas.edit import check_wiring
from nas.errors import NasError, UsageError
from nas.network import NetworkSpec
from nas.space import load_space
from nas.teachers import TeacherSettings
from nas.teachers.embedded import network_spec
from nas.train import load_recipe
from nas.train.reshaping import guided, removed
from nas.train.starting import reshaped

TEACHER = network_spec(TeacherSettings(vocabulary=9, null_tokens=(0, 0), widths=(16, 32), mean=(0.0,)))
HALF = ("mid_block.resnets.0", "up_blocks.0.resnets.0", "up_blocks.0.attentions.0")


@pytest.fixture(scope="module")
def sdxl() -> NetworkSpec:
    return families.network(load_space("sdxl_unet").published("sdxl-base"))


def test_blocks_are_left_out_and_the_rest_is_as_before() -> None:
    after = removed(TEACHER, HALF, "here")
    assert [block.name for block in after.spec.blocks] == [b.name for b in TEACHER.blocks if b.name not in HALF]
    assert after.origin == {block.name: block.name for block in after.spec.blocks}
    check_wiring(after.spec)


def test_nothing_removed_changes_nothing() -> None:
    assert removed(TEACHER, (), "here").spec == TEACHER


def test_a_skip_from_a_removed_block_comes_from_the_one_before() -> None:
    after = removed(TEACHER, ("down_blocks.1.attentions.0",), "here").spec
    skips = {block.name: block.skip for block in after.blocks}
    assert skips["up_blocks.0.resnets.0"] == "down_blocks.1.resnets.0"
    check_wiring(after)


def test_the_stages_of_ssd1b_make_its_published_network(sdxl: NetworkSpec) -> None:
    spec = sdxl
    for stage in load_recipe("ssd1b").stages:
        spec = removed(spec, stage.remove, stage.name).spec
    assert spec.key == families.network(load_space("sdxl_unet").published("ssd-1b")).key


def test_layers_are_named_one_by_one_or_as_a_range(sdxl: NetworkSpec) -> None:
    name = "down_blocks.2.attentions.0.transformer_blocks"
    after = removed(sdxl, (f"{name}.1", f"{name}.4-9"), "here")
    assert dict(next(b for b in after.spec.blocks if b.name == "down_blocks.2.attentions.0").settings)["depth"] == 3
    assert after.kept_layers == {"down_blocks.2.attentions.0": (0, 2, 3)}


def test_what_cannot_be_removed_is_said(sdxl: NetworkSpec) -> None:
    with pytest.raises(UsageError, match=r"unknown block 'mid_block.resnet.0' in stage x: remove; did you mean"):
        removed(TEACHER, ("mid_block.resnet.0",), "stage x")
    with pytest.raises(UsageError, match=r"layer 1 of down_blocks.1.attentions.0, which has 1 transformer layers"):
        removed(TEACHER, ("down_blocks.1.attentions.0.transformer_blocks.1",), "stage x")
    with pytest.raises(UsageError, match="all layers of") as caught:
        removed(TEACHER, ("down_blocks.1.attentions.0.transformer_blocks.0",), "stage x")
    assert caught.value.hint == 'remove "down_blocks.1.attentions.0" itself'
    with pytest.raises(UsageError, match="which has no transformer layers"):
        removed(TEACHER, ("mid_block.resnets.0.transformer_blocks.0",), "stage x")
    with pytest.raises(NasError, match=r"stage x: .*is given"):
        removed(TEACHER, ("down_blocks.0.downsamplers.0",), "stage x")
    with pytest.raises(NasError, match=r"stage x: .*reads temb, which neither"):
        removed(TEACHER, ("time_embedding",), "stage x")


def test_what_is_left_keeps_its_weights_bit_by_bit() -> None:
    before = build(TEACHER, seed=3)
    after = reshaped(before, removed(TEACHER, HALF, "here"))
    ours, theirs = after.state_dict(), before.state_dict()
    assert ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(parameter.requires_grad for parameter in after.parameters())
    assert after.training == before.training


def test_a_guidance_input_is_new_and_the_rest_stays() -> None:
    before = build(TEACHER, seed=3)
    edited = guided(removed(TEACHER, (), "here"), 8, "here")
    assert edited.spec.inputs["guidance"] == (8,)
    after = reshaped(before, edited)
    new = {name for name in after.state_dict() if name not in before.state_dict()}
    assert new == {"time_embedding.cond_proj.weight"}
    x, text = torch.randn(2, 48, 8, 8), torch.randn(2, 2, 64)
    told = [after(x, 3.0, text, guidance=torch.full((2, 8), value)) for value in (0.0, 1.0)]
    assert torch.allclose(told[0], before(x, 3.0, text), atol=1e-6)
    assert not torch.allclose(told[0], told[1])
    with pytest.raises(UsageError, match="takes an embedding of the guidance already"):
        guided(edited, 8, "here")
