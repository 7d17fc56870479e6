"""Networks that start from a wider one: which channels are kept, the same in every tensor that has them."""

from __future__ import annotations

import re

import pytest
import torch
from inherit_cases import SD, XL, outputs, unet, weights

from nas.build import build
from nas.inherit import inherit
from nas.network import NetworkSpec


def widened(
    spec: NetworkSpec, state: dict[str, torch.Tensor], wide: NetworkSpec, junk: float
) -> dict[str, torch.Tensor]:
    """Weights of a network twice as wide that computes the same.

    Its second half of channels is written `junk` times as large and read by nobody; it has groups of its own in every
    GroupNorm, so that the first half is normalised as before. With junk = 1 it is a copy, which leaves a LayerNorm's
    mean and variance alone.
    """
    result = {}
    shapes = {name: t.shape for name, t in build(wide, "meta").state_dict().items()}
    skips = {b.name: (b.input("x")[0], b.input("skip")[0]) for b in spec.blocks if b.skip is not None}
    for name, tensor in state.items():
        shape, block = shapes[name], name.rpartition(".")[0].rpartition(".")[0]
        found = tensor
        halves = next((skips[b] for b in skips if name.startswith((f"{b}.norm1", f"{b}.conv"))), None)
        concatenated = halves is not None and (".norm1" in name or ".conv1." in name or ".conv_shortcut." in name)
        if shape[0] != found.shape[0]:
            parts = found.chunk(2) if "net.0.proj" in name else (found,)
            if concatenated and ".norm1" in name:
                parts = found.split(halves)
            found = torch.cat([torch.cat([part, part * junk]) for part in parts])
        if len(shape) > 1 and shape[1] != found.shape[1]:
            parts = (found,)
            if name == "time_embedding.linear_1.weight":
                # Every other frequency is one of the narrow network's.
                found = torch.stack([found, torch.zeros_like(found)], dim=2).flatten(1)
                parts = ()
            elif concatenated:
                parts = found.split(halves, dim=1)
            if parts:
                found = torch.cat([torch.cat([part, torch.zeros_like(part)], dim=1) for part in parts], dim=1)
        assert found.shape == shape, (name, block)
        result[name] = found
    return result


# Every half of every concatenation is a whole number of groups.
_NARROW = {**SD, "block_out_channels": [12, 24, 24], "norm_num_groups": 6}
_TYPES = {
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
_PLAIN = {
    "down_block_types": ["DownBlock2D"] * 3,
    "up_block_types": ["UpBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2D",
}


def halved(types: dict, heads: int) -> tuple[NetworkSpec, NetworkSpec]:
    wide = {**_NARROW, "block_out_channels": [24, 48, 48], "norm_num_groups": 12, "attention_head_dim": 2 * heads}
    return unet({**_NARROW, **types, "attention_head_dim": heads}), unet({**wide, **types})


@pytest.mark.parametrize(
    ("types", "widths", "junk"),
    [(_TYPES, "first", 1.0), (_PLAIN, "first", 0.5), (_PLAIN, "l1", 0.05)],
    ids=["first", "first without attention", "l1"],
)
def test_a_network_that_was_widened_is_found_again(types, widths, junk):
    small, large = halved(types, heads=2)
    state = weights(small)
    teacher = widened(small, state, large, junk)
    assert torch.allclose(outputs(small, state), outputs(large, teacher), rtol=1e-4, atol=1e-5)
    found, report = inherit(small, large, teacher, widths=widths)
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert report.tensors("new") == 0
    assert report.tensors("sliced") > 0.9 * len(state)


def test_l1_finds_the_channels_that_first_would_lose():
    small, large = halved(_PLAIN, heads=2)
    state = weights(small)
    # The useful half comes second: what is written ten times as large is the copy that nobody reads.
    teacher = widened(small, state, large, junk=10.0)
    first, _ = inherit(small, large, teacher, widths="first")
    by_weight, _ = inherit(small, large, teacher, widths="l1")
    assert torch.equal(first["conv_in.weight"], state["conv_in.weight"])
    assert torch.equal(by_weight["conv_in.weight"], 10 * state["conv_in.weight"])


def marked(spec: NetworkSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights, where the scale of a norm is the number of its channel."""
    state = weights(spec, seed)
    for name, tensor in state.items():
        if re.search(r"norm(1|2|3|_out)?\.weight$", name):
            state[name] = torch.arange(len(tensor), dtype=torch.float32)
    return state


def test_one_choice_of_channels_for_every_tensor_of_a_stream():
    large = unet({**SD, "block_out_channels": [32, 64, 128, 128]})
    small = unet({**SD, "block_out_channels": [16, 48, 64, 64]})
    teacher = marked(large)
    state, report = inherit(small, large, teacher, widths="l1")
    stage = state["down_blocks.0.resnets.0.norm1.weight"].long()
    assert len(stage) == 16
    assert not torch.equal(stage, torch.arange(16))
    for name in ("down_blocks.0.resnets.1.norm1", "down_blocks.0.attentions.1.norm", "up_blocks.3.attentions.0.norm"):
        assert torch.equal(state[f"{name}.weight"].long(), stage), name
    assert torch.equal(state["head.conv_norm_out.weight"].long(), stage)
    # As many of each group of the norm, so that groups stay together.
    assert torch.equal(stage // 8, torch.arange(16) // 4)
    assert torch.equal(state["conv_in.weight"], teacher["conv_in.weight"][stage])
    assert torch.equal(state["head.conv_out.weight"], teacher["head.conv_out.weight"][:, stage])
    # A skip is concatenated after x: each half by the choice of its own stage.
    joined = state["up_blocks.3.resnets.0.norm1.weight"].long()
    inner = state["down_blocks.1.resnets.1.norm1.weight"].long()
    assert torch.equal(joined, torch.cat([inner, 64 + stage]))
    name = "up_blocks.3.resnets.0.conv1.weight"
    inside = state["up_blocks.3.resnets.0.norm2.weight"].long()
    assert torch.equal(state[name], teacher[name][inside][:, joined])
    # Stages 2 and 3 are joined by a sum without a projection, so they share one choice, with the middle.
    lowest = state["down_blocks.3.resnets.0.norm1.weight"]
    assert torch.equal(state["down_blocks.2.resnets.1.norm1.weight"], lowest)
    assert torch.equal(state["mid_block.attentions.0.norm.weight"], lowest)
    assert report.tensors("new") == 0


def test_heads_are_kept_whole_and_feed_forward_halves_together():
    large, small = unet({**XL, "block_out_channels": [32, 64, 128], "attention_head_dim": [4, 8, 16]}), unet(XL)
    teacher = marked(large)
    state, _ = inherit(small, large, teacher, widths="l1")
    path = "down_blocks.1.attentions.0.transformer_blocks.0"
    tokens = state[f"{path}.norm1.weight"].long()
    assert all(torch.equal(state[f"{path}.norm{n}.weight"].long(), tokens) for n in (2, 3))
    rows = rows_of(state[f"{path}.attn1.to_q.weight"], teacher[f"{path}.attn1.to_q.weight"][:, tokens])
    heads = rows.reshape(4, 8)
    assert torch.equal(heads % 8, torch.arange(8).expand(4, 8))
    for name in ("to_k", "to_v"):
        assert torch.equal(
            state[f"{path}.attn1.{name}.weight"], teacher[f"{path}.attn1.{name}.weight"][rows][:, tokens]
        )
    out = f"{path}.attn1.to_out.0.weight"
    assert torch.equal(state[out], teacher[out][tokens][:, rows])
    project, back = f"{path}.ff.net.0.proj.weight", f"{path}.ff.net.2.weight"
    rows = rows_of(state[project], teacher[project][:, tokens])
    assert torch.equal(rows[128:], rows[:128] + 256)
    assert torch.equal(state[back], teacher[back][tokens][:, rows[:128]])


def rows_of(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Which row of `whole` each row of `part` is."""
    same = (part[:, None] == whole[None]).all(2)
    assert (same.sum(1) == 1).all()
    return same.int().argmax(1)


def test_narrower_heads_keep_the_leading_channels_of_each():
    # Eight heads in every stage, as Stable Diffusion 1 has them: half the width is half of every head.
    large, small = unet({**SD, "block_out_channels": [32, 64, 128, 128]}), unet(SD)
    teacher = weights(large)
    state, _ = inherit(small, large, teacher, widths="first")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    kept = torch.tensor([head * 8 + i for head in range(4) for i in range(4)])
    assert torch.equal(state[name], teacher[name][kept][:, :16])


def test_sinusoids_are_matched_by_frequency():
    large, small = (
        unet({**SD, "block_out_channels": [32, 32, 64, 64]}),
        unet({**SD, "block_out_channels": [16, 32, 64, 64]}),
    )
    teacher = weights(large)
    state, _ = inherit(small, large, teacher)
    name = "time_embedding.linear_1.weight"
    kept = torch.cat([torch.arange(0, 16, 2), torch.arange(16, 32, 2)])
    assert torch.equal(state[name], teacher[name][:64][:, kept])
