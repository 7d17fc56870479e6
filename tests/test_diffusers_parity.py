"""Our networks against the diffusers classes: the same outputs both ways through folders, and the same sizes."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DreamLiteUNetModel, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from nas import families
from nas.build import build
from nas.checkpoint import load_diffusers, load_state, save_diffusers
from nas.families import scaled
from nas.formats import dreamlite_unet
from nas.network import NetworkSpec, Scale
from nas.space import load_space
from nas.trace import block_trace, module_trace

REFERENCE = {
    "block_out_channels": (256, 512, 896),
    "attention_head_dim": (4, 8, 14),
    "transformer_layers_per_block": (1, 2, 4),
    "cross_attention_dim": 2304,
    "layers_per_block": 2,
    "ff_mult": 3,
    "use_linear_projection": True,
}
PARAMS = 383_670_276
SMALL = Scale(
    width_divisor=8,
    head_width=8,
    norm_groups=8,
    latent_channels=4,
    height=16,
    width=24,
    text_tokens=7,
    text_width=40,
)


@pytest.fixture(scope="module")
def space():
    return load_space("snapgen_unet")


def candidate(space, **changes):
    base = dict(space.reference("snapgen").choices)
    return space.candidate(**{**base, **changes})


def randomised(module, seed=0):
    """Every parameter drawn away from its default, so that a missing scale, bias or norm shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            spread = 0.5 if p.ndim == 1 else 1 / math.sqrt(p[0].numel())
            centre = 1.0 if ".norm" in name and name.endswith("weight") else 0.0
            p.copy_(torch.randn(p.shape, generator=generator) * spread + centre)
    return module.eval()


def inputs(spec: NetworkSpec, batch=2, seed=1) -> dict[str, torch.Tensor]:
    """What our network is called with; sizes are of the order of image sides."""
    generator = torch.Generator().manual_seed(seed)
    shape = spec.input
    given = {
        "sample": torch.randn(batch, shape.channels, shape.height, shape.width, generator=generator),
        "timestep": torch.tensor([3.0, 981.0])[:batch],
    }
    if shape.text_width:
        given["text"] = torch.randn(batch, shape.text_tokens, shape.text_width, generator=generator)
    if shape.pooled_width:
        given["pooled"] = torch.randn(batch, shape.pooled_width, generator=generator)
        given["size_ids"] = torch.randint(0, 1024, (batch, shape.size_ids), generator=generator).float()
    if shape.guidance_width:
        given["guidance"] = torch.randn(batch, shape.guidance_width, generator=generator)
    return given


def call(theirs, given):
    """The diffusers class, given the inputs of ours."""
    added = {"text_embeds": given["pooled"], "time_ids": given["size_ids"]} if "pooled" in given else None
    return theirs(
        given["sample"],
        given["timestep"],
        timestep_cond=given.get("guidance"),
        encoder_hidden_states=given.get("text"),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


# ------------------------------------------------------------------------------ both ways, through a folder

_BASE = {"sample_size": (16, 24), "norm_num_groups": 8, "block_out_channels": (32, 64, 64), "cross_attention_dim": 40}
_SD_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
_XL = {
    **_BASE,
    "block_out_channels": (32, 48, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 3, 4),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 68,
}
CASES = {
    "sd-1": {**_BASE, **_SD_BLOCKS, "attention_head_dim": 8},
    "sd-2": {
        **_BASE,
        **_SD_BLOCKS,
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "inpainting": {**_BASE, **_SD_BLOCKS, "in_channels": 9, "attention_head_dim": 8},
    "lcm": {**_BASE, **_SD_BLOCKS, "attention_head_dim": 8, "time_cond_proj_dim": 24},
    "bk-sdm-tiny": {
        **_BASE,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "mid_block_type": None,
        "layers_per_block": 1,
    },
    "layers-as-a-list": {**_BASE, **_SD_BLOCKS, "layers_per_block": (2, 1, 3), "norm_eps": 1e-4},
    "sdxl": {**_XL, "transformer_layers_per_block": (1, 2, 3)},
    "koala": {**_XL, "layers_per_block": 1, "transformer_layers_per_block": (1, 2, 3), "mid_block_type": None},
    "ssd-1b": {
        **_XL,
        "transformer_layers_per_block": [1, [2, 1], [2, 2]],
        "reverse_transformer_layers_per_block": [[2, 2, 3], [2, 1, 1], 1],
        "mid_block_type": "UNetMidBlock2D",
    },
    "no-text": {
        **_BASE,
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
        "mid_block_type": "UNetMidBlock2D",
    },
}
_LITE = {
    **_BASE,
    "down_block_types": (
        "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
        "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
        "DreamLiteCrossAttnDownBlock2D",
    ),
    "up_block_types": (
        "DreamLiteCrossAttnUpBlock2D",
        "DreamLiteCrossAttnNoSelfAttnUpBlock2D",
        "DreamLiteUpBlock2D",
    ),
    "attention_head_dim": (4, 8, 8),
    "ff_mult": 3,
    "use_linear_projection": True,
}
LITE_CASES = {
    "snapgen": {**_LITE, "transformer_layers_per_block": (1, 2, 3)},
    "full-convolutions": {**_LITE, "use_sep_conv": False, "num_kv_heads": None, "qk_norm": None},
    "conv-projection": {**_LITE, "use_linear_projection": False, "layers_per_block": (1, 2, 3)},
    "no-middle": {**_LITE, "mid_block_type": None},
    "lcm": {**_LITE, "time_cond_proj_dim": 24},
}
ALL = {
    **{name: (UNet2DConditionModel, config) for name, config in CASES.items()},
    **{f"dreamlite-{name}": (DreamLiteUNetModel, config) for name, config in LITE_CASES.items()},
}


@pytest.mark.parametrize("name", ALL)
def test_outputs_are_those_of_the_class_both_ways(name, tmp_path):
    cls, config = ALL[name]
    theirs = randomised(cls(**config), seed=5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_diffusers(tmp_path / "theirs", text_tokens=7)
    given = inputs(ours.spec)
    with torch.no_grad():
        expected = call(theirs, given)
        assert relative(ours(**given), expected) < 1e-5
    randomised(ours, seed=6)
    save_diffusers(tmp_path / "ours", ours, cls.__name__)
    back = cls.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert relative(call(back, given), ours(**given)) < 1e-5
        # The weights matter: the same inputs with the first weights give something else.
        assert relative(ours(**given), expected) > 1e-2


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"conv_0": "full", "conv_1": "full", "conv_2": "full", "attention": "mha", "qk_norm": "none"},
        {"self_attention_1": True, "self_attention_2": False, "ffn_ratio": 2, "resnets_1": 1, "resnets_2": 3},
        {"up_depth_0": 1, "width_1": 384, "depth_2": 6},
    ],
)
def test_candidates_of_the_snapgen_space_are_dreamlite_networks(space, changes, tmp_path):
    ours = randomised(build(scaled(candidate(space, **changes), SMALL)))
    theirs = DreamLiteUNetModel.from_pretrained(save_diffusers(tmp_path / "net", ours, "DreamLiteUNetModel")).eval()
    given = inputs(ours.spec)
    with torch.no_grad():
        assert relative(call(theirs, given), ours(**given)) < 1e-5


# ------------------------------------------------------------------------------------------ the reference


@pytest.mark.slow
def test_the_reference_is_the_published_network(space):
    spec = families.network(space.reference("snapgen"))
    assert spec.input.height == 128
    with torch.device("meta"):
        theirs = DreamLiteUNetModel(**REFERENCE)
        given = tuple(torch.empty(shape) for shape in ((1, 4, 128, 128), (1,), (1, 77, 2304)))
    ours = build(spec, "meta")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == PARAMS
    shapes = {dreamlite_unet.their_name(name): t.shape for name, t in ours.state_dict().items()}
    assert shapes == {name: t.shape for name, t in theirs.state_dict().items()}
    traces = [block_trace(block) for block in spec.blocks]
    macs = sum(trace.macs for trace in traces)
    assert macs == pytest.approx(658e9, rel=0.005)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        theirs(*given, return_dict=False)
    assert 2 * macs == counter.get_total_flops()
    whole = module_trace(theirs, dict(zip(("sample", "timestep", "encoder_hidden_states"), given, strict=True)))
    assert whole.macs == macs
    assert whole.params == PARAMS == sum(trace.params for trace in traces)


@pytest.mark.slow
def test_the_reference_has_the_outputs_of_the_published_class(space):
    spec = families.network(space.reference("snapgen"))
    assert {name: dreamlite_unet.config(spec)[name] for name in REFERENCE} == REFERENCE
    theirs = randomised(DreamLiteUNetModel(**REFERENCE))
    ours = build(spec, "meta")
    load_state(ours, {dreamlite_unet.own_name(name): t for name, t in theirs.state_dict().items()})
    generator = torch.Generator().manual_seed(0)
    given = (
        torch.randn(1, 4, 16, 16, generator=generator),
        torch.tensor([500.0]),
        torch.randn(1, 77, 2304, generator=generator),
    )
    with torch.no_grad():
        assert relative(ours.eval()(*given), theirs(*given, return_dict=False)[0]) < 1e-4
