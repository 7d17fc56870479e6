"""Our networks against the diffusers classes of the same shape: names, parameters, outputs, counts."""

import math

import pytest
import torch
from diffusers import DreamLiteUNetModel, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from nas import families
from nas.build import build
from nas.checkpoint import from_diffusers_state, load_state, to_diffusers, to_diffusers_state
from nas.families import scaled
from nas.network import Scale
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


def inputs(spec, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = spec.input
    return (
        torch.randn(batch, shape.channels, shape.height, shape.width, generator=generator),
        torch.tensor([3.0, 981.0])[:batch],
        torch.randn(batch, shape.text_tokens, shape.text_width, generator=generator),
    )


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def assert_equal_both_ways(spec, theirs):
    ours = randomised(build(spec))
    given = inputs(spec)
    with torch.no_grad():
        theirs.load_state_dict(to_diffusers_state(ours.state_dict()))
        theirs.eval()
        assert relative(ours(*given), theirs(*given, return_dict=False)[0]) < 1e-4
        randomised(theirs, seed=5)
        fresh = build(spec, "meta")
        load_state(fresh, from_diffusers_state(theirs.state_dict()))
        assert relative(fresh.eval()(*given), theirs(*given, return_dict=False)[0]) < 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"conv_0": "full", "conv_1": "full", "conv_2": "full", "attention": "mha", "qk_norm": "none"},
        {"self_attention_1": True, "self_attention_2": False, "ffn_ratio": 2, "resnets_1": 1, "resnets_2": 3},
        {"up_depth_0": 1, "width_1": 384, "depth_2": 6},
    ],
)
def test_small_networks_equal_dreamlite(space, changes):
    spec = scaled(candidate(space, **changes), SMALL)
    assert_equal_both_ways(spec, DreamLiteUNetModel(**to_diffusers(spec)))


def test_full_convolutions_with_plain_attention_equal_the_stable_diffusion_class(space):
    plain = candidate(
        space,
        conv_0="full",
        conv_1="full",
        conv_2="full",
        depth_0=0,
        depth_1=2,
        depth_2=4,
        self_attention_1=True,
        self_attention_2=True,
        attention="mha",
        qk_norm="none",
        ffn_ratio=4,
    )
    spec = scaled(plain, SMALL)
    theirs = UNet2DConditionModel(
        block_out_channels=(32, 64, 112),
        attention_head_dim=(4, 8, 14),
        transformer_layers_per_block=(1, 2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=40,
        norm_num_groups=8,
        use_linear_projection=True,
    )
    assert_equal_both_ways(spec, theirs)


@pytest.mark.slow
def test_the_reference_is_the_published_network(space):
    spec = families.network(space.reference("snapgen"))
    assert spec.input.height == 128
    with torch.device("meta"):
        theirs = DreamLiteUNetModel(**REFERENCE)
        given = tuple(torch.empty(shape) for shape in ((1, 4, 128, 128), (1,), (1, 77, 2304)))
    ours = build(spec, "meta")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == PARAMS
    shapes = {name: t.shape for name, t in to_diffusers_state(ours.state_dict()).items()}
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
    assert {name: to_diffusers(spec)[name] for name in REFERENCE if name != "layers_per_block"} == {
        name: value for name, value in REFERENCE.items() if name != "layers_per_block"
    }
    theirs = randomised(DreamLiteUNetModel(**REFERENCE))
    ours = build(spec, "meta")
    load_state(ours, from_diffusers_state(theirs.state_dict()))
    generator = torch.Generator().manual_seed(0)
    given = (
        torch.randn(1, 4, 16, 16, generator=generator),
        torch.tensor([500.0]),
        torch.randn(1, 77, 2304, generator=generator),
    )
    with torch.no_grad():
        assert relative(ours.eval()(*given), theirs(*given, return_dict=False)[0]) < 1e-4
