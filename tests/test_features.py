"""Hooks by name, the same layers in our networks and in diffusers', and projections into a teacher's shape."""

from __future__ import annotations

import copy

import inherit_cases as cases
import pytest
import torch
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from nas.batches import Batch
from nas.build import Network, build_block, example_inputs
from nas.checkpoint import load_diffusers, save_diffusers
from nas.diffusion import Conditioning, FlowDenoiser, Preconditioner
from nas.distill import answer, predict
from nas.errors import NasError, UsageError
from nas.features import Anatomy, Projection, Tap, anatomy, body, captured, module_key, projections
from nas.network import block
from nas.objectives import objective

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"


class Small(nn.Module):
    """Two layers, one that gives several tensors, one that gives none, one that is not called."""

    class Several(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1, x + 2

    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.several, self.nothing, self.unused = self.Several(), self.Nothing(), nn.Identity()
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.nothing(sample)
        return self.last(self.several(self.first(sample))[0])


def denoiser(seed: int = 0) -> FlowDenoiser:
    torch.manual_seed(seed)
    return FlowDenoiser(Small(), Preconditioner(mean=(0.0,), sd=0.5))


def batch(rows: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(rows, 3, 4, 4, generator=generator) for _ in range(2))
    text = Conditioning(tokens=torch.randn(rows, 5, 2, generator=generator))
    null_text = Conditioning(tokens=torch.zeros(1, 5, 2))
    return Batch(text=text, null_text=null_text, clean=clean, noise=noise, t=torch.rand(rows, generator=generator))


def hooks(module: nn.Module) -> int:
    return sum(len(each._forward_hooks) for each in module.modules())


# ------------------------------------------------------------------------------------------- hooks


def test_the_body_is_below_every_wrapper() -> None:
    one = denoiser()
    assert body(one) is one.network
    assert body(one.network) is one.network

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser = one

    assert body(Wrapper()) is one.network
    found = anatomy(Wrapper())
    assert found == Anatomy(names=("first", "several", "nothing", "unused", "last"), spec=None)


def test_outputs_are_captured_by_name() -> None:
    one, given = denoiser(), batch()
    with captured(one, ["last", "first", "several", "first"]) as found:
        predict(one, given, with_null=False)
    assert set(found) == {"last", "first", "several"}
    torch.testing.assert_close(found["several"], found["first"] + 1)  # of several tensors the first
    torch.testing.assert_close(found["last"], one.network.last(found["several"]))
    assert hooks(one) == 0


def test_of_several_calls_the_last_is_kept() -> None:
    one, given = denoiser(), batch()
    with captured(one, ["first"]) as found:
        predict(one, given, with_null=False)
        predict(one, given.rows(slice(0, 1)), with_null=False)
    assert len(found["first"]) == 1


def test_both_texts_give_two_rows_per_example() -> None:
    one, given = denoiser(), batch()
    with captured(one, ["first"]) as found:
        predict(one, given, with_null=True)
    assert len(found["first"]) == 4


def test_an_unknown_layer_offers_the_nearest_and_leaves_no_hook() -> None:
    one = denoiser()
    with pytest.raises(UsageError, match="did you mean 'first'"), captured(one, ["last", "frist"]):
        pytest.fail("must not be entered")
    assert hooks(one) == 0


@pytest.mark.parametrize("name", ["unused", "nothing"])
def test_a_layer_without_output_is_an_error(name: str) -> None:
    one = denoiser()
    with pytest.raises(NasError, match=f"no output at {name}"), captured(one, ["first", name]):
        predict(one, batch(), with_null=False)
    assert hooks(one) == 0


def test_hooks_are_removed_when_the_call_fails() -> None:
    one = denoiser()
    with captured(one, ["first", "last"]):
        assert hooks(one) == 2
        predict(one, batch(), with_null=False)
    with pytest.raises(RuntimeError, match="expected input"), captured(one, ["first", "last"]):
        one.network(torch.zeros(2, 7, 4, 4), torch.zeros(2), torch.zeros(2, 5, 2))
    assert hooks(one) == 0


def test_taps_have_one_key_for_both_sides() -> None:
    same, moved = Tap(student="a.0", teacher="a.0"), Tap(student="a.0", teacher="a.1")
    assert (same.key, moved.key) == ("a.0", "a.0=a.1")
    assert module_key(moved) == "a/0=a/1"  # names of submodules have no dots


def test_a_teacher_is_asked_at_its_own_layers_without_gradient() -> None:
    teacher, given = denoiser(), batch()
    tap = Tap(student="somewhere.else", teacher="first")
    said = answer(teacher, given, with_null=False, taps=(tap,))
    assert set(said.features) == {tap.key}
    assert not said.features[tap.key].requires_grad
    assert hooks(teacher) == 0


def test_gradients_flow_through_taps_to_the_student_only() -> None:
    student, teacher, given = denoiser(1), denoiser(2), batch()
    tap = Tap(student="first", teacher="first")
    with captured(student, ["first"]) as features:
        said = predict(student, given, with_null=False)
    ours = type(said)(velocity=said.velocity, features={tap.key: features["first"]})
    theirs = answer(teacher, given, with_null=False, taps=(tap,))
    objective("features")(ours, theirs, given)["features"].backward()
    assert {name for name, p in student.named_parameters() if p.grad is not None and float(p.grad.abs().max()) > 0} == {
        "network.first.weight",
        "network.first.bias",
    }
    assert all(p.grad is None for p in teacher.parameters())


# ------------------------------------------------------------------------------- our networks and diffusers'


@pytest.fixture(scope="module")
def unets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Network, UNet2DConditionModel]:
    """One small SDXL-shaped network as ours and as the class of diffusers, with equal weights."""
    folder = tmp_path_factory.mktemp("unet")
    spec = cases.unet(cases.KOALA)
    ours = cases.network(spec, cases.weights(spec))
    save_diffusers(folder, ours)
    return ours, UNet2DConditionModel.from_pretrained(folder).eval()


def test_equal_weights_give_equal_outputs_at_every_tap(unets: tuple[Network, UNet2DConditionModel]) -> None:
    ours, theirs = unets
    given = example_inputs(ours.spec, batch=2, generator=torch.Generator().manual_seed(0))
    each = [anatomy(net) for net in unets]
    settings = ({"points": "stages+mid"}, {"points": "blocks"}, {"points": "last"})
    losses = [objective("self_attention"), *(objective("features", **setting) for setting in settings)]
    names = sorted({tap.student for loss in losses for tap in loss.taps(each[0], each[1])})  # type: ignore[union-attr]
    assert ATTENTION in names
    with torch.no_grad(), captured(ours, names) as found, captured(theirs, names) as wanted:
        ours(**given)
        added = {"text_embeds": given["pooled"], "time_ids": given["size_ids"]}
        theirs(given["sample"], given["timestep"], given["text"], added_cond_kwargs=added)
    for name in names:
        assert found[name].shape == wanted[name].shape, name
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4, msg=name)
    assert found[ATTENTION].shape == (2, 64, 32)  # tokens [B, L, C] of a map of 8x8


def test_a_stage_taps_what_diffusers_calls_the_stages_output(unets: tuple[Network, UNet2DConditionModel]) -> None:
    _, theirs = unets
    shape = anatomy(theirs)
    taps = objective("features").taps(shape, shape)  # type: ignore[union-attr]
    stages = [".".join(tap.student.split(".")[:2]) for tap in taps]
    assert stages == [f"{side}_blocks.{stage}" for side in ("down", "up") for stage in range(3)]
    given = example_inputs(unets[0].spec, generator=torch.Generator().manual_seed(0))
    added = {"text_embeds": given["pooled"], "time_ids": given["size_ids"]}
    with torch.no_grad(), captured(theirs, [*stages, *(tap.student for tap in taps)]) as found:
        theirs(given["sample"], given["timestep"], given["text"], added_cond_kwargs=added)
    assert all(torch.equal(found[stage], found[tap.student]) for stage, tap in zip(stages, taps, strict=True))


def test_attention_of_a_transformer_is_that_of_diffusers(tmp_path) -> None:
    torch.manual_seed(0)
    theirs = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=12,
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_diffusers(tmp_path, text_tokens=5)
    given = example_inputs(ours.spec, generator=torch.Generator().manual_seed(0))
    names = [f"transformer_blocks.{i}.attn1.to_out.0" for i in range(2)] + ["transformer_blocks.1"]
    with torch.no_grad(), captured(ours, names) as found, captured(theirs, names) as wanted:
        ours(**given)
        nothing = {"resolution": None, "aspect_ratio": None}
        theirs(given["sample"], given["text"], given["timestep"], added_cond_kwargs=nothing)
    for name in names:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_joint_attention_of_ours_is_reached_by_its_last_projection() -> None:
    # Its module is never called as such: the block asks it for both streams.
    shape = {"x": (16, 8), "temb": (8,), "text": (5, 8)}
    settings = {"width": 8, "heads": 2, "kv_heads": 2, "ffn_ratio": 4}
    one = build_block(block("transformer_blocks.0", "mmdit_block", shape, **settings))
    parts = {name: torch.randn(2, *size) for name, size in shape.items()}
    with torch.no_grad(), captured(one, ["attn.to_out.0"]) as found:
        one(**parts)
    assert found["attn.to_out.0"].shape == (2, 16, 8)  # the image's tokens, not the text's
    with pytest.raises(NasError, match="no output at attn"), torch.no_grad(), captured(one, ["attn"]):
        one(**parts)


def test_a_joint_block_of_diffusers_gives_its_image(tmp_path) -> None:
    # It gives (text, image), and its last one no text at all.
    torch.manual_seed(0)
    widths = {"joint_attention_dim": 8, "caption_projection_dim": 16, "pooled_projection_dim": 8}
    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8, "patch_size": 2, "in_channels": 4}
    network = SD3Transformer2DModel(**shape, **widths, num_layers=2, pos_embed_max_size=8).eval()
    names = ["transformer_blocks.0", "transformer_blocks.1", "norm_out.norm"]
    with torch.no_grad(), captured(network, names) as found:
        network(torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8), torch.randn(2, 8), torch.tensor([3.0, 500.0]))
    assert found[names[0]].shape == found[names[1]].shape == (2, 16, 16)
    torch.testing.assert_close(network.norm_out.norm(found[names[1]]), found[names[2]])


# --------------------------------------------------------------------------------------- projections


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ((2, 3, 4, 4), (2, 5, 4, 4)),
        ((2, 3, 4, 4), (2, 5, 8, 8)),
        ((2, 3, 8, 6), (2, 5, 4, 3)),
        ((2, 16, 3), (2, 16, 5)),
        ((2, 16, 3), (2, 64, 5)),
        ((2, 3, 8, 8), (2, 16, 5)),
        ((2, 16, 3), (2, 5, 8, 8)),
    ],
)
def test_projections_give_the_teachers_shape(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    projection = Projection(student, teacher)
    assert projection(drawn(*student)).shape == teacher
    assert projection(drawn(7, *student[1:])).shape == (7, *teacher[1:])


def test_a_projection_maps_channels_of_tokens_as_a_linear_layer() -> None:
    projection, tokens = Projection((2, 16, 3), (2, 16, 5)), drawn(2, 16, 3)
    weight, bias = projection.map.weight.flatten(1), projection.map.bias
    torch.testing.assert_close(projection(tokens), tokens @ weight.T + bias)


def test_resizing_keeps_constants_and_shrinks_by_area() -> None:
    grow, shrink = Projection((1, 2, 4, 4), (1, 2, 8, 8)), Projection((1, 2, 4, 4), (1, 2, 2, 2))
    for projection in (grow, shrink):
        with torch.no_grad():
            projection.map.weight.copy_(torch.eye(2)[..., None, None])
            projection.map.bias.zero_()
    flat = torch.full((1, 2, 4, 4), 3.0)
    assert torch.equal(grow(flat), torch.full((1, 2, 8, 8), 3.0))
    feature = drawn(1, 2, 4, 4)
    torch.testing.assert_close(shrink(feature), nn.functional.avg_pool2d(feature, 2))


@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 15, 3), (2, 16, 5)), ((2, 3, 4, 4), (2, 12, 5)), ((2, 3), (2, 16, 5))]
)
def test_tokens_without_a_square_grid_are_refused(student: tuple[int, ...], teacher: tuple[int, ...]) -> None:
    with pytest.raises(NasError, match="no map and no square grid of tokens"):
        Projection(student, teacher)


def test_projections_are_made_where_shapes_differ_and_reproducibly() -> None:
    taps = [Tap(student="a.0", teacher="b.0"), Tap(student="c.0", teacher="c.0")]
    student = {"a.0": drawn(2, 3, 4, 4), "c.0": drawn(2, 5, 4, 4)}
    teacher = {"b.0": drawn(2, 7, 4, 4), "c.0": drawn(2, 5, 4, 4)}
    before = torch.get_rng_state()
    made = projections(taps, student, teacher, seed=3)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random state is left alone
    assert list(made) == [module_key(taps[0])]
    again, other = projections(taps, student, teacher, seed=3), projections(taps, student, teacher, seed=4)
    weights = [each[module_key(taps[0])].map.weight for each in (made, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_copy_of_a_tapped_network_has_no_hooks() -> None:
    one = denoiser()
    with captured(one, ["first"]):
        predict(one, batch(), with_null=False)
    assert hooks(copy.deepcopy(one)) == 0
