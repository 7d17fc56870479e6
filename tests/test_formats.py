"""Configurations of diffusers classes: read, written, refused; sizes against diffusers' own classes."""

from __future__ import annotations

import functools
import inspect
import json

import diffusers
import pytest
import torch
from format_cases import DREAMLITE, UNET

from nas import formats
from nas.build import build
from nas.errors import UsageError
from nas.network import NetworkSpec

VAE = {
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 8,
}
TINY_VAE = {
    "encoder_block_out_channels": [16, 16],
    "decoder_block_out_channels": [16, 16],
    "num_encoder_blocks": [1, 2],
    "num_decoder_blocks": [2, 1],
}
PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "caption_channels": 24,
    "sample_size": 16,
}
# A small network of every class; a new class needs one.
SMALL = {
    "UNet2DConditionModel": UNET,
    "DreamLiteUNetModel": DREAMLITE,
    "AutoencoderKL": VAE,
    "AutoencoderTiny": TINY_VAE,
    "PixArtTransformer2DModel": PIXART,
}
CLASSES = sorted(formats.classes())


@functools.cache
def _sample(name: str) -> str:
    with torch.device("meta"):
        return getattr(diffusers, name)(**SMALL[name]).to_json_string()


def sample(name: str) -> dict:
    """A full configuration, as diffusers writes it."""
    return json.loads(_sample(name))


@functools.cache
def sample_network(name: str) -> NetworkSpec:
    return read(sample(name))


def read(config: dict, **options) -> NetworkSpec:
    return formats.network(config, "unet/config.json", **{"height": 16, "width": 16, **options})


# -------------------------------------------------------------------------------------------- every class


@pytest.mark.parametrize("name", CLASSES)
def test_a_format_has_its_contract(name):
    module = formats.find(name, "here")
    assert name == module.CLASS
    assert isinstance(module.FAMILY, str)
    assert {"config", "name", "where", "height", "width", "text_tokens"} <= set(
        inspect.signature(module.network).parameters
    )


@pytest.mark.parametrize("name", CLASSES)
def test_configuration_to_network_and_back_is_stable(name):
    module = formats.find(name, "here")
    spec = read(sample(name))
    config = module.config(spec)
    assert set(config) <= set(inspect.signature(getattr(diffusers, name).__init__).parameters)
    assert read({"_class_name": name, **json.loads(json.dumps(config))}) == spec
    assert formats.holding(spec, name) == (module, config)


@pytest.mark.parametrize("name", CLASSES)
def test_tensor_names_are_those_of_the_class(name):
    module = formats.find(name, "here")
    with torch.device("meta"):
        made = getattr(diffusers, name)(**SMALL[name])
        rewritten = getattr(diffusers, name)(**module.config(sample_network(name))).state_dict()
    theirs = {key: t.shape for key, t in made.state_dict().items()}
    ours = {key: t.shape for key, t in build(sample_network(name), "meta").state_dict().items()}
    assert {module.own_name(key): shape for key, shape in theirs.items() if module.own_name(key) is not None} == ours
    assert all(module.own_name(module.their_name(key)) == key for key in ours)
    # The configuration that we write makes the same tensors.
    assert {key: shape for key, shape in theirs.items() if module.own_name(key)} == {
        key: t.shape for key, t in rewritten.items() if module.own_name(key)
    }


def keys_of(name: str) -> list[str]:
    return [key for key in inspect.signature(getattr(diffusers, name).__init__).parameters if key != "self"]


def trouble(name: str, key: str, value: object) -> str:
    """What is wrong with how a value nobody uses is taken: it must be refused by key and file, or change nothing."""
    config = sample(name)
    if config.get(key) == value:
        return ""
    try:
        changed = read({**config, key: value})
    except UsageError as error:
        named = key in error.message and "unet/config.json" in error.message
        return "" if named and "unknown key" not in error.message else error.message
    return "" if changed == sample_network(name) else "taken without a word"


@pytest.mark.parametrize("value", ["nonsense", -3, [[]]], ids=["word", "negative", "list"])
@pytest.mark.parametrize("name", CLASSES)
def test_every_key_is_read_refused_by_name_or_without_bearing(name, value):
    found = {key: trouble(name, key, value) for key in keys_of(name)}
    assert {key: problem for key, problem in found.items() if problem} == {}


@pytest.mark.parametrize("name", CLASSES)
def test_notes_are_passed_over_and_unknown_keys_are_named(name):
    config = sample(name)
    assert read({**config, "_name_or_path": "elsewhere", "_use_default_values": []}) == read(config)
    with pytest.raises(UsageError, match=rf"unknown key of {name} 'in_chanels' in unet/config\.json; did you mean"):
        read({**config, "in_chanels": 4})


# -------------------------------------------------------------------------------------------------- finding


def test_a_class_that_is_missing_or_unknown():
    with pytest.raises(UsageError, match=r"unet/config\.json has no '_class_name'; .*UNet2DConditionModel"):
        read({"in_channels": 4})
    with pytest.raises(UsageError, match=r"unknown '_class_name' 'UNet3DConditionModel' in unet/config\.json; did you"):
        read({"_class_name": "UNet3DConditionModel"})
    with pytest.raises(UsageError, match=r"unknown '_class_name' '\[\]' in unet/config\.json"):
        read({"_class_name": []})


def test_a_configuration_is_found_in_a_file_a_folder_and_a_pipeline(tmp_path):
    unet = tmp_path / "unet"
    unet.mkdir()
    (unet / "config.json").write_text('{"a": 1}')
    for path in (tmp_path, unet, unet / "config.json"):
        assert formats.read_config(path) == ({"a": 1}, str(unet / "config.json"))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"b": 2}')
    assert formats.read_config(tmp_path, "vae")[0] == {"b": 2}
    with pytest.raises(UsageError, match=r"looked for .*text/config\.json"):
        formats.read_config(tmp_path, "text")


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object, got a list")])
def test_a_configuration_that_is_none(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=rf"config\.json {message}"):
        formats.read_config(tmp_path)


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(UsageError, match=r"unet/config\.json, .*transformer/config\.json"):
        formats.read_config(tmp_path)
