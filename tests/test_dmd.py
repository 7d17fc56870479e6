"""DMD2 against closed forms, its critic's GAN, and backward simulation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from gaussian_world import (
    Corners,
    Gaussian,
    GaussianData,
    Generator,
    corner_scene,
    double,
    draws,
    level_of,
    native,
    numeric,
    scene,
    sd_schedule,
    text_of,
)
from torch import Tensor, nn

from nas.batches import Batch
from nas.diffusion import FLOW, FlowDenoiser, Preconditioner
from nas.errors import NasError
from nas.features import Anatomy, anatomy
from nas.objectives import dmd, objective
from nas.objectives._heads import Head, Heads, encoder, middle
from nas.teachers import load_teacher

# The reference point: x_g = 0.4 + 1.5 z against N(-0.3, 0.7^2) at a = 0.8, s = 0.6.
SLOPE, SHIFT, MEAN, SD = 1.5, 0.4, -0.3, 0.7
A, S = 0.8, 0.6


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    with double():
        yield


def gradients(game: Any, *, slope: float = SLOPE, shift: float = SHIFT) -> tuple[float, float]:
    """The expected gradient of (shift, slope), the critic exact, with no weight w."""
    student = Generator(slope, shift, start=1.0)
    teacher, fake = (Gaussian(*each).requires_grad_(False) for each in ((MEAN, SD), (shift, abs(slope))))
    loss = game.student_loss(corner_scene(student, teacher, {"fake": fake}, Corners(2, level_of(A, S))))["dmd"]
    loss.backward()
    return numeric(student.shift), numeric(student.slope)


@pytest.fixture
def _unweighted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmd, "normaliser", lambda images, real: torch.ones(()))


@pytest.mark.usefixtures("_unweighted")
class TestGradient:
    def test_reference_numbers(self) -> None:
        assert gradients(objective("dmd", guidance=1.0)) == pytest.approx((0.374109, 0.501663), abs=5e-7)

    def test_it_is_that_of_the_kullback_leibler_divergence(self) -> None:
        slope, shift = (torch.tensor(value, requires_grad=True) for value in (SLOPE, SHIFT))
        real, fake = A**2 * SD**2 + S**2, A**2 * slope**2 + S**2
        divergence = 0.5 * (fake / real - (fake / real).log() + (A * (shift - MEAN)) ** 2 / real)
        divergence.backward()
        expected = (numeric(shift) * S**2 / A**2, numeric(slope) * S**2 / A**2)
        assert gradients(objective("dmd", guidance=1.0)) == pytest.approx(expected, rel=1e-12)

    def test_it_is_zero_at_the_teachers_distribution_alone(self) -> None:
        game = objective("dmd", guidance=1.0)
        for slope in (SD, -SD):
            assert gradients(game, slope=slope, shift=MEAN) == pytest.approx((0, 0), abs=1e-12)
        assert abs(gradients(game, slope=SD + 0.1, shift=MEAN)[1]) > 1e-2
        assert abs(gradients(game, slope=SD, shift=MEAN + 0.1)[0]) > 1e-2

    def test_guidance_is_the_teachers_alone(self) -> None:
        # Guided by k, the teacher's mean under a caption is m + k pull: there the gradient must vanish.
        student = Generator(SD, MEAN, start=1.0, pull=3.0 * 0.4)
        teacher = Gaussian(MEAN, SD, pull=0.4)
        fake = Gaussian(MEAN, SD, pull=3.0 * 0.4).requires_grad_(False)
        game: Any = objective("dmd", guidance=3.0)
        turn = corner_scene(student, teacher, {"fake": fake}, Corners(2, level_of(A, S)), caption=1.0)
        game.student_loss(turn)["dmd"].backward()
        assert numeric(student.pull) == pytest.approx(0, abs=1e-12)


def test_no_gradient_goes_through_the_scores() -> None:
    student = Generator(SLOPE, SHIFT, start=1.0)
    teacher, fake = Gaussian(MEAN, SD), Gaussian(SHIFT, SLOPE)
    game: Any = objective("dmd", guidance=1.0)
    game.student_loss(corner_scene(student, teacher, {"fake": fake}, Corners(2, 500.0)))["dmd"].backward()
    assert all(p.grad is None for p in (*teacher.parameters(), *fake.parameters()))


def test_the_gradient_at_an_image_is_the_normalised_difference_over_the_number_of_values() -> None:
    generator = torch.Generator().manual_seed(0)
    images, real, fake = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(3))
    images.requires_grad_()
    loss = dmd.matching_loss(images, real, fake)
    (gradient,) = torch.autograd.grad(loss.sum(), images)
    weight = 1 / (images - real).abs().mean((1, 2, 3), keepdim=True)
    difference = ((images - real) - (images - fake)) * weight
    torch.testing.assert_close(gradient, (difference / 32).detach())
    torch.testing.assert_close(loss, 0.5 * difference.square().mean((1, 2, 3)))


def test_levels_of_the_two_turns() -> None:
    asked: list[Tensor] = []

    class Asked(Gaussian):
        def denoise(self, x: Tensor, t: Tensor, text: Any) -> Tensor:
            asked.append(t)
            return super().denoise(x, t, text)

        velocity = denoise

    rows = 60_000
    game: Any = objective("dmd")
    student, fake = Generator(SLOPE, SHIFT, start=1.0), Asked(SHIFT, SLOPE)
    turn = corner_scene(student, Gaussian(MEAN, SD), {"fake": fake}, Corners(0, 0.0, uniform=(0.5,) * rows))
    turn = replace(turn, draws=draws(rows))
    game.student_loss(turn)
    game.partner_loss("fake", turn)
    for t, (low, high) in zip(asked, ((20, 979), (0, 999)), strict=True):
        level = (1000 * t).round() - 1
        assert (float(level.min()), float(level.max())) == (low, high)


def test_the_critic_fits_noise_without_guidance() -> None:
    student, teacher = Generator(SLOPE, SHIFT, start=1.0, pull=0.3), Gaussian(MEAN, SD)
    exact = Gaussian(SHIFT, SLOPE, pull=0.3)
    game: Any = objective("dmd", guidance=7.5)
    for offset in (0.0, 0.1):
        with torch.no_grad():
            exact.mean += offset
        turn = corner_scene(student, teacher, {"fake": exact}, Corners(2, level_of(A, S)), caption=1.0)
        game.partner_loss("fake", turn)["noise"].backward()
        found = [numeric(p) for p in exact.parameters()]
        if offset == 0:
            assert found == pytest.approx([0, 0, 0], abs=1e-12)
        else:
            assert found[0] > 1e-3
        exact.zero_grad()


class TestSteps:
    def test_backward_simulation(self) -> None:
        seen: list[tuple[float, float]] = []

        class Seen(Generator):
            def denoise(self, x: Tensor, t: Tensor, text: Any) -> Tensor:
                seen.append((float(x.detach()[0]), float(t[0])))
                return super().denoise(x, t, text)

        student = Seen(0.5, 0.2, start=1.0)
        noises = [torch.full((1, 1, 1, 1), value) for value in (2.0, -1.0, 3.0)]
        images = dmd.simulate(student, text_of(torch.zeros(1)), (1.0, 0.75, 0.5), noises)
        first = 0.2 + 0.5 * 2.0
        second_input = 0.25 * first + 0.75 * -1.0
        third_input = 0.5 * (0.2 + 0.5 * second_input) + 0.5 * 3.0
        assert seen == [
            pytest.approx((2.0, 1.0)),
            pytest.approx((second_input, 0.75)),
            pytest.approx((third_input, 0.5)),
        ]
        images.sum().backward()
        assert numeric(student.shift) == 1  # through the last call alone
        assert numeric(student.slope) == pytest.approx(third_input)

    def test_every_step_is_trained_and_the_batch_shares_it(self) -> None:
        asked: list[float] = []

        class Asked(Generator):
            def denoise(self, x: Tensor, t: Tensor, text: Any) -> Tensor:
                assert len(set(t.tolist())) == 1
                asked.append(round(float(t[0]), 6))
                return super().denoise(x, t, text)

        student = Asked(1.0, 0.0, start=1.0)
        game: Any = objective("dmd", levels=(999, 749, 499, 249))
        lengths = set()
        for seed in range(40):
            asked.clear()
            turn = scene(student, Gaussian(MEAN, SD), GaussianData(4).batch(0), {"fake": Gaussian(0.0, 1.0)}, seed=seed)
            game.student_loss(turn)
            assert asked == [1.0, 0.75, 0.5, 0.25][: len(asked)]
            lengths.add(len(asked))
        assert lengths == {1, 2, 3, 4}

    def test_it_starts_from_unit_noise_on_stable_diffusions_schedule_too(self) -> None:
        schedule = sd_schedule()
        game: Any = objective("dmd", levels=(999, 749, 499, 249))
        times, unit = game.sampling(schedule)
        assert unit
        assert times == pytest.approx(schedule.times(torch.tensor([999, 749, 499, 249])).tolist())
        assert game.sampling(FLOW, 2)[0] == pytest.approx((1.0, 0.5))
        seen: list[Tensor] = []

        class Seen(Generator):
            def denoise(self, x: Tensor, t: Tensor, text: Any) -> Tensor:
                seen.append(x / ((1 - t) ** 2 + t**2).sqrt().view(-1, 1, 1, 1))
                return super().denoise(x, t, text)

        turn = scene(
            Seen(1.0, 0.0, start=1.0),
            native(0.0, 1.0),
            GaussianData(4000).batch(0),
            {"fake": native(0.0, 1.0)},
            schedule=schedule,
        )
        objective("dmd").student_loss(turn)  # type: ignore[union-attr]
        drawn = draws(4000)
        drawn.integer(0, 1)  # which step
        torch.testing.assert_close(seen[0], drawn.normal(1, 1, 1))  # in the network's own scale


class Net(nn.Module):
    """Two layers with a UNet's names."""

    def __init__(self, channels: int = 4, side: int = 8) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(1, channels, 1)
        self.mid_block = nn.ModuleDict({"resnets": nn.ModuleList([nn.Conv2d(channels, channels, 1)])})
        self.out = nn.Conv2d(channels, 1, 1)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        middle_block: Any = self.mid_block
        return self.out(middle_block["resnets"][0](self.conv_in(sample)))


class TestGan:
    def setting(self, **settings: Any) -> tuple[Any, nn.Module, nn.Module, Any, Batch]:
        torch.manual_seed(0)
        game: Any = objective("dmd", gan_weight=1e-3, **settings)
        student, teacher = (FlowDenoiser(Net(), Preconditioner(mean=(0.0,), sd=0.5)) for _ in range(2))
        clean = torch.randn(4, 1, 8, 8)
        batch = Batch(text=text_of(torch.zeros(4)), null_text=text_of(torch.zeros(1)), clean=clean)
        critic: Any = game.partners(student, teacher.requires_grad_(False), batch)["fake"].module
        return game, student, teacher, critic, batch

    def test_its_terms_are_weighted_and_train_head_and_critic(self) -> None:
        game, student, teacher, critic, batch = self.setting()
        terms = game.partner_loss("fake", scene(student, teacher, batch, {"fake": critic}))
        assert set(terms) == {"noise", "gan"}
        terms["gan"].backward()
        assert all(p.grad is not None for p in critic.heads.parameters())
        assert critic.denoiser.network.mid_block["resnets"][0].weight.grad is not None
        assert all(p.grad is None for p in student.parameters())
        plain = replace(game, critic_gan_weight=1.0)
        other = plain.partner_loss("fake", scene(student, teacher, batch, {"fake": critic}))
        assert float(other["gan"].detach()) == pytest.approx(100 * float(terms["gan"].detach()))

    def test_the_students_gradient_goes_through_the_critic(self) -> None:
        game, student, teacher, critic, batch = self.setting()
        critic.requires_grad_(False)
        game.student_loss(scene(student, teacher, batch, {"fake": critic}))["gan"].backward()
        assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) > 0

    def test_without_it_there_is_no_head(self) -> None:
        game: Any = objective("dmd")
        teacher = FlowDenoiser(Net(), Preconditioner(mean=(0.0,), sd=0.5))
        critic: Any = game.partners(teacher, teacher, GaussianData(2).batch(0))["fake"].module
        assert {name.split(".")[0] for name, _ in critic.named_parameters()} == {"denoiser"}


class TestLayers:
    @pytest.mark.parametrize(("shape", "convolutions"), [((2, 64, 8, 8), 3), ((2, 64, 4, 4), 2), ((2, 64, 16, 16), 4)])
    def test_a_head_at_eight_by_eight_is_dmd2s(self, shape: tuple[int, ...], convolutions: int) -> None:
        head = Head(shape)
        kernels = [tuple(layer.kernel_size) for layer in head.layers if isinstance(layer, nn.Conv2d)]
        assert kernels[-2:] == [(4, 4), (1, 1)]
        assert len(kernels) == convolutions
        assert head(torch.randn(*shape)).shape == (2,)

    def test_small_features_and_tokens(self) -> None:
        features = {"a.b": torch.randn(2, 6, 1, 1), "c": torch.randn(2, 9, 5)}
        heads = Heads(features)
        logits = heads.logits(features)
        assert logits.shape == (2, 2)
        # Over one place too, different images get different logits: no norm takes everything away.
        assert abs(float((logits[0, 0] - logits[1, 0]).detach())) > 1e-4
        with pytest.raises(NasError, match="square grids of tokens"):
            Head((2, 7, 5))

    def test_which_layers(self) -> None:
        names = anatomy(load_teacher().denoiser)
        assert middle(names) == "mid_block.resnets.0"
        assert encoder(names) == ("down_blocks.0.attentions.0", "down_blocks.1.attentions.0", "mid_block.resnets.0")
        with pytest.raises(NasError, match="no mid_block"):
            middle(anatomy(nn.Sequential(nn.Linear(1, 1))))

    def test_diffusers_lists_attentions_before_residual_blocks(self) -> None:
        stages = {"down_blocks.0": 2, "down_blocks.1": 0, "mid_block": 1, "up_blocks.0": 0, "up_blocks.1": 3}
        names = [
            name
            for stage, attentions in stages.items()
            for name in (
                *(f"{stage}.attentions.{i}" for i in range(attentions)),
                *(f"{stage}.attentions.{i}.transformer_blocks.0.attn1" for i in range(attentions)),
                *(f"{stage}.resnets.{i}" for i in range(2)),
                f"{stage}.resnets.1.conv1",
            )
        ]
        found = encoder(Anatomy(names=tuple(names), spec=None))
        assert found == ("down_blocks.0.attentions.1", "down_blocks.1.resnets.1", "mid_block.resnets.1")
