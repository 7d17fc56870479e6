"""Every block kind: shapes, meta building, gradients, refusals, exports; and closed forms where a block has one."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from nas import registry
from nas.blocks.time_embedding import sinusoid
from nas.blocks.transformer import RMSNorm, rotate, rotation
from nas.build import build_block
from nas.errors import NasError
from nas.network import block
from nas.trace import block_trace
from tests.block_specs import MAP, SPECS, TEXT, TRANSFORMER

every = pytest.mark.parametrize("name", SPECS)


def inputs(spec, batch=2):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(batch, *shape, generator=generator) for name, shape in spec.inputs}


def outputs(module, **given):
    """What a block writes, as a tuple whether it is one tensor or several."""
    output = module(**given)
    return output if isinstance(output, tuple) else (output,)


def test_every_kind_has_a_spec():
    assert {spec.kind for spec, _ in SPECS.values()} == set(registry.plugins("nas.blocks"))


@every
def test_shape_and_gradients(name):
    spec, shapes = SPECS[name]
    module = build_block(spec)
    given = {key: tensor.requires_grad_() for key, tensor in inputs(spec).items()}
    got = outputs(module, **given)
    assert [tuple(output.shape) for output in got] == [(2, *shape) for shape in shapes]
    assert len(got) == len(spec.writes)
    sum((output**2).sum() for output in got).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert all(tensor.grad.abs().sum() > 0 for tensor in given.values())


@every
def test_a_block_made_on_meta_works_once_it_has_weights(name):
    spec, _ = SPECS[name]
    real = build_block(spec).eval()
    with torch.device("meta"):
        late = build_block(spec).eval()
    late.load_state_dict(real.state_dict(), assign=True)
    assert not list(late.buffers())
    torch.testing.assert_close(outputs(late, **inputs(spec)), outputs(real, **inputs(spec)), rtol=0, atol=0)


@every
def test_the_images_of_a_batch_do_not_mix(name):
    spec, _ = SPECS[name]
    module, given = build_block(spec).eval(), inputs(spec)
    alone = outputs(module, **{key: tensor[1:] for key, tensor in given.items()})
    together = tuple(output[1:] for output in outputs(module, **given))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@every
def test_torch_export_reproduces_it(name):
    spec, _ = SPECS[name]
    module, given = build_block(spec).eval(), inputs(spec, batch=1)
    program = torch.export.export(module, (), kwargs=given)
    torch.testing.assert_close(outputs(program.module(), **given), outputs(module, **given))


@every
def test_half_precision_stays_half(name):
    spec, _ = SPECS[name]
    module = build_block(spec).to(torch.bfloat16)
    for output in outputs(module, **{key: tensor.to(torch.bfloat16) for key, tensor in inputs(spec).items()}):
        assert output.dtype == torch.bfloat16
        assert torch.isfinite(output).all()


@every
def test_it_is_traced_with_its_parameters(name):
    spec, _ = SPECS[name]
    assert block_trace(spec).params == sum(p.numel() for p in build_block(spec).parameters())


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
        ("transformer", {"projection": "pointwise"}, r"projection = 'pointwise' .* linear or conv"),
        ("transformer-rope", {"head_width": 2}, r"head_width = 2 .* multiple of 4 with rope"),
        ("text_time", {"size_embedding_width": 5}, r"text_time block: size_embedding_width = 5 .* even"),
        ("text_time", {"pooled_width": 0}, r"text_time block: pooled_width = 0"),
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


def test_convolutions_in_and_out_equal_linear_layers():
    linear, given = build_block(SPECS["transformer"][0]), inputs(SPECS["transformer"][0])
    conv = build_block(SPECS["transformer-conv"][0])
    state = {
        key: tensor[:, :, None, None] if key in ("proj_in.weight", "proj_out.weight") else tensor
        for key, tensor in linear.state_dict().items()
    }
    conv.load_state_dict(state)
    torch.testing.assert_close(conv(**given), linear(**given))


def test_rotated_scores_depend_on_the_offset_of_two_pixels_alone():
    height, width, head_width = 5, 6, 8
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, head_width, generator=generator)
    turn = rotation(height, width, head_width, query)
    turned = [
        rotate(state.expand(1, height * width, 1, -1), turn).reshape(height, width, head_width)
        for state in (query, key)
    ]
    scores = torch.einsum("abc,dec->abde", *turned)
    for down, right in ((1, 0), (0, 1), (2, 3)):
        here = scores[: height - down, : width - right, : height - down, : width - right]
        torch.testing.assert_close(here, scores[down:, right:, down:, right:], rtol=1e-4, atol=1e-5)
    # The same offset along the other axis is another one, and turning keeps lengths.
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3
    torch.testing.assert_close(turned[0].norm(dim=-1), query.norm().expand(height, width))


def test_a_rotation_by_hand():
    # The last of 2x3 pixels, heads of width 8: two frequencies, 1 and 1/100, for its row and for its column.
    cos, sin = rotation(2, 3, 8, torch.zeros(1))
    angle = torch.tensor([1.0, 0.01, 2.0, 0.02])
    torch.testing.assert_close(cos[-1, 0], angle.cos())
    torch.testing.assert_close(sin[-1, 0], angle.sin())
    torch.testing.assert_close(cos[0, 0], torch.ones(4))
    got = rotate(torch.arange(8.0).reshape(1, 1, 1, 8).expand(1, 6, 1, 8), (cos, sin))[0, -1, 0]
    torch.testing.assert_close(got[1], 1 * angle[1].cos() - 5 * angle[1].sin())
    torch.testing.assert_close(got[5], 5 * angle[1].cos() + 1 * angle[1].sin())


def _moved(module, given):
    """The output for mirrored pixels, mirrored back."""
    return module(**{**given, "x": given["x"].flip(2, 3)}).flip(2, 3)


def test_only_rotary_transformers_know_where_a_pixel_lies():
    plain_spec, rope_spec = SPECS["transformer"][0], SPECS["transformer-rope"][0]
    plain, rope, given = build_block(plain_spec), build_block(rope_spec), inputs(plain_spec)
    rope.load_state_dict(plain.state_dict())
    off = build_block(block("off", "transformer", dict(plain_spec.inputs), **TRANSFORMER, rope=False))
    off.load_state_dict(plain.state_dict())
    assert torch.equal(off(**given), plain(**given))
    torch.testing.assert_close(_moved(plain, given), plain(**given))
    assert not torch.allclose(rope(**given), plain(**given), atol=1e-4)
    assert not torch.allclose(_moved(rope, given), rope(**given), atol=1e-4)


def test_cross_attention_is_never_rotated():
    blind = {**TRANSFORMER, "self_attention": False}
    one = build_block(block("one", "transformer", {"x": MAP, "text": TEXT}, **blind, rope=True))
    other = build_block(block("other", "transformer", {"x": MAP, "text": TEXT}, **blind))
    other.load_state_dict(one.state_dict())
    given = inputs(SPECS["transformer"][0])
    assert torch.equal(one(**given), other(**given))


def test_added_conditions_are_the_summary_then_each_sizes_sinusoid():
    spec, _ = SPECS["text_time"]
    module = build_block(spec)
    given = {**inputs(spec), "size_ids": torch.tensor([[1024.0, 0.0, 512.0], [7.0, 640.0, 3.0]])}
    sizes = torch.stack([sinusoid(row, 4).flatten() for row in given["size_ids"]])
    features = torch.cat([given["pooled"], sizes], dim=1)
    expected = given["temb"] + module.linear_2(F.silu(module.linear_1(features)))
    torch.testing.assert_close(module(**given), expected)


# `verify` compares one output: blocks that write several are left to the tests of their family.
@pytest.mark.parametrize("name", [name for name, (spec, _) in SPECS.items() if len(spec.writes) == 1])
def test_onnx_reproduces_it(name, tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = registry.load("nas.exporters", "onnx")
    spec, _ = SPECS[name]
    module, given = build_block(spec), inputs(spec, batch=1)
    assert onnx.verify(onnx.export(module, given, tmp_path / "block.onnx"), module, given) < 1e-5


def test_rotary_positions_and_convolutions_change_no_macs():
    macs = {name: block_trace(spec).macs for name, (spec, _) in SPECS.items() if name.startswith("transformer")}
    assert macs["transformer-rope"] == macs["transformer-conv"] == macs["transformer"]
