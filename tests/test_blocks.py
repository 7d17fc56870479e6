"""Every block kind: shapes, meta building, gradients, refusals, exports; and closed forms where a block has one."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from nas import registry
from nas.blocks.time_embedding import sinusoid
from nas.blocks.transformer import RMSNorm
from nas.build import build_block
from nas.errors import NasError
from nas.network import block

TRANSFORMER = {
    "channels": 16,
    "depth": 2,
    "head_width": 4,
    "kv_heads": 1,
    "text_width": 12,
    "self_attention": True,
    "cross_attention": True,
    "qk_norm": "rms_norm",
    "ffn_ratio": 3,
    "norm_groups": 4,
}
MAP, TEXT = (16, 4, 6), (5, 12)


def residual(name: str, kind: str, **extra):
    settings = {"in_channels": 24, "out_channels": 16, "time_width": 10, "norm_groups": 4, **extra}
    return block(name, kind, {"x": MAP, "skip": (8, 4, 6), "temb": (10,)}, skip="down", **settings)


# At least one spec of every kind; a kind without one fails the first test.
SPECS = {
    spec.name: (spec, shape)
    for spec, shape in [
        (block("stem", "stem", {"x": (4, 4, 6)}, in_channels=4, out_channels=16), MAP),
        (
            block("time_embedding", "time_embedding", {"timestep": ()}, frequency_width=8, time_width=10),
            (10,),
        ),
        (residual("resnet", "resnet"), MAP),
        (residual("separable-1", "separable", expansion=1), MAP),
        (residual("separable-2", "separable", expansion=2), MAP),
        (block("transformer", "transformer", {"x": MAP, "text": TEXT}, **TRANSFORMER), MAP),
        (
            block(
                "transformer-gqa",
                "transformer",
                {"x": MAP, "text": TEXT},
                **{**TRANSFORMER, "kv_heads": 2, "qk_norm": "none", "self_attention": False},
            ),
            MAP,
        ),
        (
            block(
                "transformer-blind",
                "transformer",
                {"x": MAP},
                **{**TRANSFORMER, "kv_heads": 4, "cross_attention": False, "text_width": 0},
            ),
            MAP,
        ),
        (block("downsample", "downsample", {"x": MAP}, channels=16), (16, 2, 3)),
        (block("downsample-wider", "downsample", {"x": MAP}, channels=16, out_channels=20), (20, 2, 3)),
        (block("upsample", "upsample", {"x": MAP}, channels=16), (16, 8, 12)),
        (block("head", "head", {"x": MAP}, in_channels=16, out_channels=4, norm_groups=4), (4, 4, 6)),
    ]
}
every = pytest.mark.parametrize("name", SPECS)


def inputs(spec, batch=2):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(batch, *shape, generator=generator) for name, shape in spec.inputs}


def test_every_kind_has_a_spec_here():
    assert {spec.kind for spec, _ in SPECS.values()} == set(registry.plugins("nas.blocks"))


@every
def test_shape_and_gradients(name):
    spec, shape = SPECS[name]
    module = build_block(spec)
    given = {key: tensor.requires_grad_() for key, tensor in inputs(spec).items()}
    output = module(**given)
    assert output.shape == (2, *shape)
    (output**2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert all(tensor.grad.abs().sum() > 0 for tensor in given.values())


@every
def test_a_block_made_on_meta_works_once_it_has_weights(name):
    spec, _ = SPECS[name]
    real = build_block(spec).eval()
    with torch.device("meta"):
        late = build_block(spec).eval()
    late.load_state_dict(real.state_dict(), assign=True)
    assert torch.equal(late(**inputs(spec)), real(**inputs(spec)))


@every
def test_the_images_of_a_batch_do_not_mix(name):
    spec, _ = SPECS[name]
    module, given = build_block(spec).eval(), inputs(spec)
    alone = module(**{key: tensor[1:] for key, tensor in given.items()})
    torch.testing.assert_close(module(**given)[1:], alone, rtol=1e-4, atol=1e-5)


@every
def test_torch_export_reproduces_it(name):
    spec, _ = SPECS[name]
    module, given = build_block(spec).eval(), inputs(spec, batch=1)
    program = torch.export.export(module, (), kwargs=given)
    torch.testing.assert_close(program.module()(**given), module(**given))


@every
def test_half_precision_stays_half(name):
    spec, _ = SPECS[name]
    module = build_block(spec).to(torch.bfloat16)
    given = {key: tensor.to(torch.bfloat16) for key, tensor in inputs(spec).items()}
    output = module(**given)
    assert output.dtype == torch.bfloat16
    assert torch.isfinite(output).all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("stem", {"out_channels": 0}, r"stem block: out_channels = 0 .* at least 1"),
        ("resnet", {"norm_groups": 5}, r"norm_groups = 5 .* divisor of in_channels = 24"),
        ("separable-2", {"expansion": 0}, r"expansion = 0"),
        ("time_embedding", {"frequency_width": 7}, r"frequency_width = 7 .* even"),
        ("transformer", {"head_width": 5}, r"head_width = 5 .* divisor of channels = 16"),
        ("transformer", {"kv_heads": 3}, r"kv_heads = 3 .* divisor of the 4 query heads"),
        ("transformer", {"qk_norm": "l2"}, r"qk_norm = 'l2' .* none or rms_norm"),
        ("transformer", {"ffn_ratio": 0}, r"ffn_ratio = 0 .* above 0"),
        ("transformer", {"text_width": 0}, r"text_width = 0"),
        ("downsample", {"out_channels": -1}, r"downsample block: out_channels"),
        ("upsample", {"channels": 0}, r"upsample block: channels = 0"),
        ("head", {"norm_groups": 3}, r"head block: norm_groups = 3"),
    ],
)
def test_a_value_out_of_range_is_named(name, change, message):
    spec, _ = SPECS[name]
    with pytest.raises(NasError, match=message):
        build_block(block(name, spec.kind, dict(spec.inputs), **{**dict(spec.settings), **change}))


def test_the_skip_comes_after_x():
    spec, _ = SPECS["resnet"]
    module, given = build_block(spec), inputs(spec)
    joined = torch.cat([given["x"], given["skip"]], dim=1)
    assert torch.equal(module(**given), module(x=joined, temb=given["temb"]))


def test_a_residual_block_starts_from_its_input():
    spec, _ = SPECS["separable-2"]
    module, given = build_block(spec), inputs(spec)
    torch.nn.init.zeros_(module.conv2.pointwise.weight)
    expected = module.conv_shortcut(torch.cat([given["x"], given["skip"]], dim=1))
    assert torch.equal(module(**given), expected)


def test_the_sinusoid_is_cosines_then_sines_of_falling_frequency():
    got = sinusoid(torch.tensor([0.0, 3.0]), 4)
    expected = [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]
    torch.testing.assert_close(got, torch.tensor([[1.0, 1.0, 0.0, 0.0], expected]))


def test_rms_norm_has_unit_mean_square_and_equals_torchs():
    norm = RMSNorm(64)
    x = 7 * torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(x).pow(2).mean(-1), torch.ones(3), rtol=1e-4, atol=0)
    torch.nn.init.uniform_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (64,), norm.weight, eps=1e-5))


def test_a_shared_key_head_equals_copies_of_it():
    spec, _ = SPECS["transformer"]
    shared = build_block(spec)
    full = build_block(block("full", spec.kind, dict(spec.inputs), **{**TRANSFORMER, "kv_heads": 4}))
    state = {
        key: tensor.repeat(4, 1) if key.endswith(("to_k.weight", "to_v.weight")) else tensor
        for key, tensor in shared.state_dict().items()
    }
    full.load_state_dict(state)
    torch.testing.assert_close(full(**inputs(spec)), shared(**inputs(spec)))


def test_two_key_heads_serve_neighbouring_query_heads():
    spec = block("gqa", "transformer", {"x": MAP, "text": TEXT}, **{**TRANSFORMER, "kv_heads": 2})
    pair = build_block(spec)
    full = build_block(block("full", spec.kind, dict(spec.inputs), **{**TRANSFORMER, "kv_heads": 4}))
    state = {
        key: tensor.unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1)
        if key.endswith(("to_k.weight", "to_v.weight"))
        else tensor
        for key, tensor in pair.state_dict().items()
    }
    full.load_state_dict(state)
    torch.testing.assert_close(full(**inputs(spec)), pair(**inputs(spec)))


def test_cross_attention_without_text_is_an_error():
    spec, _ = SPECS["transformer"]
    with pytest.raises(NasError, match="text"):
        build_block(spec)(x=torch.zeros(1, *MAP))
