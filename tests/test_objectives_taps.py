"""Which layers the losses compare: the published pairs, and the same ones whoever built the networks."""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import inherit_cases as cases
import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from loss_cases import batch, outputs

from nas import families
from nas.build import build
from nas.edit import RemoveBlock
from nas.errors import NasError, UsageError
from nas.features import Anatomy, Tap, anatomy
from nas.network import NetworkSpec
from nas.objectives import Loss, is_game, objective
from nas.objectives._taps import matched
from nas.space import load_space
from nas.teachers.embedded import TeacherSettings, network_spec

ATTENTION = ".attn1.to_out.0"


def loss(name: str, **settings: object) -> Loss:
    found = objective(name, **settings)
    assert not is_game(found)
    return found


def of_spec(spec: NetworkSpec) -> Anatomy:
    return anatomy(build(spec, "meta"))


@functools.cache
def published(space: str, reference: str) -> Anatomy:
    return of_spec(families.network(load_space(space).reference(reference)))


@functools.cache
def transformer(depth: int, *, joint: bool = False) -> Anatomy:
    """A tiny transformer of diffusers: PixArt's, or Stable Diffusion 3's."""
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "patch_size": 2, "in_channels": 4}
    with torch.device("meta"):
        if joint:
            widths = {"joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 8}
            return anatomy(SD3Transformer2DModel(**shape, **widths, num_layers=depth, pos_embed_max_size=8))
        return anatomy(PixArtTransformer2DModel(**shape, num_layers=depth, cross_attention_dim=16, caption_channels=8))


def keys(taps: tuple[Tap, ...]) -> list[str]:
    return [tap.key for tap in taps]


# ------------------------------------------------------------------------------------------ BK-SDM


def test_stages_of_bk_sdm_base_and_small() -> None:
    # BK-SDM's hooks: the outputs of four down and four up blocks, each behind its sampler.
    for student in ("bk-sdm-base", "bk-sdm-small"):
        assert keys(loss("features").taps(published("sd_unet", student), published("sd_unet", "sd-v1.5"))) == [
            "down_blocks.0.downsamplers.0",
            "down_blocks.1.downsamplers.0",
            "down_blocks.2.downsamplers.0",
            "down_blocks.3.resnets.0=down_blocks.3.resnets.1",
            "up_blocks.0.upsamplers.0",
            "up_blocks.1.upsamplers.0",
            "up_blocks.2.upsamplers.0",
            "up_blocks.3.attentions.1=up_blocks.3.attentions.2",
        ]


def test_stages_of_bk_sdm_tiny() -> None:
    # Its map: down 0 and 1, the attention of down 2 (the student's only with the teacher's second), and up stages one
    # further in the teacher.
    assert keys(loss("features").taps(published("sd_unet", "bk-sdm-tiny"), published("sd_unet", "sd-v1.5"))) == [
        "down_blocks.0.downsamplers.0",
        "down_blocks.1.downsamplers.0",
        "down_blocks.2.attentions.0=down_blocks.2.attentions.1",
        "up_blocks.0.upsamplers.0=up_blocks.1.upsamplers.0",
        "up_blocks.1.upsamplers.0=up_blocks.2.upsamplers.0",
        "up_blocks.2.attentions.1=up_blocks.3.attentions.2",
    ]


def test_the_middle_is_a_stage_on_demand() -> None:
    student, teacher = published("sd_unet", "bk-sdm-base"), published("sd_unet", "sd-v1.5")
    stages = keys(loss("features").taps(student, teacher))
    found = keys(loss("features", points="stages+mid").taps(student, teacher))
    assert set(found) - set(stages) == {"mid_block.resnets.1"}
    assert found.index("mid_block.resnets.1") == 4  # between the way down and the way up


# ------------------------------------------------------------------------------------- SSD-1B and Vega


@pytest.mark.parametrize("student", ["ssd-1b", "segmind-vega"])
def test_layers_of_segminds_networks(student: str) -> None:
    taps = loss("layers").taps(published("sdxl_unet", student), published("sdxl_unet", "sdxl-base"))
    # Two residual blocks per down stage, three per up stage, a transformer behind each but in the outermost stages.
    expected = [f"down_blocks.{stage}.resnets.{unit}" for stage in range(3) for unit in range(2)]
    expected += [f"down_blocks.{stage}.attentions.{unit}" for stage in (1, 2) for unit in range(2)]
    expected += [f"up_blocks.{stage}.resnets.{unit}" for stage in range(3) for unit in range(3)]
    expected += [f"up_blocks.{stage}.attentions.{unit}" for stage in (0, 1) for unit in range(3)]
    assert Counter(keys(taps)) == Counter([*expected, "mid_block.resnets.0=mid_block.resnets.1"])


@pytest.mark.parametrize(("student", "middle"), [("koala-1b", 3), ("koala-700m", 0)])
def test_layers_of_koalas_networks_pair_as_inheritance_does(student: str, middle: int) -> None:
    taps = loss("layers").taps(published("sdxl_unet", student), published("sdxl_unet", "sdxl-base"))
    moved = {tap.student: tap.teacher for tap in taps if tap.student != tap.teacher}
    # Of an up stage's units the second is the teacher's third.
    assert moved == {
        f"up_blocks.{stage}.{part}.1": f"up_blocks.{stage}.{part}.2"
        for stage, part in [*itertools.product((0, 1), ("resnets", "attentions")), (2, "resnets")]
    }
    assert sum(tap.student.startswith("mid_block.") for tap in taps) == middle
    assert len(taps) == 3 + 2 + middle + 6 + 4


def test_blocks_are_the_layers_and_the_samplers() -> None:
    student, teacher = published("sdxl_unet", "ssd-1b"), published("sdxl_unet", "sdxl-base")
    layers = loss("layers").taps(student, teacher)
    blocks = loss("features", points="blocks").taps(student, teacher)
    assert {tap.student for tap in set(blocks) - set(layers)} == {
        *(f"down_blocks.{stage}.downsamplers.0" for stage in (0, 1)),
        *(f"up_blocks.{stage}.upsamplers.0" for stage in (0, 1)),
    }
    assert set(layers) < set(blocks)


# ---------------------------------------------------------------------------------------------- KOALA


def test_match_rules() -> None:
    # KOALA's instances, counted from 1: bottom 1..6, interleaved {1, 3, 5, 7, 9, 10}, top 5..10.
    assert matched("first", 6, 10) == (0, 1, 2, 3, 4, 5)
    assert [1 + layer for layer in matched("interleave", 6, 10)] == [1, 3, 5, 7, 9, 10]
    assert matched("last", 6, 10) == (4, 5, 6, 7, 8, 9)
    assert [1 + layer for layer in matched("interleave", 5, 10)] == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("rule", ["first", "interleave", "last"])
def test_match_rules_rise_and_stay_inside(rule: str) -> None:
    for total in range(1, 13):
        for count in range(1, total + 1):
            found = matched(rule, count, total)
            assert len(found) == count
            assert list(found) == sorted(set(found))
            assert 0 <= found[0] <= found[-1] < total
        assert matched(rule, total, total) == tuple(range(total))


@pytest.mark.parametrize(("student", "layers"), [("koala-1b", 30), ("koala-700m", 21)])
def test_every_transformer_layer_of_koala_is_matched(student: str, layers: int) -> None:
    taps = loss("self_attention").taps(published("sdxl_unet", student), published("sdxl_unet", "sdxl-base"))
    inside = [tap for tap in taps if tap.student.endswith(ATTENTION)]
    assert len(inside) == layers  # its published number of transformer layers
    assert len({tap.teacher for tap in inside}) == layers
    # The last features of DW-1 and UP-3, where no transformer stands.
    assert keys(taps[layers:]) == ["down_blocks.0.downsamplers.0", "up_blocks.2.resnets.1=up_blocks.2.resnets.2"]


@pytest.mark.parametrize(
    ("match", "theirs"),
    [("first", [0, 1, 2, 3, 4, 5]), ("interleave", [0, 2, 4, 6, 8, 9]), ("last", [4, 5, 6, 7, 8, 9])],
)
def test_matched_layers_are_those_of_the_corresponding_transformer(match: str, theirs: list[int]) -> None:
    taps = loss("self_attention", match=match, last_features=False).taps(
        published("sdxl_unet", "koala-1b"), published("sdxl_unet", "sdxl-base")
    )
    ours, there = "up_blocks.0.attentions.1.transformer_blocks.", "up_blocks.0.attentions.2.transformer_blocks."
    assert [tap.teacher for tap in taps if tap.student.startswith(ours)] == [
        f"{there}{layer}{ATTENTION}" for layer in theirs
    ]
    assert [tap.student for tap in taps if tap.student.startswith(ours)] == [
        f"{ours}{layer}{ATTENTION}" for layer in range(6)
    ]


def test_sides_can_be_chosen() -> None:
    student, teacher = published("sdxl_unet", "koala-1b"), published("sdxl_unet", "sdxl-base")
    found = {
        side: loss("self_attention", stages=side, last_features=False).taps(student, teacher)
        for side in ("all", "encoder", "decoder")
    }
    assert {tap.student.split(".")[0] for tap in found["encoder"]} == {"down_blocks"}
    assert {tap.student.split(".")[0] for tap in found["decoder"]} == {"up_blocks"}
    middle = {tap for tap in found["all"] if tap.student.startswith("mid_block.")}
    assert len(middle) == 6
    assert set(found["all"]) == {*found["encoder"], *found["decoder"], *middle}


def test_a_student_deeper_than_its_teacher_is_matched_where_there_are_layers() -> None:
    taps = loss("self_attention", match="last").taps(transformer(5), transformer(3))
    assert [(int(tap.student.split(".")[1]), int(tap.teacher.split(".")[1])) for tap in taps] == [
        (2, 0),
        (3, 1),
        (4, 2),
    ]


# ------------------------------------------------------------------------------- whoever built the networks

PAIRS = {
    "tiny": (cases.SD, cases.TINY),
    "base": (cases.SD, cases.BASE),
    "koala": (cases.XL, cases.KOALA),
    "ssd": (cases.XL, cases.SSD),
}
LOSSES = {
    "layers": loss("layers"),
    "self_attention": loss("self_attention"),
    "stages": loss("features", points="stages+mid"),
    "blocks": loss("features", points="blocks"),
    "last": loss("multi_level"),
}


@functools.cache
def twins(name: str, which: int) -> tuple[Anatomy, Anatomy]:
    """One network as ours, and as the class of diffusers, of which no NetworkSpec is known."""
    config = PAIRS[name][which]
    with torch.device("meta"):
        theirs = anatomy(UNet2DConditionModel(**config))
    assert theirs.spec is None
    return of_spec(cases.unet(config)), theirs


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("which", LOSSES)
def test_networks_of_diffusers_are_paired_as_ours(pair: str, which: str) -> None:
    found = {LOSSES[which].taps(s, t) for s, t in itertools.product(twins(pair, 1), twins(pair, 0))}
    assert len(found) == 1
    ours, theirs = (set(each.names) for each in (twins(pair, 1)[1], twins(pair, 0)[1]))
    assert all(tap.student in ours and tap.teacher in theirs for tap in found.pop())


@pytest.mark.parametrize("joint", [False, True], ids=["pixart", "sd3"])
def test_diffusion_transformers(joint: bool) -> None:
    student, teacher = transformer(2, joint=joint), transformer(5, joint=joint)
    row, attention = "transformer_blocks", "attn" if joint else "attn1"
    assert keys(loss("features").taps(student, teacher)) == [f"{row}.1={row}.4"]
    assert keys(loss("layers").taps(student, teacher)) == [f"{row}.0", f"{row}.1"]
    # No outermost stages: self-attention alone.
    assert keys(loss("self_attention").taps(student, teacher)) == [
        f"{row}.{layer}.{attention}.to_out.0" for layer in (0, 1)
    ]


def test_our_pixart_is_paired_with_that_of_diffusers() -> None:
    ours = published("dit", "koala-dit-m")
    assert len(loss("layers").taps(ours, transformer(28))) == 14
    assert keys(loss("features").taps(ours, transformer(28))) == ["transformer_blocks.13=transformer_blocks.27"]


def test_three_stages_of_a_transformer_are_rows() -> None:
    network = published("dit", "snapgen-plus-plus")
    rows = [f"{row}.{last}" for row, last in (("down_blocks", 3), ("mid_blocks", 11), ("up_blocks", 3))]
    assert keys(loss("features", points="stages+mid").taps(network, network)) == rows
    assert keys(loss("features").taps(network, network)) == [rows[0], rows[2]]
    decoder = loss("self_attention", stages="decoder").taps(network, network)
    assert [tap.student.rpartition(".attn")[0] for tap in decoder] == [f"up_blocks.{i}" for i in range(4)]


def test_last_crosses_architectures() -> None:
    # A UNet whose outermost stage has no transformer, taught by a transformer.
    student = published("snapgen_unet", "snapgen")
    taps = loss("multi_level").taps(student, transformer(5, joint=True))
    assert keys(taps) == ["up_blocks.1.attentions.2=transformer_blocks.4"]
    with pytest.raises(NasError, match="no stages in common") as error:
        loss("features").taps(student, transformer(5, joint=True))
    assert "name the layers" in str(error.value.hint)


def test_decoders_have_no_skips_and_keep_their_units() -> None:
    # Without skips, unit u starts from unit u: the last up unit is no exception there.
    names = [f"up_blocks.{stage}.resnets.{unit}" for stage in range(2) for unit in range(3)]
    teacher = Anatomy(names=tuple(names), spec=None)
    student = Anatomy(names=tuple(name for name in names if not name.endswith(".2")), spec=None)
    assert all(tap.student == tap.teacher for tap in loss("layers").taps(student, teacher))
    # The same stages with a way down before them are a UNet's.
    down = ("down_blocks.0.resnets.0", "down_blocks.1.resnets.0")
    unet = [Anatomy(names=(*down, *each.names), spec=None) for each in (student, teacher)]
    assert "up_blocks.0.resnets.1=up_blocks.0.resnets.2" in keys(loss("layers").taps(unet[0], unet[1]))


def test_a_student_cut_from_the_embedded_teacher() -> None:
    spec = network_spec(TeacherSettings(vocabulary=9, null_tokens=(0, 0), mean=(0.0, 0.0, 0.0)))
    student = RemoveBlock(block="up_blocks.0.attentions.0").apply(RemoveBlock(block="mid_block.resnets.0").apply(spec))
    taps = loss("layers").taps(of_spec(student), of_spec(spec))
    assert keys(taps) == [b.name for b in student.blocks if b.kind in ("resnet", "transformer")]
    # A stage whose last transformer is gone ends in its residual block; both have the sampler behind it here.
    assert "up_blocks.0.upsamplers.0" in keys(loss("features").taps(of_spec(student), of_spec(spec)))
    # Self-attention stands in the lower stage only.
    assert keys(loss("self_attention", last_features=False).taps(of_spec(student), of_spec(spec))) == [
        f"down_blocks.1.attentions.0.transformer_blocks.0{ATTENTION}"
    ]


# ---------------------------------------------------------------------------------------------- by name


def test_layers_by_name() -> None:
    student, teacher = (twins("tiny", which)[1] for which in (1, 0))
    own = "down_blocks.2.attentions.0.proj_out=down_blocks.2.attentions.1.proj_out"
    points = f"conv_in=conv_in, {own}\n  up_blocks.0.upsamplers.0=up_blocks.1.upsamplers.0 mid_block=mid_block"
    with pytest.raises(UsageError, match="the student has no layer 'mid_block'"):
        loss("features", points=points).taps(student, teacher)
    taps = loss("features", points=points.removesuffix(" mid_block=mid_block")).taps(student, teacher)
    assert keys(taps) == ["conv_in", own, "up_blocks.0.upsamplers.0=up_blocks.1.upsamplers.0"]


def test_a_misspelt_layer_offers_the_nearest() -> None:
    student, teacher = (twins("tiny", which)[1] for which in (1, 0))
    points = "down_blocks.0.resnet.0"
    with pytest.raises(UsageError, match=r"no layer 'down_blocks.0.resnet.0'; did you mean 'down_blocks.0.resnets.0'"):
        loss("features", points=points).taps(student, teacher)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("features", "no stages in common"),
        ("layers", "no blocks in common"),
        ("self_attention", "no self-attention in common"),
        ("multi_level", "no transformers in common"),
    ],
)
def test_networks_without_such_layers_are_refused(name: str, message: str) -> None:
    plain = Anatomy(names=("conv_in", "conv_out"), spec=None)
    with pytest.raises(NasError, match=message):
        loss(name).taps(plain, plain)


@pytest.mark.parametrize("name", ["output", "task", "text"])
def test_losses_between_outputs_tap_nothing(name: str) -> None:
    student, teacher = twins("tiny", 1)[0], twins("tiny", 0)[0]
    assert loss(name).taps(student, teacher) == ()


def test_a_balanced_loss_may_compare_no_layers() -> None:
    each = loss("multi_level", points="none")
    assert each.taps(twins("tiny", 1)[0], twins("tiny", 0)[0]) == ()
    assert set(each(outputs(1), outputs(2), batch())) == {"task_and_output"}
    with pytest.raises(UsageError, match="unknown points 'none'"):  # of features nothing would be left
        loss("features", points="none")
