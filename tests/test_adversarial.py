"""Adversarial step distillation: optima in closed form, what is told from what, and where."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from game_cases import Data, Table, gradients, player
from gaussian_world import draws, sd_schedule
from torch import Tensor, nn

from nas.batches import Batch
from nas.diffusion import FLOW, FlowDenoiser, noised
from nas.distill import TrainSettings, train
from nas.errors import UsageError
from nas.objectives import adversarial, objective
from nas.objectives._heads import discriminator_loss, generator_loss, roughness


def nodes(mean: float, sd: float, count: int = 5_001) -> Tensor:
    """Quantiles of N(mean, sd^2): a mean over them is nearly its expectation."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return mean + sd * math.sqrt(2) * torch.erfinv(2 * share - 1)


class TestOptima:
    """Real N(0, 1) against generated N(1, 0.5^2)."""

    REAL, FAKE = nodes(0, 1), nodes(1, 0.5)

    @staticmethod
    def ratio(x: Tensor) -> Tensor:
        """log p_real - log p_fake."""
        return -(x**2) / 2 + (x - 1) ** 2 / (2 * 0.25) + math.log(0.5)

    def test_equal_distributions(self) -> None:
        none = torch.zeros(8)
        assert float(discriminator_loss(none, none, "softplus")) == pytest.approx(2 * math.log(2), abs=1e-6)
        assert float(discriminator_loss(none, none, "softplus")) == pytest.approx(1.386294, abs=1e-6)
        assert float(discriminator_loss(none, none, "hinge")) == 2

    def test_softplus_at_the_optimal_logit(self) -> None:
        found = discriminator_loss(self.ratio(self.REAL), self.ratio(self.FAKE), "softplus")
        assert float(found) == pytest.approx(0.938327, abs=2e-4)
        for change in (0.9, 1.1):  # and nothing near is better
            other = discriminator_loss(change * self.ratio(self.REAL), change * self.ratio(self.FAKE), "softplus")
            assert float(other) > float(found) + 1e-3

    def test_hinge_at_the_optimal_logit(self) -> None:
        real, fake = self.ratio(self.REAL).sign(), self.ratio(self.FAKE).sign()
        assert float(discriminator_loss(real, fake, "hinge")) == pytest.approx(0.906776, abs=2e-4)

    def test_a_quadratic_discriminator_learns_it(self) -> None:
        weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

        def logit(x: Tensor) -> Tensor:
            return weights[0] + weights[1] * x + weights[2] * x**2

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = discriminator_loss(logit(self.REAL), logit(self.FAKE), "softplus")
            loss.backward()
            return loss

        optimiser.step(closure)
        assert float(closure().detach()) == pytest.approx(0.938327, abs=2e-4)
        # log ratio: -x^2 / 2 + 2 (x - 1)^2 - ln 2 = (2 - ln 2) - 4 x + 1.5 x^2
        assert weights.tolist() == pytest.approx([2 - math.log(2), -4, 1.5], abs=0.01)

    def test_generators_losses_fall_with_the_logit(self) -> None:
        low, high = torch.tensor([-1.0]), torch.tensor([2.0])
        assert float(generator_loss(low, "hinge")) == 1
        assert float(generator_loss(high, "hinge")) == -2
        assert float(generator_loss(low, "softplus")) == pytest.approx(math.log1p(math.e))
        assert float(generator_loss(high, "softplus")) < float(generator_loss(low, "softplus"))


def test_roughness_is_the_squared_gradient_of_a_linear_discriminator() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, sd = torch.tensor([0.5, -1.0, 2.0]), 0.1
    x, noise = (torch.randn(200_000, 3, generator=generator) for _ in range(2))
    found = float(roughness(x @ weight, (x + sd * noise) @ weight))
    assert found == pytest.approx(sd**2 * float(weight.square().sum()), rel=0.02)


class Spy(nn.Module):
    """A discriminator that keeps what it is shown; its logit is the mean value."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[tuple[Tensor, Tensor]] = []

    def logits(self, teacher: Any, x: Tensor, t: Tensor, text: Any) -> Tensor:
        self.shown.append((x, t))
        return x.flatten(1).mean(1, keepdim=True)


def shown(**settings: Any) -> tuple[list[tuple[Tensor, Tensor]], Batch, Any]:
    """What the discriminator of a turn sees, real first, and the batch; the student answers 0 always.

    The batch's own field is what is compared with, not what the game asks for by its method.
    """
    game: Any = objective("adversarial", **settings)
    spy, table = Spy(), Table("adversarial", settings)
    table.partners = {"discriminator": spy}

    class Nothing(nn.Module):
        def denoise(self, x: Tensor, t: Tensor, text: Any) -> Tensor:
            return torch.zeros_like(x)

    table.student = Nothing()
    turn = table.scene()
    game.partner_loss("discriminator", turn)
    return spy.shown, turn.batch, table


class TestWhatIsShown:
    def test_real_is_data_and_never_zeros(self) -> None:
        (real, fake), batch, _ = shown()
        clean = batch.clean
        # What is left of the data after the noise is taken off: (x - t eps) / (1 - t), with eps from what was drawn.
        x, t = real
        wide = t.view(-1, 1, 1, 1)
        noise = (x - (1 - wide) * clean) / wide
        zeros_noise = x / wide  # what the noise would have to be if the real image were 0
        assert float(noise.std()) == pytest.approx(1, abs=0.1)
        assert float((noise - zeros_noise).abs().max()) > 0.3
        assert torch.equal(real[1], fake[1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adversarial, "renoised", lambda images, noise, t: images)
            (real, fake), batch, _ = shown()
        assert torch.equal(real[0], batch.clean)
        assert float(fake[0].abs().max()) == 0

    def test_noise_is_shared_only_where_it_is_asked_for(self) -> None:
        for shared in (False, True):
            (real, fake), batch, _ = shown(shared_noise=shared)
            t = real[1].view(-1, 1, 1, 1)
            # The student's image is 0, so the two differ by the data alone if the noise is shared.
            same = torch.allclose(real[0] - (1 - t) * batch.images_needed(), fake[0], atol=1e-5)
            assert same == shared

    def test_the_students_input_is_noised_data_at_its_levels(self) -> None:
        asked: list[tuple[Tensor, Tensor]] = []

        class Asked(nn.Module):
            def denoise(self, x: Tensor, t: Tensor, text: Any) -> Tensor:
                asked.append((x, t))
                return x

        game: Any = objective("adversarial", levels=(999, 499))
        table = Table("adversarial", {})
        table.student = Asked()
        big = Data()
        seen = set()
        for seed in range(8):
            game._generated(table.scene(seed=seed, batch=big.batch(seed)))
            x, t = asked[-1]
            seen |= set(t.tolist())
            clean, wide = big.batch(seed).images_needed(), t.view(-1, 1, 1, 1)
            assert float(((x - (1 - wide) * clean) / wide).std()) == pytest.approx(1, abs=0.15)
        assert seen == {1.0, 0.5}


class TestWhere:
    ROWS = 20_000

    def times(self, *, level: int = 749, schedule: Any = FLOW, **settings: Any) -> Tensor:
        game: Any = objective("adversarial", **settings)
        table = Table("adversarial", {})
        clean = torch.zeros(self.ROWS, 1, 1, 1)
        batch = replace(table.scene().batch, clean=clean)
        turn = replace(table.scene(), draws=draws(self.ROWS), batch=batch, schedule=schedule)
        return game._renoising(turn, torch.full((self.ROWS,), level))[0]

    @pytest.mark.parametrize(("mean", "sd"), [(-1.0, 1.0), (1.0, 1.0), (-2.0, 0.5)])
    def test_logit_normal(self, mean: float, sd: float) -> None:
        logits = torch.logit(self.times(renoise_mean=mean, renoise_sd=sd).double())
        assert float(logits.mean()) == pytest.approx(mean, abs=0.03)
        assert float(logits.std()) == pytest.approx(sd, abs=0.03)

    def test_low_noise_is_the_default(self) -> None:
        assert float(self.times().median()) == pytest.approx(1 / (1 + math.e), abs=0.01)

    def test_uniform(self) -> None:
        level = (1000 * self.times(renoise="uniform")).round() - 1
        assert (float(level.min()), float(level.max())) == (0, 999)
        assert float(level.mean()) == pytest.approx(499.5, abs=7)

    def test_previous_level_of_a_uniform_grid(self) -> None:
        for level, expected in ((999, 749), (749, 499), (249, 0), (100, 0)):
            times = self.times(renoise="previous", level=level)
            torch.testing.assert_close(times, torch.full_like(times, (expected + 1) / 1000))

    def test_a_teachers_own_range_is_kept(self) -> None:
        game: Any = objective("adversarial", renoise_mean=0.0, renoise_sd=6.0)
        table = Table("adversarial", {})
        known = sd_schedule()
        taught = FlowDenoiser(table.teacher.network, table.teacher.preconditioner)
        taught.__class__ = type("Known", (FlowDenoiser,), {"schedule": known})
        table.teacher = taught
        t = torch.cat([game._renoising(table.scene(seed=seed), torch.zeros(4).long())[0] for seed in range(30)])
        assert float(t.min()) == pytest.approx(known.least)
        assert float(t.max()) == pytest.approx(known.most)


class TestGradient:
    def test_it_flows_through_the_frozen_teacher(self) -> None:
        table = Table("adversarial", {})
        table.loss("").backward()
        assert max(float(g.abs().max()) for g in gradients(table.student)) > 1e-6
        assert gradients(table.teacher) == []

    def test_a_detached_teacher_would_leave_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = adversarial.Discriminator._features

        def detached(self: Any, *asked: Any) -> Any:
            return {name: feature.detach() for name, feature in plain(self, *asked).items()}

        monkeypatch.setattr(adversarial.Discriminator, "_features", detached)
        assert not Table("adversarial", {}).loss("").requires_grad

    def test_the_heads_alone_learn_on_a_teacher_and_the_copy_too_on_a_critic(self) -> None:
        for backbone in ("teacher", "critic"):
            table = Table("adversarial", {"backbone": backbone})
            names = {name.split(".")[0] for name, _ in table.partners["discriminator"].named_parameters()}
            assert names == ({"heads"} if backbone == "teacher" else {"heads", "own"})
            table.loss("discriminator").backward()
            assert gradients(table.teacher) == []

    def test_heads_are_one_per_layer(self) -> None:
        game: Any = objective("adversarial", layers=("mid_block.resnets.0", "conv_in"))
        student, teacher, batch = player(1), player(2, learns=False), Data().batch(0)
        made: Any = game.partners(student, teacher, batch)["discriminator"].module
        t = torch.full((4,), 0.3)
        logits = made.logits(teacher, noised(batch.images_needed(), batch.images_needed(), t), t, batch.text)
        assert logits.shape == (4, 2)
        with pytest.raises(UsageError, match="unknown layer"):
            objective("adversarial", layers=("mid_blok",)).partners(  # type: ignore[union-attr]
                student, teacher, batch
            )


class TestRoughness:
    def test_it_is_a_weighted_term_on_real_images(self) -> None:
        plain, rough = (Table("adversarial", {"roughness_weight": weight}) for weight in (0.0, 100.0))
        assert set(plain.terms("discriminator")) == {"gan"}
        terms = rough.terms("discriminator")
        assert set(terms) == {"gan", "roughness"}
        half = replace(rough.game, roughness_weight=50.0)  # type: ignore[type-var]
        rough.game = half
        assert float(rough.terms("discriminator")["roughness"].detach()) == pytest.approx(
            float(terms["roughness"].detach()) / 2
        )

    def test_a_discriminator_of_the_mean_has_its_noises(self) -> None:
        seen, batch, _ = shown(roughness_weight=1.0, roughness_noise=0.5)
        real, _, moved = seen
        assert torch.equal(real[1], moved[1])
        assert float((moved[0] - real[0]).std()) == pytest.approx(0.5, abs=0.05)
        assert len(batch) == len(real[0])


@pytest.mark.parametrize("kind", ["hinge", "softplus"])
def test_the_game_pulls_images_to_the_data(kind: str) -> None:
    class Shift(nn.Module):
        """A student that draws the data but for a constant too much."""

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(1.5))
            self.clean = torch.zeros(())

        def denoise(self, x: Tensor, t: Tensor, text: Any) -> Tensor:
            return self.shift + 0.5 * torch.roll(x, 1, 0) / (0.25 * (1 - t) ** 2 + t**2).sqrt().view(-1, 1, 1, 1)

    student = Shift()
    game: Any = objective("adversarial", gan_loss=kind, lr=1e-2, renoise_mean=0.0)
    settings = TrainSettings(steps=60, batch=4, lr=0.1, betas=(0.0, 0.99), warmup=1, decay_share=0.3)
    train(student, Data(), [game], settings, teacher=player(2, learns=False))
    assert abs(float(student.shift.detach())) < 0.5  # the data's mean is 0
