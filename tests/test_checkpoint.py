"""Saved networks, damaged files, diffusers names and configurations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from nas import families
from nas.build import build
from nas.checkpoint import (
    from_diffusers_state,
    load_network,
    load_state,
    read_metadata,
    save_network,
    to_diffusers,
    to_diffusers_state,
)
from nas.errors import NasError
from nas.families import scaled
from nas.network import NetworkSpec, Scale, block
from nas.space import load_space

TINY = Scale(
    width_divisor=32,
    head_width=2,
    norm_groups=2,
    latent_channels=3,
    height=8,
    width=8,
    text_tokens=5,
    text_width=6,
)


@pytest.fixture(scope="module")
def space():
    return load_space("snapgen_unet")


@pytest.fixture(scope="module")
def network(space):
    return build(scaled(space.reference("snapgen"), TINY), seed=0).eval()


def inputs():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 3, 8, 8, generator=generator),
        torch.tensor([40.0]),
        torch.randn(1, 5, 6, generator=generator),
    )


def test_a_saved_network_comes_back_with_its_outputs(network, tmp_path):
    path = save_network(tmp_path / "net.safetensors", network, {"steps": 3, "note": "é"})
    back = load_network(path)
    assert back.spec == network.spec
    assert not back.training
    with torch.no_grad():
        assert torch.equal(back(*inputs()), network(*inputs()))
    assert read_metadata(path) == {"steps": 3, "note": "é"}


def test_precision_is_kept(network, tmp_path):
    half = build(network.spec, dtype=torch.float16)
    back = load_network(save_network(tmp_path / "half.safetensors", half))
    assert {p.dtype for p in back.parameters()} == {torch.float16}
    assert read_metadata(tmp_path / "half.safetensors") == {}


def test_a_loaded_network_can_be_trained(network, tmp_path):
    back = load_network(save_network(tmp_path / "net.safetensors", network)).train()
    back(*inputs()).square().sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in back.parameters())


def test_a_missing_file(tmp_path):
    with pytest.raises(NasError, match=r"no weights file at .*absent\.safetensors"):
        load_network(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("keep", [0, 6, 5000])
def test_a_cut_file(network, tmp_path, keep):
    path = save_network(tmp_path / "net.safetensors", network)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(NasError, match=r"net\.safetensors is not a readable safetensors file"):
        load_network(path)


def test_weights_of_something_else(tmp_path):
    save_file({"a": torch.zeros(2)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(NasError, match="no network of nas"):
        load_network(tmp_path / "other.safetensors")


@pytest.mark.parametrize("record", ["{", "[]", '{"name": "x"}'])
def test_a_damaged_record(tmp_path, record):
    save_file({"a": torch.zeros(2)}, str(tmp_path / "bad.safetensors"), metadata={"nas.network": record})
    with pytest.raises(NasError, match="record in the file is damaged"):
        load_network(tmp_path / "bad.safetensors")


def test_weights_that_do_not_fit_are_listed(network):
    state = dict(network.state_dict())
    del state["conv_in.bias"]
    state["stray"] = torch.zeros(1)
    state["head.conv_out.bias"] = torch.zeros(9)
    fresh = build(network.spec, "meta")
    message = r"lacks conv_in.bias; has stray.*; has head.conv_out.bias of shape \(9,\), not \(3,\)"
    with pytest.raises(NasError, match=message):
        load_state(fresh, state)
    with pytest.raises(NasError, match=r"and [0-9]+ more"):
        load_state(fresh, {})


def test_a_read_only_folder(network, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(NasError, match="cannot write"):
        save_network(blocked / "net.safetensors", network)


def test_diffusers_names_there_and_back(network):
    ours = network.state_dict()
    theirs = to_diffusers_state(ours)
    assert {"conv_norm_out.weight", "conv_out.bias", "conv_in.weight"} <= set(theirs)
    assert not any(name.startswith("head.") for name in theirs)
    assert list(from_diffusers_state(theirs)) == list(ours)
    assert all(from_diffusers_state(theirs)[name].data_ptr() == tensor.data_ptr() for name, tensor in ours.items())


def changed(space, **changes):
    return families.network(space.candidate(**{**dict(space.reference("snapgen").choices), **changes}))


def test_the_published_configuration(space):
    config = to_diffusers(changed(space))
    assert config["block_out_channels"] == (256, 512, 896)
    assert config["attention_head_dim"] == (4, 8, 14)
    assert config["transformer_layers_per_block"] == (1, 2, 4)
    assert config["layers_per_block"] == (2, 2, 2)
    assert (config["num_kv_heads"], config["qk_norm"], config["ff_mult"]) == (1, "rms_norm", 3)
    assert config["up_block_types"][-1] == "DreamLiteUpBlock2D"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_1": "separable-1"}, r"'down_blocks.1.resnets.0' has expansion = 1"),
        ({"conv_2": "full"}, r"'down_blocks.2.resnets.0' has kind 'resnet'"),
        ({"attention": "gqa"}, r"'down_blocks.0.attentions.0' has kv_heads = 2"),
        ({"depth_0": 2, "up_depth_0": 1}, r"'up_blocks.2.attentions.0' has depth or number of units"),
    ],
)
def test_what_the_class_cannot_hold_is_named(space, changes, message):
    with pytest.raises(NasError, match=message):
        to_diffusers(changed(space, **changes))


def edited(spec: NetworkSpec, name: str, **settings) -> NetworkSpec:
    blocks = [
        block(b.name, b.kind, dict(b.inputs), skip=b.skip, **{**dict(b.settings), **settings}) if b.name == name else b
        for b in spec.blocks
    ]
    return replace(spec, blocks=tuple(blocks))


@pytest.mark.parametrize(
    "settings",
    [{"cross_attention": False}, {"depth": 3}, {"self_attention": True}, {"qk_norm": "none"}, {"ffn_ratio": 4}],
)
def test_a_single_odd_block_is_named(space, settings):
    name = "down_blocks.1.attentions.1"
    with pytest.raises(NasError, match=f"block '{name}' has {next(iter(settings))} = "):
        to_diffusers(edited(changed(space), name, **settings))


def test_a_broken_ffn_ratio_is_refused_not_rounded(space):
    spec = changed(space)
    for b in spec.blocks:
        if b.kind == "transformer":
            spec = edited(spec, b.name, ffn_ratio=2.5)
    with pytest.raises(NasError, match=r"ffn_ratio = 2\.5"):
        to_diffusers(spec)


def test_something_that_is_no_unet(space):
    spec = changed(space)
    with pytest.raises(NasError, match="not a UNet with a middle"):
        to_diffusers(replace(spec, blocks=spec.blocks[:2]))
