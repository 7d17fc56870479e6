"""The diffusion transformer family: wiring, every attention and text in it, small copies, its space, ONNX."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nas import families
from nas.blocks._attention import KINDS
from nas.build import build, build_block, example_inputs
from nas.errors import NasError, UsageError
from nas.exporters import onnx
from nas.families import Values
from nas.network import InputShape, Scale
from nas.pricing import Pricer
from nas.space import load_space
from nas.trace import block_trace

SHAPE = InputShape(channels=4, height=16, width=16, text_tokens=5, text_width=12)
SETTINGS = {
    "width": 32,
    "heads": 4,
    "patch_size": 2,
    "depth": 2,
    "kv_sharing": "gqa",
    "ffn_ratio": 2,
    "attention": "full",
    "text": "cross",
    "window": 4,
}
STAGES = {"stages": 3, "down_depth": 2, "middle_depth": 1, "up_depth": 3}
PROXY = Scale(
    width_divisor=16,
    head_width=4,
    norm_groups=4,
    latent_channels=48,
    height=8,
    width=8,
    text_tokens=6,
    text_width=24,
)
REFERENCE = ("pixart-sigma-xl", "koala-dit-m", "snapgen-plus-plus")


@pytest.fixture(scope="module")
def space():
    return load_space("dit")


def network(shape=SHAPE, **changes):
    return families.network_of("dit", {**SETTINGS, **changes}, shape, name="small")


def layers(spec):
    return [block.name for block in spec.blocks if block.kind in ("dit_block", "mmdit_block")]


def run(spec, seed=0):
    """A network away from its initialisation, its inputs, and what it gives."""
    model = randomised(build(spec, seed=seed), seed)
    inputs = example_inputs(spec, batch=2, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model, inputs, model(**inputs)


class Called(torch.nn.Module):
    """A network with the three inputs that it takes: torch's exporter passes a keyword-only argument by position."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, sample, timestep, text):
        return self.network(sample, timestep, text)


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return module.eval()


# The wiring


def test_a_single_stage_is_one_row_of_blocks():
    spec = network(depth=3)
    names = [block.name for block in spec.blocks]
    assert names == [
        "pos_embed",
        "adaln_single",
        "caption_projection",
        *(f"transformer_blocks.{i}" for i in range(3)),
        "head",
    ]
    assert [dict(block.inputs)["x"] for block in spec.blocks[3:]] == [(64, 32)] * 4


def test_the_middle_of_three_stages_has_a_quarter_of_the_tokens():
    spec = network(**STAGES)
    assert layers(spec) == ["down_blocks.0", "down_blocks.1", "mid_blocks.0", *(f"up_blocks.{i}" for i in range(3))]
    tokens = {block.name: block.input("x")[0] for block in spec.blocks if "x" in dict(block.inputs)}
    assert (tokens["down_blocks.1"], tokens["mid_blocks.0"], tokens["up_blocks.0"]) == (64, 16, 64)


def test_an_up_block_takes_the_down_block_of_its_distance_from_the_middle():
    skips = {block.name: block.skip for block in network(**STAGES).blocks if block.skip}
    assert skips == {"up_skips.0": "down_blocks.1", "up_skips.1": "down_blocks.0"}
    model, inputs, before = run(network(**STAGES))
    with torch.no_grad():
        model.get_submodule("up_skips.1").proj.weight[:, 32:] = 0
        assert not torch.allclose(model(**inputs), before)


def test_the_middle_attends_fully_and_may_have_a_feed_forward_of_its_own():
    spec = network(**STAGES, attention="window", middle_ffn_ratio=3)
    found = {block.name: dict(block.settings) for block in spec.blocks}
    assert "attention" not in found["mid_blocks.0"]
    assert [found[name]["ffn_ratio"] for name in ("down_blocks.0", "mid_blocks.0", "up_blocks.2")] == [2, 3, 2]
    assert found["down_blocks.0"]["attention"] == "window"


@pytest.mark.parametrize("stages", [{}, STAGES], ids=["one stage", "three stages"])
def test_only_the_last_block_leaves_joint_text(stages):
    spec = network(**stages, text="joint")
    writes = [block.writes for block in spec.blocks if block.kind == "mmdit_block"]
    assert writes == [("x", "text")] * (len(writes) - 1) + [("x",)]
    assert spec.blocks[-2].setting("updates_text") is False


def test_sizes_of_the_image_condition_the_time_embedding():
    spec = network(replace(SHAPE, size_ids=3), width=48)
    assert spec.inputs["size_ids"] == (3,)
    model, inputs, before = run(spec)
    with torch.no_grad():
        for i in range(3):
            other = inputs["size_ids"].clone()
            other[:, i] += 1
            assert not torch.allclose(model(**{**inputs, "size_ids": other}), before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention": "local"}, "attention must be one of"),
        ({"text": "none"}, "text must be one of"),
        ({"kv_sharing": "all"}, "kv_sharing must be one of"),
        ({"stages": 2}, "stages must be one of"),
        ({"depth": 0}, "depth must be a whole number of 1 or more, got 0"),
        ({"ffn_kinds": "geglu"}, "unknown setting 'ffn_kinds' .* did you mean 'ffn_kind'"),
        ({"stages": 3}, "needs 'down_depth'"),
        ({"text": "joint", "caption_projection": False}, "needs caption_projection"),
    ],
)
def test_a_setting_out_of_range_is_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        network(**changes)


@pytest.mark.parametrize(("change", "words"), [({"text_tokens": 0}, "text_tokens"), ({"size_ids": 6}, "size_ids")])
def test_an_input_that_the_family_has_no_use_for_is_refused(change, words):
    with pytest.raises(UsageError, match=words):
        network(replace(SHAPE, **change))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": 5}, "5 heads"),
        ({"patch_size": 3}, "tokens of 3x3"),
        ({**STAGES, "patch_size": 16}, "tokens of 32x32"),
    ],
)
def test_what_does_not_divide_is_refused(changes, words):
    with pytest.raises(NasError, match=words):
        network(**changes)


def test_what_every_network_shares_cannot_be_a_choice():
    values = Values(choices={"sample_size": (64, 128)}, fixed=SETTINGS, where="mine.toml")
    with pytest.raises(UsageError, match=r"mine\.toml: sample_size belongs into \[fixed\]"):
        families.registry.load("nas.families", "dit").positions(values, SHAPE)


# The blocks


@pytest.mark.parametrize("text", ["cross", "joint"])
@pytest.mark.parametrize("stages", [{}, STAGES], ids=["one stage", "three stages"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_attention_works_in_every_network(kind, text, stages):
    spec = network(attention=kind, text=text, **stages)
    model, inputs, output = run(spec)
    assert output.shape == (2, 4, 16, 16)
    assert output.isfinite().all()
    with torch.no_grad():
        assert not torch.allclose(model(**{**inputs, "text": inputs["text"] + 1}), output)
        assert not torch.allclose(model(**{**inputs, "timestep": inputs["timestep"] + 9}), output)


@pytest.mark.parametrize("text", ["cross", "joint"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_counts_what_torch_counts(kind, text):
    spec = next(b for b in network(attention=kind, text=text).blocks if b.name == "transformer_blocks.0")
    with torch.device("meta"):
        module = build_block(spec)
        inputs = {name: torch.empty(1, *shape) for name, shape in spec.inputs}
        with FlopCounterMode(display=False) as counter:
            module(**inputs)
    assert block_trace(spec).macs == counter.get_total_flops() / 2


@pytest.mark.parametrize("kind", KINDS)
def test_every_attention_is_cheaper_than_full_or_as_dear(kind):
    shape = replace(SHAPE, height=64, width=64)
    macs = {
        k: block_trace(next(b for b in network(shape, attention=k).blocks if b.kind == "dit_block")).macs
        for k in ("full", kind)
    }
    assert (macs[kind] < macs["full"]) == (kind != "full")


def test_a_gated_feed_forward_has_twice_the_inner_width():
    kinds = {kind: network(ffn_kind=kind).blocks[3] for kind in ("gelu", "geglu")}
    assert block_trace(kinds["geglu"]).params - block_trace(kinds["gelu"]).params == 32 * 64 + 64


# Small copies


@pytest.mark.parametrize("name", REFERENCE)
def test_a_small_copy_keeps_the_structure(space, name):
    full = space.reference(name)
    small = families.scaled(full, PROXY)
    assert layers(small) == layers(families.network(full))
    block = next(b for b in small.blocks if b.kind == "dit_block")
    assert (block.setting("width"), block.setting("heads")) == (72, 18)
    assert block.input("x") == (64, 72)
    _, _, output = run(small)
    assert output.shape == (2, 48, 8, 8)
    assert output.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_attention_and_text_has_a_small_copy(space, kind):
    values = dict(space.reference("snapgen-plus-plus").choices)
    for text in ("cross", "joint"):
        small = families.scaled(space.candidate(**{**values, "attention": kind, "text": text}), PROXY)
        assert run(small)[2].isfinite().all()


def test_a_width_that_does_not_divide_has_no_small_copy(space):
    with pytest.raises(NasError, match=r"width 1152 divided by 36 must be a multiple of the head width 5"):
        families.scaled(space.reference("koala-dit-m"), replace(PROXY, width_divisor=36, head_width=5))


# The space


@pytest.mark.parametrize(("name", "params"), [("pixart-sigma-xl", 610_856_096), ("koala-dit-m", 313_278_368)])
def test_published_networks_have_their_parameters(space, name, params):
    assert space.find_reference(name).params == params
    model = build(families.network(space.published(name)), "meta")
    assert sum(p.numel() for p in model.parameters()) == params


def test_every_choice_is_explained(space):
    assert set(space.meanings) == {choice.name for choice in space.choices}


def test_candidates_are_priced_as_they_are_built(space):
    pricer = Pricer(space)
    rows = space.sample(6, 5)
    prices = pricer.rows(rows)
    assert {bool(space.from_row(row).values["stages"] == 3) for row in rows} == {True, False}
    for i, row in enumerate(rows):
        candidate = space.from_row(row)
        model = build(families.network(candidate), "meta")
        assert prices.params[i] == sum(p.numel() for p in model.parameters())
        assert prices.macs[i] == sum(block.cost.macs for block in pricer.blocks(candidate))


@pytest.mark.parametrize(
    "changes",
    [*({"attention": kind} for kind in KINDS), {"text": "joint", "attention": "sparse"}, {**STAGES, "width": 16}],
    ids=[*KINDS, "joint", "three stages"],
)
def test_networks_export_to_onnx(tmp_path, changes):
    model, inputs, _ = run(network(**{"depth": 1, **changes}))
    path = onnx.export(Called(model), inputs, tmp_path / "network.onnx")
    assert onnx.verify(path, Called(model), inputs) < 1e-4
