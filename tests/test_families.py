"""Families on the space around SnapGen: wiring, positions, scale; the UNet's settings are in test_families_unet.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nas import registry
from nas.errors import NasError, UsageError
from nas.families import network, positions, scaled
from nas.families.unet import kv_heads
from nas.network import BlockSpec, NetworkSpec, Position, Scale
from nas.space import Candidate, SearchSpace, list_spaces, load_space
from tests.unet_walk import unit_outputs, walk

UNETS = [name for name in list_spaces() if load_space(name).family == "unet"]
SCALE = Scale(
    width_divisor=8, head_width=8, norm_groups=4, latent_channels=12, height=16, width=8, text_tokens=10, text_width=24
)


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    return load_space("snapgen_unet")


@pytest.fixture(scope="module")
def candidates(space: SearchSpace) -> list[Candidate]:
    return [space.from_row(row) for row in space.sample(200, seed=0)]


@pytest.fixture(scope="module")
def snapgen(space: SearchSpace) -> NetworkSpec:
    return network(space.reference("snapgen"))


def test_the_published_network_block_by_block(snapgen: NetworkSpec):
    def unit(path: str, number: int, attends: bool = True) -> list[str]:
        return [f"{path}.resnets.{number}"] + ([f"{path}.attentions.{number}"] if attends else [])

    expected = ["conv_in", "time_embedding"]
    for stage in range(3):
        expected += unit(f"down_blocks.{stage}", 0) + unit(f"down_blocks.{stage}", 1)
        expected += [f"down_blocks.{stage}.downsamplers.0"] if stage < 2 else []
    expected += ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]
    for index in range(3):
        expected += [name for number in range(3) for name in unit(f"up_blocks.{index}", number, attends=index < 2)]
        expected += [f"up_blocks.{index}.upsamplers.0"] if index < 2 else []
    assert [block.name for block in snapgen.blocks] == [*expected, "head"]


def test_the_published_networks_widths_and_transformers(snapgen: NetworkSpec):
    blocks = {block.name: block for block in snapgen.blocks}
    assert (snapgen.input.channels, snapgen.input.height, snapgen.input.text_width) == (4, 128, 2304)
    assert blocks["conv_in"].settings == (("in_channels", 4), ("out_channels", 256))
    assert blocks["time_embedding"].settings == (("frequency_width", 256), ("time_width", 1024))
    assert blocks["up_blocks.1.resnets.0"] == BlockSpec(
        name="up_blocks.1.resnets.0",
        kind="separable",
        settings=(
            ("expansion", 2),
            ("in_channels", 896 + 512),
            ("norm_groups", 32),
            ("out_channels", 512),
            ("time_width", 1024),
        ),
        inputs=(("x", (896, 64, 64)), ("skip", (512, 64, 64)), ("temb", (1024,))),
        skip="down_blocks.1.attentions.1",
    )
    transformers = [b for b in snapgen.blocks if b.kind == "transformer"]
    assert sum(int(b.setting("depth")) for b in transformers) == 36
    assert {b.setting("kv_heads") for b in transformers} == {1}
    assert {b.setting("ffn_ratio") for b in transformers} == {3}
    assert {b.setting("qk_norm") for b in transformers} == {"rms_norm"}
    own = {b.name.rsplit(".", 2)[0] for b in transformers if b.setting("self_attention")}
    assert own == {"down_blocks.2", "mid_block", "up_blocks.0"}


def test_shapes_and_skips_fit_in_random_networks(candidates: list[Candidate]):
    for candidate in candidates:
        walk(network(candidate))


def test_skips_are_taken_last_first_each_once(candidates: list[Candidate]):
    for candidate in candidates:
        spec = network(candidate)
        assert [b.skip for b in spec.blocks if b.skip is not None] == unit_outputs(spec)[::-1]


def test_every_choice_reaches_the_network(space: SearchSpace, candidates: list[Candidate]):
    reference = dict(space.reference("snapgen").choices)
    key = network(space.candidate(**reference)).key
    for choice in space.choices:
        for value in choice.values:
            if value == reference[choice.name]:
                continue
            changed = {**reference, choice.name: value}
            if (changed["depth_0"], changed["up_depth_0"]) == (0, 1):
                continue
            assert network(space.candidate(**changed)).key != key, (choice.name, value)
    assert len({network(candidate).key for candidate in candidates}) == len(candidates)


def test_blocks_follow_their_choices(candidates: list[Candidate]):
    for candidate in candidates:
        values, blocks = candidate.values, network(candidate).blocks
        for stage in range(3):
            for path, units in ((f"down_blocks.{stage}.", 0), (f"up_blocks.{2 - stage}.", 1)):
                mine = [b for b in blocks if b.name.startswith(path)]
                residual = [b for b in mine if b.kind in ("resnet", "separable")]
                attending = [b for b in mine if b.kind == "transformer"]
                depth = values["up_depth_0" if path == "up_blocks.2." else f"depth_{stage}"]
                assert len(residual) == int(values[f"resnets_{stage}"]) + units
                assert len(attending) == (len(residual) if depth else 0)
                conv = str(values[f"conv_{stage}"])
                assert {b.kind for b in residual} == {"resnet" if conv == "full" else "separable"}
                if conv != "full":
                    assert {b.setting("expansion") for b in residual} == {int(conv[-1])}
                assert {b.setting("out_channels") for b in residual} == {values[f"width_{stage}"]}
                assert {b.setting("depth") for b in attending} <= {depth}
                own = values.get(f"self_attention_{stage}", False)
                assert {b.setting("self_attention") for b in attending} <= {own}


def test_a_network_is_the_concatenation_of_its_positions(space: SearchSpace, candidates: list[Candidate]):
    places = positions(space)
    assert len({place.name for place in places}) == len(places)
    for candidate in candidates[:50]:
        blocks: list[BlockSpec] = []
        for place in places:
            blocks += place.blocks({name: candidate.values[name] for name in place.depends})
        spec = network(candidate)
        assert tuple(blocks) == spec.blocks
        assert spec.name == str(candidate)


def _combinations(space: SearchSpace, place: Position) -> int:
    return math.prod(len(space.choice(name).values) for name in place.depends)


@pytest.mark.parametrize("name", UNETS)
def test_positions_depend_on_few_choices_so_that_pricing_is_a_look_up(name: str):
    space = load_space(name)
    places = positions(space)
    assert len({place.name for place in places}) == len(places)
    for place in places:
        assert set(place.depends) <= set(space.column)
    assert max(_combinations(space, place) for place in places) <= 20_000
    assert sum(_combinations(space, place) for place in places) <= 60_000


@pytest.mark.parametrize(
    ("heads", "attention", "expected"),
    [
        (14, "mha", 14),
        (14, "mqa", 1),
        (14, "gqa", 7),
        (8, "gqa", 4),
        (9, "gqa", 3),
        (5, "gqa", 1),
        (1, "gqa", 1),
        (2, "gqa", 1),
    ],
)
def test_kv_heads(heads: int, attention: str, expected: int):
    assert kv_heads(heads, attention) == expected


def test_kv_heads_refuses_another_word():
    with pytest.raises(UsageError, match="attention must be mha, gqa or mqa, got 'mla'"):
        kv_heads(8, "mla")


def test_kv_heads_divide_the_query_heads(candidates: list[Candidate]):
    for candidate in candidates:
        for block in network(candidate).blocks:
            if block.kind == "transformer":
                heads = int(block.setting("channels")) // int(block.setting("head_width"))
                assert heads % int(block.setting("kv_heads")) == 0
                assert (block.setting("kv_heads") == heads) == (candidate.values["attention"] == "mha" or heads == 1)


def test_scaled_keeps_structure_and_fits_its_own_shapes(candidates: list[Candidate]):
    widths = ("in_channels", "out_channels", "channels", "time_width", "frequency_width")
    for candidate in candidates:
        full, small = network(candidate), scaled(candidate, SCALE)
        walk(small)
        assert (small.input.channels, small.input.height, small.input.width) == (12, 16, 8)
        assert (small.input.text_tokens, small.input.text_width) == (10, 24)
        assert [(b.name, b.kind, b.skip) for b in small.blocks] == [(b.name, b.kind, b.skip) for b in full.blocks]
        for large, little in zip(full.blocks, small.blocks, strict=True):
            for name, value in large.settings:
                if name in widths and (large.kind, name) not in (("stem", "in_channels"), ("head", "out_channels")):
                    assert int(little.setting(name)) * 8 == value
                elif name in ("depth", "kv_heads", "self_attention", "qk_norm", "ffn_ratio", "expansion"):
                    assert little.setting(name) == value
                elif name == "norm_groups":
                    assert little.setting(name) == 4


def test_scaled_by_one_is_the_network_itself(space: SearchSpace, candidates: list[Candidate]):
    same = Scale(
        width_divisor=1,
        head_width=64,
        norm_groups=32,
        latent_channels=4,
        height=128,
        width=128,
        text_tokens=77,
        text_width=2304,
    )
    for candidate in candidates[:20]:
        assert scaled(candidate, same).blocks == network(candidate).blocks


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"height": 18}, "a 18x8 latent cannot be halved 2 times"),
        ({"width": 2}, "a 16x2 latent cannot be halved 2 times"),
        ({"width_divisor": 3}, "width 256 divided by 3"),
        ({"width_divisor": 64}, "width 256 divided by 64 must be a multiple of the head width 8 and of 4 norm groups"),
        ({"norm_groups": 5}, "of 5 norm groups"),
        ({"head_width": 12}, "head width 12"),
    ],
)
def test_scaled_refuses_what_does_not_divide(space: SearchSpace, change: dict[str, int], words: str):
    with pytest.raises(NasError, match=words):
        scaled(space.reference("snapgen"), replace(SCALE, **change))


def _other(space: SearchSpace, folder: Path, edit: Callable[[str], str]) -> SearchSpace:
    """The space with its text changed, without references and meanings, which name every choice again."""
    text = space.path.read_text().partition("[[reference]]")[0]
    before, _, after = text.partition("[meanings]")
    path = folder / "other.toml"
    path.write_text(edit(before + after[after.index("[[rules]]") :]))
    return load_space(path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('family = "unet"', 'family = "unett"', "unknown family 'unett'; did you mean 'unet'"),
        ("stages = 3", "", "needs 'stages' in .fixed. as a whole number above 0, got None"),
        ("stages = 3", 'stages = "three"', "needs 'stages' in .fixed. as a whole number above 0, got 'three'"),
        ("norm_groups = 32", "norm_groups = true", "needs 'norm_groups' .* got True"),
        ("width_1 = [256, 384, 512, 640]", "", "the family needs 'width_1' in .choices. or .fixed."),
        ("depth_2 = [1, 2, 4, 6]", "", "needs one of 'depth_2_0', 'depth_2' in .choices. or .fixed."),
        ("head_width = 64", "", "needs 'head_width' in .fixed. as a whole number above 0, got None"),
        ("head_width = 64", 'head_layout = "wide"', "head_layout must be 8-heads or 64-wide, got 'wide'"),
        ("head_width = 64", "head_width = 64\nheads_2 = 3", "width 512 of stage 2 does not divide into 3 heads"),
        ("norm_groups = 32", "norm_groups = 32\nposition = 1", "unknown setting 'position' .* mean 'positions'"),
        ("norm_groups = 32", 'norm_groups = 32\nmid = "half"', "mid must be full, residual or none, got 'half'"),
        ("norm_groups = 32", "norm_groups = 32\nattention_1 = true", "depth_1 must be 1 or more where attention_1 is"),
        ('positions = ["none", ', 'positions = ["ropes", ', "positions must be none or rope, got 'ropes'"),
        ("resnets_1 = [1, ", "resnets_1 = [0, ", "resnets_1 must be a whole number of 1 or more, got 0"),
        ("resnets_1 = [1, ", "resnets_1 = [1.5, ", "resnets_1 must be a whole number of 1 or more, got 1.5"),
        (
            "norm_groups = 32",
            "norm_groups = 32\nmid_depth = -1",
            "mid_depth must be a whole number of 0 or more, got -1",
        ),
        ("norm_groups = 32", 'norm_groups = 32\nattention_1 = "no"', "attention_1 must be true or false, got 'no'"),
        ("norm_groups = 32", "norm_groups = 32\nnorm_eps = 0", "norm_eps must be a number above 0, got 0"),
        ("[choices]", "[choices]\nnorm_eps = [1e-6, 1e-5]", "norm_eps must be in .fixed., because all networks share"),
        ('conv_0 = ["full", ', 'conv_0 = ["fulll", ', "conv_0 must be full, separable-1 or separable-2, got 'fulll'"),
        ('conv_0 = ["full", ', 'conv_0 = ["separable-3", ', "conv_0 must be .* got 'separable-3'"),
        ("width_0 = [128", "width_0 = [100", "width 100 divided by 1 must be a multiple of the head width 64"),
        ("latent_height = 128", "latent_height = 126", "a 126x128 latent cannot be halved 2 times, as 3 stages need"),
    ],
)
def test_a_space_that_the_family_cannot_build_is_one_sentence(
    space: SearchSpace, tmp_path: Path, old: str, new: str, words: str
):
    with pytest.raises(UsageError, match=words) as caught:
        network(_first(_other(space, tmp_path, lambda text: text.replace(old, new))))
    assert str(tmp_path / "other.toml") in caught.value.message


def _first(space: SearchSpace) -> Candidate:
    return space.from_row(space.canonical(space.sample(1, seed=0) * 0)[0])


def test_fractional_settings_reach_the_block_unrounded(space: SearchSpace, tmp_path: Path):
    other = _other(space, tmp_path, lambda text: text.replace("ffn_ratio = [2, 3, 4]", "ffn_ratio = [2.5, 3]"))
    assert {b.setting("ffn_ratio") for b in network(_first(other)).blocks if b.kind == "transformer"} == {2.5}


@pytest.mark.parametrize("stages", [1, 2])
def test_fewer_stages_fit_too(space: SearchSpace, tmp_path: Path, stages: int):
    other = _other(space, tmp_path, lambda text: text.replace("stages = 3", f"stages = {stages}"))
    for row in other.sample(20, seed=0):
        candidate = other.from_row(row)
        spec = network(candidate)
        walk(spec)
        walk(scaled(candidate, replace(SCALE, height=2, width=2)))
        assert [b.skip for b in spec.blocks if b.skip is not None] == unit_outputs(spec)[::-1]
        assert sum(b.kind == "downsample" for b in spec.blocks) == stages - 1


def test_up_depth_defaults_to_the_down_paths(space: SearchSpace, candidates: list[Candidate]):
    for candidate in candidates[:20]:
        blocks = {b.name: b for b in network(candidate).blocks}
        assert blocks["up_blocks.0.attentions.0"].setting("depth") == candidate.values["depth_2"]


def test_a_settings_choice_may_be_fixed_instead(space: SearchSpace, tmp_path: Path, snapgen: NetworkSpec):
    reference = space.reference("snapgen").values
    names = [n for n in reference if n != "qk_norm"]

    def fix(text: str) -> str:
        lines = [line for line in text.splitlines() if line.split(" = ")[0] not in names]
        at = lines.index("[fixed]") + 1
        fixed = [
            f"{name} = {str(reference[name]).lower() if isinstance(reference[name], bool) else repr(reference[name])}"
            for name in names
        ]
        return (
            "\n".join(lines[:at] + fixed + lines[at:]).partition("[[rules]]")[0]
            + "[pipeline]"
            + text.partition("[pipeline]")[2]
        )

    other = _other(space, tmp_path, fix)
    assert [c.name for c in other.choices] == ["qk_norm"]
    assert network(other.candidate(qk_norm="rms_norm")).key == snapgen.key


@pytest.mark.parametrize("family", registry.plugins("nas.families"))
def test_every_family_offers_positions(family: str):
    assert callable(registry.load("nas.families", family).positions)
