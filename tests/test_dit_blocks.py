"""Blocks of diffusion transformers: positions, every kind of attention, the joint block of diffusers, merged tokens."""

import pytest
import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch.nn import functional as F

from nas.blocks import dit_block, mmdit_block, patch_embedding, token_merge, token_split
from nas.blocks._attention import KINDS, Attention, Form, linear_attention
from nas.errors import NasError


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return module.eval()


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(kind, *, kv_heads=4, window=4, side=8):
    form = Form(width=32, heads=4, kv_heads=kv_heads, kind=kind, rows=side, columns=side, window=window)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomised(Attention(form, 32))


def test_positions_are_those_of_diffusers():
    for rows, columns, base, scale in ((8, 8, 8, 1.0), (6, 10, 8, 2.0), (16, 16, 64, 1.5)):
        settings = patch_embedding.Settings(
            in_channels=1, width=48, patch_size=2, base_size=base, interpolation_scale=scale
        )
        module = patch_embedding.Block(settings)
        torch.nn.init.zeros_(module.proj.weight)
        torch.nn.init.zeros_(module.proj.bias)
        expected = get_2d_sincos_pos_embed(48, (rows, columns), base_size=base, interpolation_scale=scale)
        got = module(torch.zeros(1, 1, 2 * rows, 2 * columns))[0]
        assert (got - expected).abs().max() < 1e-6


def test_linear_attention_is_the_normalised_sum_over_keys():
    query, key, value = drawn(2, 4, 10, 8, seed=1), drawn(2, 2, 7, 8, seed=2), drawn(2, 2, 7, 8, seed=3)
    spread = [states.repeat_interleave(2, dim=1) for states in (key, value)]
    weights = F.relu(query) @ F.relu(spread[0]).transpose(-1, -2)
    # A query that no key answers reads nothing.
    expected = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9) @ spread[1]
    assert torch.allclose(linear_attention(query, key, value), expected, atol=1e-5)


@pytest.mark.parametrize("window", [8, 16])
def test_one_window_over_the_whole_grid_is_full_attention(window):
    whole, windowed = attention("full"), attention("window", window=window)
    windowed.load_state_dict(whole.state_dict())
    tokens = drawn(2, 64, 32)
    assert torch.allclose(whole(tokens, tokens), windowed(tokens, tokens), atol=1e-5)


def test_a_window_sees_its_own_tokens_only():
    module, tokens = attention("window"), drawn(1, 64, 32)
    other = tokens.clone()
    other[:, 7] += 1  # the end of the first row: in the second window of 4x4
    changed = (module(other, other) - module(tokens, tokens)).abs().amax(-1).reshape(8, 8) > 1e-6
    assert changed[:4, 4:].all()
    assert not changed[:, :4].any()
    assert not changed[4:].any()


def test_a_window_divides_the_grid():
    form = Form(width=32, heads=4, kv_heads=4, kind="window", rows=24, columns=10, window=16)
    assert form.window_sides == (12, 10)
    tokens = drawn(1, 240, 32)
    assert randomised(Attention(form, 32))(tokens, tokens).shape == (1, 240, 32)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_compressed_keys_are_means_of_2x2_tokens_at_first(kv_heads):
    form = Form(width=32, heads=4, kv_heads=kv_heads, kind="kv-compressed", rows=8, columns=8)
    module, tokens = Attention(form, 32), drawn(2, 64, 32)
    found = module.sources(module.to_k(tokens), module.to_v(tokens), None)
    width = kv_heads * 8
    means = module.to_k(tokens).reshape(2, 4, 2, 4, 2, width).mean((2, 4)).reshape(2, 16, width)
    expected = module.norm(means).reshape(2, 16, kv_heads, 8).transpose(1, 2)
    assert [tuple(states.shape) for states in found] == [(2, kv_heads, 16, 8)] * 2
    assert torch.allclose(found[0], expected, atol=1e-5)


def test_the_gate_of_sparse_attention_chooses_between_its_parts():
    module, tokens = attention("sparse"), drawn(2, 64, 32)
    for kind, bias in (("kv-compressed", 100.0), ("window", -100.0)):
        with torch.no_grad():
            module.gate.bias.fill_(bias)
        alone = attention(kind)
        alone.load_state_dict({name: module.state_dict()[name] for name in alone.state_dict()})
        assert torch.allclose(module(tokens, tokens), alone(tokens, tokens), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_key_head_is_the_same_head_for_all(kind):
    shared, own, tokens = attention(kind, kv_heads=1), attention(kind), drawn(2, 64, 32)
    if kind in ("kv-compressed", "sparse"):
        # One norm over all heads is another norm over one: leave the means as they are.
        shared.norm, own.norm = torch.nn.Identity(), torch.nn.Identity()
    state = shared.state_dict()
    own.load_state_dict(
        {
            name: state[name].repeat(4, *[1] * (p.ndim - 1)) if p.shape != state[name].shape else state[name]
            for name, p in own.state_dict().items()
        }
    )
    assert torch.allclose(shared(tokens, tokens), own(tokens, tokens), atol=1e-5)


@pytest.mark.parametrize("updates_text", [True, False])
def test_the_joint_block_is_that_of_stable_diffusion_3(updates_text):
    theirs = randomised(JointTransformerBlock(32, 4, 8, context_pre_only=not updates_text))
    ours = mmdit_block.Block(
        mmdit_block.Settings(width=32, heads=4, kv_heads=4, ffn_ratio=4, updates_text=updates_text)
    )
    ours.load_state_dict(theirs.state_dict())
    x, text, temb = drawn(2, 16, 32), drawn(2, 5, 32, seed=2), drawn(2, 32, seed=3)
    expected_text, expected = theirs(x, text, temb)
    got = ours(x, temb, text)
    got, got_text = got if updates_text else (got, None)
    assert torch.allclose(got, expected, atol=1e-5)
    assert (got_text is None) == (expected_text is None)
    if got_text is not None:
        assert torch.allclose(got_text, expected_text, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_joint_text_sees_the_whole_image_and_the_image_all_text(kind):
    settings = mmdit_block.Settings(
        width=32, heads=4, kv_heads=2, ffn_ratio=2, attention=kind, rows=8, columns=8, window=4
    )
    module = randomised(mmdit_block.Block(settings))
    x, text, temb = drawn(1, 64, 32), drawn(1, 5, 32, seed=2), drawn(1, 32, seed=3)
    before = module(x=x, temb=temb, text=text)
    corner, word = x.clone(), text.clone()
    corner[:, 63] = drawn(32, seed=4)
    word[:, 4] = drawn(32, seed=5)
    text_change = (module(x=corner, temb=temb, text=text)[1] - before[1]).abs().amax(-1)
    image_change = (module(x=x, temb=temb, text=word)[0] - before[0]).abs().amax(-1)
    assert text_change.min() > 1e-6
    assert image_change.min() > 1e-6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "heads = 5"),
        ({"kv_heads": 3}, "kv_heads = 3"),
        ({"attention": "near"}, "attention = 'near'"),
        ({"attention": "window", "rows": 6, "columns": 8}, "window = 0"),
        ({"attention": "kv-compressed", "rows": 4, "columns": 3}, "columns = 3"),
        ({"attention": "window", "window": 4}, "rows = 0"),
        ({"ffn_kind": "relu"}, "ffn_kind = 'relu'"),
    ],
)
def test_a_block_refuses_what_it_cannot_be(changes, words):
    with pytest.raises(NasError, match=words):
        dit_block.Settings(**{"width": 32, "heads": 4, "kv_heads": 4, "text_width": 8, "ffn_ratio": 2, **changes})


def test_merging_joins_neighbours_and_splitting_parts_them():
    merge = token_merge.Block(token_merge.Settings(width=1, rows=4, columns=6))
    split = token_split.Block(token_split.Settings(width=1, rows=2, columns=3))
    tokens = torch.arange(24.0).reshape(1, 24, 1)
    with torch.no_grad():
        merge.proj.weight.fill_(0.25)
        split.proj.weight.fill_(1.0)
        merge.proj.bias.zero_()
        split.proj.bias.copy_(torch.tensor([0.0, 0.1, 0.2, 0.3]))
        merged = merge(tokens)
        assert merged.flatten().tolist() == F.avg_pool2d(tokens.reshape(1, 1, 4, 6), 2).flatten().tolist()
        image = split(merged).reshape(4, 6)
    assert image[:2, :2].flatten().tolist() == pytest.approx([3.5, 3.6, 3.7, 3.8])
    assert image[3, 5] == pytest.approx(merged[0, -1, 0].item() + 0.3)
