"""Networks that start from a larger one: which block from which, what is new, and the command."""

from __future__ import annotations

import json
import re

import pytest
import torch
from inherit_cases import BASE, KOALA, SD, SMALL, SSD, TINY, VEGA, XL, network, outputs, unet, weights

from nas import formats
from nas.build import build
from nas.checkpoint import load, save_network
from nas.cli import main
from nas.edit import RemoveBlock, edited
from nas.errors import NasError, UsageError
from nas.families import network_of
from nas.formats import dreamlite_unet, pixart, unet2d_condition
from nas.inherit import inherit, plan
from nas.network import InputShape, NetworkSpec

# -------------------------------------------------------------------------------------------- which block


@pytest.mark.parametrize("config", [SD, BASE, TINY, XL, SSD], ids=["sd", "base", "tiny", "xl", "ssd"])
@pytest.mark.parametrize("widths", ["first", "l1"])
def test_an_equal_network_is_a_copy(config, widths):
    spec = unet(config)
    teacher = weights(spec)
    state, report = inherit(spec, spec, teacher, widths=widths)
    assert list(state) == list(teacher)
    assert all(torch.equal(state[name], teacher[name]) for name in teacher)
    assert torch.equal(outputs(spec, state), outputs(spec, teacher))
    assert (report.tensors("copied"), report.tensors("sliced"), report.tensors("new")) == (len(teacher), 0, 0)
    assert report.params("copied") == sum(t.numel() for t in teacher.values())
    assert report.new_blocks == report.moved_blocks == ()
    # Training the copy must not move the teacher.
    assert not {t.data_ptr() for t in state.values()} & {t.data_ptr() for t in teacher.values()}


# Of the publisher's script (Nota-NetsPresso/BK-SDM, src/kd_train_text_to_image.py, copy_weight_from_teacher); modules
# that it does not name are copied from the same place.
_BK_BASE = {
    f"up_blocks.{k}.{part}.1.": f"up_blocks.{k}.{part}.2."
    for k in range(4)
    for part in ("resnets", "attentions")
    if (k, part) != (0, "attentions")
}
_BK_TINY = {
    f"up_blocks.{k}.{part}.{unit}.": f"up_blocks.{k + 1}.{part}.{source}."
    for k in range(3)
    for part in ("resnets", "attentions")
    for unit, source in ((0, 0), (1, 2))
} | {f"up_blocks.{k}.upsamplers.": f"up_blocks.{k + 1}.upsamplers." for k in range(2)}


def by_map(name: str, mapping: dict[str, str]) -> str:
    for to, source in mapping.items():
        if name.startswith(to):
            return source + name.removeprefix(to)
    return name


@pytest.mark.parametrize(
    ("config", "mapping"),
    [(BASE, _BK_BASE), (SMALL, _BK_BASE), (TINY, _BK_TINY)],
    ids=["base", "small", "tiny"],
)
def test_bk_sdm_copies_every_tensor_by_its_published_map(config, mapping):
    large, small = unet(SD), unet(config)
    teacher = weights(large)
    state, report = inherit(small, large, teacher)
    assert all(torch.equal(tensor, teacher[by_map(name, mapping)]) for name, tensor in state.items())
    assert report.tensors("copied") == len(state)
    assert {f"{to}." for to, _ in report.moved_blocks} == {
        to if to.endswith(("0.", "1.", "2.")) else f"{to}0." for to in mapping
    }


@pytest.mark.parametrize("mid", ["UNetMidBlock2DCrossAttn", None])
def test_koala_keeps_places_and_the_first_layers(mid):
    large, small = unet(XL), unet({**KOALA, "mid_block_type": mid})
    teacher = weights(large)
    state, report = inherit(small, large, teacher)
    mapping = {f"up_blocks.{k}.{part}.1.": f"up_blocks.{k}.{part}.2." for k in range(3) for part in _PARTS}
    assert all(torch.equal(tensor, teacher[by_map(name, mapping)]) for name, tensor in state.items())
    assert report.tensors("copied") == len(state)
    assert "down_blocks.2.attentions.0.transformer_blocks.2.attn1.to_q.weight" in state
    assert any(name.startswith("mid_block.") for name in state) == (mid is not None)


_PARTS = ("resnets", "attentions")


@pytest.mark.parametrize("config", [SSD, VEGA], ids=["ssd-1b", "vega"])
def test_segmind_shapes_keep_places_and_the_first_layers(config):
    large, small = unet(XL), unet(config)
    teacher = weights(large)
    state, report = inherit(small, large, teacher)
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in state.items())
    assert report.tensors("copied") == len(state)
    assert report.moved_blocks == ()
    assert "mid_block.resnets.0.conv1.weight" in state
    assert "mid_block.resnets.1.conv1.weight" not in state


def test_places_that_the_teacher_lacks_have_no_source():
    small, large = unet(TINY), unet(SD)
    found = plan(large, small)
    assert found["down_blocks.3.resnets.0"] is None
    assert found["up_blocks.0.resnets.0"] is None
    assert found["up_blocks.1.resnets.2"] == "up_blocks.0.resnets.1"
    assert found["up_blocks.1.resnets.1"] is None
    assert found["mid_block.attentions.0"] is None
    assert found["conv_in"] == "conv_in"


def test_a_chain_of_blocks_keeps_its_first():
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 4,
        "cross_attention_dim": 16,
        "caption_channels": 24,
        "sample_size": 16,
    }
    large = pixart.network(config, name="large", where="here")
    small = pixart.network({**config, "num_layers": 2}, name="small", where="here")
    teacher = weights(large)
    state, report = inherit(small, large, teacher)
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in state.items())
    assert report.tensors("new") == 0


# -------------------------------------------------------------------------------------------------- what is new


def settings(**changes) -> NetworkSpec:
    fixed = {
        "stages": 2,
        "width_0": 16,
        "width_1": 32,
        "resnets_0": 1,
        "resnets_1": 1,
        "depth_0": 0,
        "depth_1": 2,
        "head_width": 8,
        "norm_groups": 4,
        **changes,
    }
    shape = InputShape(channels=4, height=8, width=8, text_tokens=5, text_width=12)
    return network_of("unet", fixed, shape, name="net")


def new_tensors(student: NetworkSpec, teacher: NetworkSpec) -> set[str]:
    state, report = inherit(student, teacher, weights(teacher))
    network(student, state)
    new = {b.name for b in report.blocks if b.tensors["new"]}
    assert report.tensors("copied") + report.tensors("sliced") + report.tensors("new") == len(state)
    return new


def test_another_kind_of_convolution_is_new():
    found = new_tensors(settings(conv_0="separable-2"), settings())
    assert found == {"down_blocks.0.resnets.0", "up_blocks.1.resnets.0", "up_blocks.1.resnets.1"}
    _, report = inherit(settings(conv_0="separable-2"), settings(), weights(settings()))
    assert set(report.new_blocks) == found


def test_layers_and_attention_that_the_teacher_lacks_are_new():
    attending = {"down_blocks.1.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1"}
    assert new_tensors(settings(depth_1=3), settings()) == attending | {"mid_block.attentions.0"}
    assert new_tensors(settings(), settings(self_attention_1=False)) == attending
    assert new_tensors(settings(qk_norm="rms_norm"), settings()) == attending | {"mid_block.attentions.0"}
    assert new_tensors(settings(width_0=32), settings()) >= {"conv_in", "head"}


def test_shared_key_heads_start_from_the_leading_ones():
    large, small = settings(), settings(attention="mqa")
    teacher = weights(large)
    state, report = inherit(small, large, teacher, widths="l1")
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    assert torch.equal(state[name], teacher[name][:8])
    assert report.tensors("new") == 0


@pytest.mark.parametrize("widths", ["first", "l1"])
@pytest.mark.parametrize(
    ("theirs", "width", "ours", "kept"),
    [
        ("gqa", 32, "gqa", [0, 1]),
        ("gqa", 32, "mha", [0, 0, 1, 1]),
        ("gqa", 64, "mqa", [0]),
        ("mha", 64, "gqa", [0, 2, 4, 6]),
    ],
)
def test_a_key_head_is_that_of_its_first_query_head(theirs, width, ours, kept, widths):
    large, small = settings(width_1=64, attention=theirs), settings(width_1=width, attention=ours)
    teacher = weights(large)
    state, _ = inherit(small, large, teacher, widths=widths)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_{}.weight"
    heads = teacher[name.format("k")].unflatten(0, (-1, 8))
    assert torch.equal(state[name.format("k")].unflatten(0, (-1, 8)), heads[kept])
    assert state[name.format("q")].shape == (width, width)


@pytest.mark.parametrize("widths", ["first", "l1"])
def test_a_smaller_feed_forward_keeps_its_tokens(widths):
    large, small = settings(ffn_ratio=4), settings(ffn_ratio=2)
    teacher = weights(large)
    state, report = inherit(small, large, teacher, widths=widths)
    name = "mid_block.attentions.0.transformer_blocks.1.ff.net.2"
    assert torch.equal(state[f"{name}.bias"], teacher[f"{name}.bias"])
    assert state[f"{name}.weight"].shape == (32, 64)
    project = teacher[name.replace("net.2", "net.0.proj") + ".weight"].abs().sum(1)
    strongest = (project[:128] + project[128:]).topk(64).indices.sort().values
    kept = torch.arange(64) if widths == "first" else strongest
    assert torch.equal(state[f"{name}.weight"], teacher[f"{name}.weight"][:, kept])
    assert {b.name for b in report.blocks if b.tensors["sliced"]} == {
        b.name for b in small.blocks if b.kind == "transformer"
    }


def test_text_of_another_encoder_and_more_latent_channels_are_new():
    assert new_tensors(unet({**SD, "cross_attention_dim": 8}), unet(SD)) == {
        b.name for b in unet(SD).blocks if b.kind == "transformer"
    }
    assert new_tensors(unet({**SD, "in_channels": 9}), unet(SD)) == {"conv_in"}
    state, report = inherit(unet({**SD, "in_channels": 9}), unet(SD), weights(unet(SD)))
    assert report.new_blocks == ()  # its bias was inherited
    assert state["conv_in.weight"].shape[1] == 9
    assert new_tensors(unet(XL), unet({**XL, "addition_embed_type": None})) == {"add_embedding"}


def test_added_conditions_are_matched_part_by_part():
    # As many features, of other meaning: 10 of text and 6 sizes, or 14 of text and 5 sizes.
    six, five = (unet2d_condition.network(XL, text_tokens=5, size_ids=n, where="here") for n in (6, 5))
    state, report = inherit(five, six, weights(six))
    assert state["add_embedding.linear_1.weight"].shape == weights(six)["add_embedding.linear_1.weight"].shape
    assert (report.tensors("new"), report.tensors("copied")) == (1, len(state) - 1)


def test_a_network_whose_lowest_stage_lost_every_step_on_the_way_down_inherits():
    large = unet(SD)
    gone = [RemoveBlock(block=f"down_blocks.3.resnets.{unit}") for unit in (0, 1)]
    small = edited(large, gone).spec
    teacher = weights(large)
    state, report = inherit(small, large, teacher, widths="l1")
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in state.items())
    assert report.tensors("copied") == len(state)


def test_linear_and_convolutional_projections_are_the_same_weights():
    large, small = unet(SD), unet({**SD, "use_linear_projection": True})
    state, report = inherit(small, large, weights(large))
    assert torch.allclose(outputs(small, state), outputs(large, weights(large)), rtol=1e-4, atol=1e-5)
    assert report.tensors("copied") == len(state)
    assert inherit(large, small, state)[1].tensors("copied") == len(state)


def test_new_weights_follow_the_seed_and_the_precision_of_the_teacher():
    large, small = settings(), settings(conv_0="separable-2")
    teacher = {name: t.half() for name, t in weights(large).items()}
    before = torch.random.get_rng_state()
    one, two = inherit(small, large, teacher, seed=1)[0], inherit(small, large, teacher, seed=1)[0]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {t.dtype for t in one.values()} == {torch.float16}
    name = "down_blocks.0.resnets.0.conv1.pointwise.weight"
    assert not torch.equal(one[name], inherit(small, large, teacher, seed=2)[0][name])


def test_wrong_use_is_refused():
    spec = unet(SD)
    with pytest.raises(UsageError, match=r"unknown way to choose channels 'l2'.* known: first, l1"):
        inherit(spec, spec, weights(spec), widths="l2")
    state = weights(spec)
    del state["conv_in.bias"]
    with pytest.raises(NasError, match=r"not of network net: conv_in.bias has nothing, not \(16,\)"):
        inherit(spec, spec, state)


def test_a_report_as_data():
    large, small = settings(), settings(conv_0="separable-2", ffn_ratio=2)
    data = inherit(small, large, weights(large))[1].to_json()
    assert data["new_blocks"] == ["down_blocks.0.resnets.0", "up_blocks.1.resnets.0", "up_blocks.1.resnets.1"]
    total = sum(data[what]["params"] for what in ("copied", "sliced", "new"))
    assert total == sum(p.numel() for p in build(small, "meta").parameters())
    assert sum(b["params"]["sliced"] for b in data["blocks"]) == data["sliced"]["params"] > 0


def test_every_class_that_has_a_unet_is_covered():
    assert {m.CLASS for m in formats.classes().values() if m.FAMILY == "unet"} == {
        unet2d_condition.CLASS,
        dreamlite_unet.CLASS,
    }


# --------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A network of the SD space's family, saved by nas, with the width of the KOALA-like student doubled."""
    spec = unet(XL, "large")
    return save_network(tmp_path_factory.mktemp("teacher") / "large.safetensors", network(spec, weights(spec)))


SPACE = """
summary = "Small UNets."
family = "unet"

[input]
latent_channels = 4
latent_height = 16
latent_width = 16
pixels_per_latent = 8
text_tokens = 5
text_width = 12
pooled_width = 10
size_ids = 6

[fixed]
stages = 3
downscale = 4
width_0 = 16
width_1 = 32
width_2 = 64
depth_0 = 0
depth_1 = 2
head_width = 8
norm_groups = 4
size_embedding_width = 4

[choices]
resnets_0 = [1, 2]
resnets_1 = [1, 2]
resnets_2 = [1, 2]
depth_2 = [2, 3, 6]
conv_0 = ["full", "separable-1"]

[meanings]
resnets_0 = "units of the first stage"
resnets_1 = "units of the second stage"
resnets_2 = "units of the third stage"
depth_2 = "transformer layers of the third stage"
conv_0 = "convolutions of the first stage"

[[reference]]
name = "koala"
title = "One unit per stage"
source = "none"
choices = { resnets_0 = 1, resnets_1 = 1, resnets_2 = 1, depth_2 = 3, conv_0 = "full" }
"""


@pytest.fixture
def space(tmp_path, monkeypatch):
    (tmp_path / "small_unets.toml").write_text(SPACE)
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "small_unets.toml")


def test_the_command_writes_a_plain_diffusers_folder(space, teacher_file, tmp_path, capsys):
    line = ["inherit", "--space", space, "--reference", "koala", "--teacher", str(teacher_file), "--out", "out"]
    assert main(line) == 0
    said = capsys.readouterr().out
    assert "100.0% of the parameters come from the teacher" in said
    assert "up_blocks.0.resnets.1 from up_blocks.0.resnets.2" in said
    assert "saved as UNet2DConditionModel" in said
    assert said.splitlines()[-2:] == ["wrote out", "next: nas profile --model out"]
    student = load(tmp_path / "out")
    teacher = load(teacher_file).state_dict()
    name = "up_blocks.1.attentions.1.proj_in.weight"
    assert torch.equal(student.state_dict()[name], teacher[name.replace("attentions.1", "attentions.2")])
    # A diffusers folder is a teacher as well.
    again = ["inherit", "--space", space, "--reference", "koala", "--teacher", "out", "--out", "again", "--json"]
    assert main(again) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["format"], data["new"]["tensors"], data["sliced"]["tensors"]) == ("UNet2DConditionModel", 0, 0)


def test_the_command_writes_our_format_where_no_class_fits(space, teacher_file, tmp_path, capsys):
    line = ["inherit", "--space", space, "--reference", "koala", "--candidate", "conv_0=separable-1"]
    assert main([*line, "--teacher", str(teacher_file), "--inherit", "l1", "--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert "new: down_blocks.0.resnets.0, up_blocks.2.resnets.0, up_blocks.2.resnets.1" in said
    assert "saved as nas" in said
    path = re.search(r"next: nas export (.*)", said)[1]
    assert load(tmp_path / path).spec == load((tmp_path / path).parent).spec
    assert main([*line, "--teacher", str(teacher_file), "--inherit", "l2"]) == 2
    assert "known: first, l1" in capsys.readouterr().err
    assert main([*line, "--teacher", "nowhere"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err
