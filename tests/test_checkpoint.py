"""Saved networks of our format, and every way in which a file can be wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from nas.build import build, example_inputs
from nas.checkpoint import (
    load_network,
    load_state,
    read_metadata,
    save,
    save_network,
)
from nas.errors import NasError
from nas.families import scaled
from nas.network import Scale
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


def output(network, seed=0):
    given = example_inputs(network.spec, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return network(**{name: value.to(next(network.parameters()).dtype) for name, value in given.items()})


def test_a_saved_network_comes_back_with_its_outputs(network, tmp_path):
    path = save_network(tmp_path / "net.safetensors", network, {"steps": 3, "note": "é"})
    back = load_network(path)
    assert back.spec == network.spec
    assert not back.training
    assert torch.equal(output(back), output(network))
    assert read_metadata(path) == {"steps": 3, "note": "é"}
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


def test_precision_is_kept(network, tmp_path):
    half = build(network.spec, dtype=torch.float16)
    back = load_network(save_network(tmp_path / "half.safetensors", half))
    assert {p.dtype for p in back.parameters()} == {torch.float16}
    assert read_metadata(tmp_path / "half.safetensors") == {}


def test_a_loaded_network_can_be_trained(network, tmp_path):
    back = load_network(save_network(tmp_path / "net.safetensors", network)).train()
    back(**example_inputs(back.spec)).square().sum().backward()
    assert all(p.requires_grad and p.grad is not None for p in back.parameters())


def test_a_file_of_an_earlier_version_is_still_read(network, tmp_path):
    # Before a block said what it writes, only the time embedding wrote anything but x.
    record = network.spec.to_json()
    for block in record["blocks"]:
        del block["writes"]
    texts = {"nas.network": json.dumps(record), "nas.metadata": "{}"}
    save_file(dict(network.state_dict()), tmp_path / "old.safetensors", metadata=texts)
    assert load_network(tmp_path / "old.safetensors").spec == network.spec


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
    with pytest.raises(NasError, match="cannot write"):
        save(blocked / "net", network)
