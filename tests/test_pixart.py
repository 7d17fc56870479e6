"""diffusers' PixArtTransformer2DModel and our networks: names, outputs, counts, configurations there and back."""

import json

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from nas import families, formats
from nas.build import build, example_inputs
from nas.checkpoint import load_diffusers, save_diffusers
from nas.errors import NasError, UsageError
from nas.formats import pixart
from nas.network import InputShape, NetworkSpec
from nas.space import load_space
from nas.trace import block_trace

SMALL = {
    "num_attention_heads": 3,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "sample_size": 16,
    "patch_size": 2,
    "caption_channels": 20,
}
CONFIGS = {
    "plain": {},
    "sizes": {"use_additional_conditions": True},
    "stretched": {"interpolation_scale": 2, "sample_size": 32},
    "text of the same width": {"caption_channels": None, "cross_attention_dim": 20},
    "gated": {"activation_fn": "geglu", "out_channels": None, "patch_size": 1},
}
XL = {
    "cross_attention_dim": 1152,
    "sample_size": 64,
    "caption_channels": 4096,
    "use_additional_conditions": False,
}


def spec_of(config, **more):
    return pixart.network(config, name="theirs", where="config.json", text_tokens=5, **more)


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return module.eval()


def both(config, **more):
    """Their network of a configuration, and ours with its weights."""
    theirs = randomised(PixArtTransformer2DModel(**config))
    ours = build(spec_of(config, **more)).eval()
    ours.load_state_dict({pixart.own_name(name): t for name, t in theirs.state_dict().items()})
    return theirs, ours


def call(theirs, inputs):
    sizes = inputs.get("size_ids")
    conditions = {} if sizes is None else {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
    return theirs(
        inputs["sample"],
        encoder_hidden_states=inputs["text"],
        timestep=inputs["timestep"],
        added_cond_kwargs=conditions or None,
    ).sample


@pytest.mark.parametrize("size", [{}, {"height": 24, "width": 12}], ids=["its own size", "another size"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_weights_give_the_same_output(name, size):
    theirs, ours = both({**SMALL, **CONFIGS[name]}, **size)
    inputs = example_inputs(ours.spec, batch=2, generator=torch.Generator().manual_seed(1))
    if "size_ids" in inputs:
        inputs["size_ids"] = torch.tensor([[512.0, 512.0, 1.0], [640.0, 384.0, 1.667]])
    with torch.no_grad():
        expected, got = call(theirs, inputs), ours(**inputs)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_names_go_there_and_back():
    theirs, ours = both({**SMALL, "use_additional_conditions": True})
    assert {pixart.their_name(name) for name in ours.state_dict()} == set(theirs.state_dict())
    for name in theirs.state_dict():
        assert pixart.their_name(pixart.own_name(name)) == name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_survives_the_way_there_and_back(name):
    spec = spec_of({**SMALL, **CONFIGS[name]})
    found = pixart.config(spec)
    assert spec_of(found) == spec
    counted = [sum(p.numel() for p in model.parameters()) for model in (PixArtTransformer2DModel(**found), build(spec))]
    assert counted[0] == counted[1]


def test_the_defaults_are_those_of_the_class():
    with torch.device("meta"):
        theirs = PixArtTransformer2DModel()
        ours = build(pixart.network({}, name="default", where="config.json"))
    assert ours.spec.inputs["size_ids"] == (3,)
    assert {pixart.own_name(n): p.shape for n, p in theirs.named_parameters()} == {
        n: p.shape for n, p in ours.named_parameters()
    }


@pytest.mark.parametrize(("reference", "layers"), [("pixart-sigma-xl", 28), ("koala-dit-m", 14)])
def test_the_references_are_networks_of_the_class(reference, layers):
    ours = families.network(load_space("dit").published(reference))
    config = pixart.config(ours)
    assert {name: config[name] for name in XL} == XL
    with torch.device("meta"):
        theirs = PixArtTransformer2DModel(**config).eval()
        inputs = example_inputs(ours, device="meta")
        with FlopCounterMode(display=False) as counter:
            call(theirs, inputs)
    assert config["num_layers"] == layers
    traces = [block_trace(block) for block in ours.blocks]
    assert sum(t.params for t in traces) == sum(p.numel() for p in theirs.parameters())
    assert sum(t.macs for t in traces) == counter.get_total_flops() / 2


def test_a_file_of_an_older_version_is_read(tmp_path):
    old = {"_class_name": pixart.CLASS, "_diffusers_version": "0.25", "norm_num_groups": 32, "num_vector_embeds": None}
    path = tmp_path / "transformer" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**SMALL, **old}))
    spec = formats.network(*formats.read_config(tmp_path), text_tokens=5)
    assert spec.blocks == spec_of(SMALL).blocks


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"upcast_attention": True}, "upcast_attention = True"),
        ({"attention_bias": False}, "attention_bias = False"),
        ({"norm_type": "ada_norm_zero"}, "norm_type"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine"),
        ({"norm_eps": 1e-5}, "norm_eps"),
        ({"attention_type": "gated"}, "attention_type"),
        ({"activation_fn": "swiglu"}, "activation_fn"),
        ({"cross_attention_dim": 30}, "cross_attention_dim = 30"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm"),
        ({"sample_size": None}, "sample_size"),
        ({"patch_size": 3}, "patch_size = 3 must divide sample_size = 16"),
        ({"use_additional_conditions": True, "attention_head_dim": 4, "num_attention_heads": 4}, "cross_attention_dim"),
        ({"use_additional_conditions": "yes"}, "use_additional_conditions"),
        ({"depth": 2}, "depth"),
    ],
)
def test_what_our_blocks_do_not_have_is_refused_by_file_and_key(change, words):
    with pytest.raises(UsageError, match=words) as caught:
        spec_of({**SMALL, **change})
    assert "config.json" in str(caught.value)


def test_sizes_need_a_width_of_three_parts():
    config = {**SMALL, "num_attention_heads": 4, "cross_attention_dim": 32, "use_additional_conditions": True}
    with pytest.raises(UsageError, match="32 channels are not a multiple of 3"):
        spec_of(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attention": "linear"}, "transformer_blocks.0.*attention = 'linear'"),
        ({"kv_sharing": "mqa"}, "transformer_blocks.0.*kv_heads = 1"),
        ({"ffn_ratio": 3}, "transformer_blocks.0.*ffn_ratio = 3"),
        ({"text": "joint"}, "mmdit_block"),
        ({"stages": 3, "down_depth": 1, "middle_depth": 1, "up_depth": 1}, "transformer_blocks.0"),
    ],
)
def test_what_the_class_cannot_hold_is_refused_by_block_and_setting(change, words):
    settings = {
        "width": 24,
        "heads": 3,
        "patch_size": 2,
        "depth": 2,
        "kv_sharing": "mha",
        "ffn_ratio": 4,
        "attention": "full",
        "text": "cross",
    }
    shape = InputShape(channels=4, height=16, width=16, text_tokens=5, text_width=20)
    spec = families.network_of("dit", {**settings, **change}, shape, name="mine")
    with pytest.raises(NasError, match=words):
        pixart.config(spec)


def test_a_network_with_one_block_changed_is_refused():
    spec = spec_of(SMALL)
    data = spec.to_json()
    data["blocks"][4]["settings"]["ffn_ratio"] = 2
    with pytest.raises(NasError, match=r"'transformer_blocks\.1' has ffn_ratio = 2"):
        pixart.config(NetworkSpec.from_json(data))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_folder_is_the_class_again(name, tmp_path):
    theirs, ours = both({**SMALL, **CONFIGS[name]})
    folder = save_diffusers(tmp_path / "net", ours, "PixArtTransformer2DModel")
    back = PixArtTransformer2DModel.from_pretrained(folder).eval()
    inputs = example_inputs(ours.spec, batch=2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(call(back, inputs), call(theirs, inputs))
        torch.testing.assert_close(load_diffusers(folder)(**inputs), ours(**inputs))
