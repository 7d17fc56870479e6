"""Tracing: closed forms for MACs and bytes, agreement with torch's counter, the cache, refusals."""

from __future__ import annotations

import multiprocessing
import sqlite3

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from nas import families
from nas.build import build, build_block, example_inputs
from nas.cost import network_peak_bytes
from nas.errors import NasError
from nas.families import scaled
from nas.network import Scale, block
from nas.space import load_space
from nas.trace import _memory as memory
from nas.trace import block_trace, cache, module_trace, trace_block, trace_module

C, H, W, T, D = 16, 4, 6, 5, 12


def transformer(name="t", **changes):
    settings = {
        "channels": C,
        "depth": 1,
        "head_width": 4,
        "kv_heads": 1,
        "text_width": D,
        "self_attention": True,
        "cross_attention": True,
        "qk_norm": "rms_norm",
        "ffn_ratio": 3,
        "norm_groups": 4,
    }
    return block(name, "transformer", {"x": (C, H, W), "text": (T, D)}, **{**settings, **changes})


def total(ops, kind, field="macs"):
    return sum(getattr(op, field) for op in ops if op.kind == kind)


def on_meta(make):
    with torch.device("meta"):
        return make()


def test_a_transformer_by_hand():
    """Hand count of one layer: C=16, 24 pixels, 5 text tokens of width 12, one key head of width 4."""
    ops, pixels, kv = trace_block(transformer()), H * W, 4
    per_pixel = 2 * C * C  # proj_in, proj_out
    per_pixel += 2 * (2 * C * C)  # to_q and to_out of both attentions
    per_pixel += 2 * C * kv  # self-attention's keys and values
    per_pixel += C * (2 * 3 * C) + 3 * C * C  # GEGLU
    assert total(ops, "linear") == pixels * per_pixel + T * 2 * D * kv
    assert total(ops, "attention") == 2 * pixels * pixels * C + 2 * pixels * T * C
    assert [op.shape for op in ops if op.kind == "softmax"] == [(1, 4, pixels, pixels), (1, 4, pixels, T)]
    scores = 4 * 4 * pixels * (pixels + T)
    assert total(ops, "softmax", "read_bytes") == total(ops, "softmax", "written_bytes") == scores


def test_leaving_self_attention_out_leaves_its_matmuls_out():
    full, without = trace_block(transformer()), trace_block(transformer(self_attention=False))
    pixels = H * W
    assert total(full, "attention") - total(without, "attention") == 2 * pixels * pixels * C
    assert total(full, "linear") - total(without, "linear") == pixels * (2 * C * C + 2 * C * 4)


def test_convolutions_by_hand_and_by_kind():
    shapes = {"x": (C, H, W), "temb": (10,)}
    ops = trace_block(
        block("s", "separable", shapes, in_channels=C, out_channels=8, time_width=10, norm_groups=4, expansion=2)
    )
    pixels = H * W
    assert total(ops, "depthwise") == 9 * pixels * (C + 16)
    assert total(ops, "pointwise") == pixels * (C * 16 + 16 * 8 + C * 8)
    assert total(ops, "conv") == 0
    full = trace_block(block("r", "resnet", shapes, in_channels=C, out_channels=8, time_width=10, norm_groups=4))
    assert total(full, "conv") == 9 * pixels * (C * 8 + 8 * 8)
    assert total(full, "pointwise") == pixels * C * 8


def test_bytes_of_one_convolution():
    (op,) = trace_block(block("d", "downsample", {"x": (C, H, W)}, channels=C))
    assert op.kind == "conv"
    assert op.macs == 9 * C * C * H * W // 4
    assert op.weight_bytes == 4 * (9 * C * C + C)
    assert op.read_bytes == 4 * C * H * W
    assert op.written_bytes == 4 * C * H * W // 4
    assert op.shape == (1, C, H // 2, W // 2)


def test_layout_copies_are_seen_and_views_are_not():
    ops = trace_block(transformer(depth=1))
    layout = [op for op in ops if op.kind == "layout"]
    assert layout
    assert all(op.read_bytes == op.written_bytes for op in layout)
    assert all(op.macs == 0 for op in layout)
    assert module_trace(on_meta(nn.Flatten), {"input": torch.empty(2, 3, 4)}).ops == ()


def test_a_broadcast_operand_counts_once():
    ops = trace_block(transformer())
    attention = [op for op in ops if op.kind == "attention"]
    pixels = H * W
    # Queries of four heads, but keys of one: the copies of the single key head are views.
    assert attention[0].read_bytes == 4 * (pixels * C + pixels * 4)


def test_a_batch_scales_activations_and_macs_but_not_weights():
    one, two = trace_block(transformer()), trace_block(transformer(), batch=2)
    assert sum(op.macs for op in two) == 2 * sum(op.macs for op in one)
    assert sum(op.weight_bytes for op in two) == sum(op.weight_bytes for op in one)
    assert block_trace(transformer(), 2).peak_bytes == 2 * block_trace(transformer()).peak_bytes


@pytest.mark.parametrize("attention", ["mqa", "gqa", "mha"])
def test_networks_agree_with_torchs_counter_exactly(attention):
    space = load_space("snapgen_unet")
    scale = Scale(
        width_divisor=8,
        head_width=8,
        norm_groups=8,
        latent_channels=4,
        height=16,
        width=8,
        text_tokens=7,
        text_width=24,
    )
    choices = {"attention": attention, "conv_1": "full", "self_attention_1": True, "depth_1": 1, "depth_2": 1}
    spec = scaled(space.candidate(**{**dict(space.reference("snapgen").choices), **choices}), scale)
    network = build(spec, "meta")
    given = {
        "sample": torch.empty(1, 4, 16, 8, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "text": torch.empty(1, 7, 24, device="meta"),
    }
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(**given)
    traces = [block_trace(b) for b in spec.blocks]
    assert 2 * sum(t.macs for t in traces) == counter.get_total_flops()
    whole = module_trace(network, given)
    assert whole.macs == sum(t.macs for t in traces)
    assert sum(op.weight_bytes for op in whole.ops) == 4 * sum(t.params for t in traces)
    assert whole.params == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("space", "reference"),
    [("sdxl_unet", "koala-700m"), ("sdxl_unet", "ssd-1b"), ("sd_unet", "sd-v1.5"), ("sd_unet", "bk-sdm-tiny")],
)
def test_published_networks_agree_with_torchs_counter_and_with_the_whole_pass(space, reference):
    """Exact MACs of one call at 512 px; the peak put together from blocks is that of one trace of the whole network."""
    spec = families.network(load_space(space).at_resolution(512).reference(reference))
    network, given = build(spec, "meta"), example_inputs(spec, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(**given)
    traces = [block_trace(b) for b in spec.blocks]
    assert 2 * sum(t.macs for t in traces) == counter.get_total_flops()
    published = dict(load_space(space).find_reference(reference).gmacs)
    assert round(sum(t.macs for t in traces) / 1e9, 3) == published["512"]
    whole = module_trace(network, given)
    assert whole.params == sum(t.params for t in traces)
    # The whole pass also holds the conditions while blocks run that do not read them: under 1 MB.
    missing = whole.peak_bytes - network_peak_bytes(spec.blocks, [t.peak_bytes for t in traces])
    assert 0 < missing < 1e6


def test_every_parameter_is_read_exactly_once():
    for spec in families.network(load_space("snapgen_unet").reference("snapgen")).blocks[:6]:
        trace = block_trace(spec)
        assert trace.params == sum(p.numel() for p in build_block(spec).parameters())
        assert sum(op.weight_bytes for op in trace.ops) == 4 * trace.params


class Chain(nn.Module):
    """Three buffers of one size after the input: the input, one intermediate and one result alive at once."""

    def forward(self, x):
        return F.silu(F.silu(F.silu(x)))


class Fork(nn.Module):
    """The first result is needed at the end: one buffer more than in Chain."""

    def forward(self, x):
        first = F.silu(x)
        return first + F.silu(F.silu(first))


@pytest.mark.parametrize(("module", "buffers"), [(Chain(), 3), (Fork(), 4), (nn.Identity(), 1)])
def test_peak_by_hand(module, buffers):
    argument = "input" if isinstance(module, nn.Identity) else "x"
    assert module_trace(module, {argument: torch.empty(100)}).peak_bytes == buffers * 400


def test_the_peak_holds_inputs_and_ignores_weights():
    trace = module_trace(on_meta(lambda: nn.Linear(10, 1000)), {"input": torch.empty(1, 10)})
    assert trace.peak_bytes == 4 * (10 + 1000)


def test_unfused_and_fused_attention_count_alike():
    class Fused(nn.Module):
        def forward(self, q, k):
            return F.scaled_dot_product_attention(q, k, k)

    class Written(nn.Module):
        def forward(self, q, k):
            return torch.softmax(torch.bmm(q[0], k[0].transpose(1, 2)), dim=-1) @ k[0]

    given = {"q": torch.empty(1, 2, 6, 4), "k": torch.empty(1, 2, 5, 4)}
    fused, written = trace_module(Fused(), given), trace_module(Written(), given)
    assert total(fused, "attention") == total(written, "attention") == 2 * 2 * 6 * 5 * 4
    assert [op.kind for op in fused] == ["attention", "softmax", "attention"]


def test_a_transposed_convolution_by_hand():
    module = on_meta(lambda: nn.ConvTranspose2d(3, 5, kernel_size=2, stride=2, bias=False))
    (op,) = trace_module(module, {"input": torch.empty(1, 3, 4, 4)})
    assert (op.kind, op.macs) == ("conv", 16 * 3 * 5 * 4)


def test_an_unknown_operator_is_named_and_not_counted_as_nothing():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.erfinv(x)

    with pytest.raises(NasError, match=r"Odd: operator aten\.erfinv is in no group"):
        trace_module(Odd(), {"x": torch.empty(3)})


def test_a_module_with_data_is_refused():
    with pytest.raises(NasError, match="meta"):
        trace_module(nn.Linear(2, 2), {"input": torch.empty(1, 2)})


def test_training_mode_is_put_back():
    module = on_meta(lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))
    assert len(trace_module(module, {"input": torch.empty(1, 2)})) == 1
    assert module.training


def test_published_parts_of_a_pipeline_can_be_traced():
    from diffusers import AutoencoderTiny
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        decoder = AutoencoderTiny().decoder
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2))
    decoded = module_trace(decoder, {"x": torch.empty(1, 4, 128, 128)})
    assert decoded.params == sum(p.numel() for p in decoder.parameters())
    assert decoded.macs == pytest.approx(283e9, rel=0.01)  # reference/snapgen.md section 2: TAESD at 128x128
    encoded = module_trace(encoder, {"input_ids": torch.zeros(1, 77, dtype=torch.long)})
    assert total(encoded.ops, "attention") == 2 * 2 * 77 * 77 * 64
    tables = [op.weight_bytes for op in encoded.ops if op.kind == "lookup" and op.weight_bytes]
    assert tables == [4 * 77 * 64, 4 * 77 * 64], "only the rows that are looked up are read"


# The cache


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("NAS_CACHE", str(tmp_path))
    memory.clear()
    yield tmp_path
    memory.clear()


def test_a_trace_is_read_back_equal_and_not_made_again(fresh, monkeypatch):
    made = block_trace(transformer())
    memory.clear()
    monkeypatch.setattr("nas.trace.build_block", lambda spec: pytest.fail("traced again"))
    assert block_trace(transformer()) == made
    assert block_trace(transformer(name="elsewhere")) is block_trace(transformer())
    assert [path.name for path in fresh.iterdir()] == ["traces.sqlite3"]


def test_batches_are_kept_apart(fresh):
    one = block_trace(transformer())
    memory.clear()
    assert block_trace(transformer(), 2) != one


def test_other_code_never_meets_an_old_trace(fresh, monkeypatch):
    block_trace(transformer())
    assert cache.load(transformer(), 1) is not None
    monkeypatch.setattr(cache, "code_hash", lambda kind: "another version")
    assert cache.load(transformer(), 1) is None


def test_a_damaged_cache_is_made_anew(fresh):
    expected = block_trace(transformer())
    memory.clear()
    cache.path().write_bytes(b"not a database" * 100)
    assert block_trace(transformer()) == expected
    memory.clear()
    assert block_trace(transformer()) == expected
    with sqlite3.connect(cache.path()) as connection:
        assert connection.execute("SELECT count(*) FROM traces").fetchone() == (1,)
    connection.close()


def _store_many(trace, start):
    for width in range(start, start + 25):
        cache.store(block("d", "downsample", {"x": (width, 4, 4)}, channels=width), 1, trace)


def test_processes_may_write_at_once(fresh):
    trace = block_trace(transformer())
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_store_many, args=(trace, 1 + 25 * i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    found = [cache.load(block("d", "downsample", {"x": (w, 4, 4)}, channels=w), 1) for w in range(1, 76)]
    assert found == [trace] * 75
