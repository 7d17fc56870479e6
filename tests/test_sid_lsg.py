"""SiD-LSG against closed forms: gradients, guidance, who learns from what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from gaussian_world import (
    Corners,
    Gaussian,
    Generator,
    corner_scene,
    double,
    draws,
    level_of,
    native,
    null_text,
    numeric,
    sd_schedule,
    text_of,
)
from torch import Tensor

from nas.diffusion import FLOW, noised
from nas.objectives import objective, sid_lsg
from nas.objectives._asking import guided_answers, noise_error

# The reference point: x_g = 0.4 + 1.5 z against N(-0.3, 0.7^2) at a = 0.8, s = 0.6.
SLOPE, SHIFT, MEAN, SD = 1.5, 0.4, -0.3, 0.7
A, S = 0.8, 0.6
M_REAL, M_FAKE = A**2 * SD**2 + S**2, A**2 * SLOPE**2 + S**2
T_INIT = 0.626  # of level 625 in rectified flow


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    with double():
        yield


def unguided(**settings: Any) -> Any:
    kappas = {f"kappa{i}": 1.0 for i in range(1, 5)}
    return objective("sid_lsg", **{**kappas, **settings})


def gradients(game: Any, *, slope: float = SLOPE, shift: float = SHIFT) -> tuple[float, float]:
    """The expected gradient of (slope, shift), the fake score exact and frozen, with no weight w."""
    student = Generator(slope, shift, start=T_INIT)
    teacher, fake = (Gaussian(*each).requires_grad_(False) for each in ((MEAN, SD), (shift, slope)))
    loss = game.student_loss(corner_scene(student, teacher, {"fake": fake}, Corners(2, level_of(A, S))))["sid"]
    loss.backward()
    return numeric(student.slope), numeric(student.shift)


def closed_form(alpha: float, slope: float = SLOPE, shift: float = SHIFT) -> tuple[float, float]:
    real, fake = M_REAL, A**2 * slope**2 + S**2
    by_slope = 2 * slope * S**4 * (1 / real - 1 / fake) * ((1 - alpha) / real + alpha / fake)
    by_shift = (shift - MEAN) * S**4 / real * ((2 - 2 * alpha) / real + (2 * alpha - 1) / fake)
    return by_slope, by_shift


@pytest.fixture
def _unweighted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sid_lsg, "normaliser", lambda images, real: torch.ones(()))


@pytest.mark.usefixtures("_unweighted")
class TestGradient:
    @pytest.mark.parametrize(
        ("alpha", "by_slope", "by_shift"),
        [(0.0, 0.536219, 0.325057), (0.5, 0.368442, 0.199940), (1.0, 0.200665, 0.074822), (1.2, 0.133554, 0.024775)],
    )
    def test_reference_numbers(self, alpha: float, by_slope: float, by_shift: float) -> None:
        found = gradients(unguided(alpha=alpha))
        assert found == pytest.approx((by_slope, by_shift), abs=5e-7)
        assert found == pytest.approx(closed_form(alpha), rel=1e-12)

    def test_it_is_zero_at_the_teachers_distribution_alone(self) -> None:
        for alpha in (0.5, 1.0, 1.2):
            assert gradients(unguided(alpha=alpha), slope=SD, shift=MEAN) == pytest.approx((0, 0), abs=1e-12)
            assert gradients(unguided(alpha=alpha), slope=-SD, shift=MEAN)[1] == pytest.approx(0, abs=1e-12)
            assert abs(gradients(unguided(alpha=alpha), slope=SD, shift=MEAN + 0.1)[1]) > 1e-3

    def test_half_is_the_gradient_of_the_fisher_divergence(self) -> None:
        slope, shift = (torch.tensor(value, requires_grad=True) for value in (SLOPE, SHIFT))
        fake = A**2 * slope**2 + S**2
        offset, spread = (shift - MEAN) * S**2 / M_REAL, S**2 / A * (1 / fake - 1 / M_REAL)
        (offset**2 + spread**2 * fake).backward()
        found = gradients(unguided(alpha=0.5))
        assert (2 * found[0], 2 * found[1]) == pytest.approx((numeric(slope), numeric(shift)), rel=1e-12)

    def test_alpha_above_one_turns_round_far_away(self) -> None:
        # The wrong sign begins at M_f = 6 M_r for the slope and 3.5 M_r for the shift.
        for times, expected in ((5.9, 1), (6.1, -1)):
            slope = ((times * M_REAL - S**2) / A**2) ** 0.5
            assert gradients(unguided(alpha=1.2), slope=slope)[0] * expected > 0
            assert gradients(unguided(alpha=1.0), slope=slope)[0] > 0
        for times, expected in ((3.4, 1), (3.6, -1)):
            slope = ((times * M_REAL - S**2) / A**2) ** 0.5
            assert gradients(unguided(alpha=1.2), slope=slope)[1] * expected > 0

    def test_the_value_at_alpha_one_says_nothing(self) -> None:
        student = Generator(SLOPE, SHIFT, start=T_INIT)
        players = Gaussian(MEAN, SD), {"fake": Gaussian(SHIFT, SLOPE)}
        losses = {
            alpha: float(
                unguided(alpha=alpha)
                .student_loss(corner_scene(student, *players, Corners(2, level_of(A, S))))["sid"]
                .detach()
            )
            for alpha in (0.0, 1.0)
        }
        assert losses[1.0] == pytest.approx(0, abs=1e-12)
        assert losses[0.0] > 0.1

    def test_three_paths_lead_to_the_generator(self) -> None:
        whole = gradients(unguided(alpha=1.0))
        for blind in ("fake", "teacher", "images"):
            student = Generator(SLOPE, SHIFT, start=T_INIT)
            players = {"teacher": _Blind(MEAN, SD), "fake": _Blind(SHIFT, SLOPE)}
            if blind in players:
                players[blind].blind = True
            game = unguided(alpha=1.0)
            turn = corner_scene(student, players["teacher"], {"fake": players["fake"]}, Corners(2, level_of(A, S)))
            with pytest.MonkeyPatch.context() as patch:
                if blind == "images":
                    patch.setattr(sid_lsg, "generator_loss", _of_detached_images)
                game.student_loss(turn)["sid"].backward()
            assert abs(numeric(student.slope) - whole[0]) > 1e-2, blind


_loss = sid_lsg.generator_loss


def _of_detached_images(images: Tensor, *rest: Tensor, alpha: float) -> Tensor:
    return _loss(images.detach(), *rest, alpha=alpha)


class _Blind(Gaussian):
    """A denoiser that can be made to let no gradient through to its input."""

    blind = False

    def denoise(self, x: Tensor, t: Tensor, text: Any) -> Tensor:
        return super().denoise(x.detach() if self.blind else x, t, text)


class TestGuidance:
    PULL = 0.6

    def turn(self, game: Any, student: Generator, fake: Gaussian, **corners: Any) -> Any:
        teacher = Gaussian(MEAN, SD, pull=self.PULL)
        return corner_scene(student, teacher, {"fake": fake}, Corners(2, level_of(A, S), **corners), caption=1.0)

    @pytest.mark.parametrize(
        ("kappa1", "kappa2", "kappa4", "effective"),
        [(1, 1, 1, 1), (1, 1, 4.5, 4.5), (4.5, 4.5, 4.5, 4.5), (1, 0.5, 1, 2), (2, 2, 2, 2), (1, 2, 2, 1)],
    )
    def test_effective_guidance(self, kappa1: float, kappa2: float, kappa4: float, effective: float) -> None:
        game = objective("sid_lsg", kappa1=kappa1, kappa2=kappa2, kappa3=kappa2, kappa4=kappa4)
        assert effective == pytest.approx(kappa4 * kappa1 / kappa2)
        for factor in (1.0, 0.9, 1.1):
            pull = factor * effective * self.PULL
            student = Generator(SD, MEAN, start=T_INIT, pull=pull)
            # Trained inside guidance kappa1, the fake score says pull / kappa1: there its loss has no gradient. Rows
            # with and without a caption, so that both of its answers are looked at.
            fake = Gaussian(MEAN, SD, pull=pull / kappa1)
            uniform = (0.05, 0.5)
            game.partner_loss("fake", self.turn(game, student, fake, uniform=uniform))["noise"].backward()
            assert [numeric(p) for p in fake.parameters()] == pytest.approx([0, 0, 0], abs=1e-12)
            game.student_loss(self.turn(game, student, fake))["sid"].backward()
            if factor == 1:
                assert numeric(student.pull) == pytest.approx(0, abs=1e-12)
            else:
                assert numeric(student.pull) * (factor - 1) > 1e-3

    def test_a_fake_score_trained_in_guidance_is_exact_in_it(self) -> None:
        x, t = torch.linspace(-2, 2, 5).view(-1, 1, 1, 1), torch.full((5,), 0.4)
        text = text_of(torch.ones(5))
        fake, exact = Gaussian(MEAN, SD, pull=0.9 / 3), Gaussian(MEAN, SD, pull=0.9)
        guided = guided_answers(fake.denoise, x, t, text, null_text(), 3.0)[0]
        torch.testing.assert_close(guided, exact.denoise(x, t, text))

    def test_all_ones_is_plain_sid_and_asks_no_one_without_a_caption(self) -> None:
        # With equal answers for every caption, guidance changes nothing; without guidance nobody is asked twice.
        student = Generator(SLOPE, SHIFT, start=T_INIT)
        teacher, fake = _Counting(MEAN, SD), _Counting(SHIFT, SLOPE)
        for kappa, rows in ((1.0, 4), (3.0, 8)):
            game = objective("sid_lsg", **{f"kappa{i}": kappa for i in range(1, 5)})
            turn = corner_scene(student, teacher, {"fake": fake}, Corners(2, level_of(A, S)))
            found = game.student_loss(turn)["sid"]  # type: ignore[union-attr]
            assert (teacher.rows, fake.rows) == (rows, rows)
            plain = _plain_sid(student, teacher, fake)
            torch.testing.assert_close(found, plain)

    def test_teacher_equal_to_fake_gives_neither_value_nor_gradient(self) -> None:
        for kappa in (1.0, 3.0):
            game: Any = objective("sid_lsg", **{f"kappa{i}": kappa for i in range(1, 5)})
            student = Generator(SLOPE, SHIFT, start=T_INIT, pull=0.2)
            loss = game.student_loss(self.turn(game, student, Gaussian(MEAN, SD, pull=self.PULL)))["sid"]
            loss.backward()
            assert float(loss.detach()) == 0
            assert [numeric(p) for p in student.parameters()] == pytest.approx([0, 0, 0], abs=1e-14)

    @pytest.mark.parametrize(("kappa1", "dropped"), [(1.0, False), (2.0, True)])
    def test_captions_are_dropped_before_the_generator_and_only_under_guidance(
        self, kappa1: float, dropped: bool
    ) -> None:
        game = unguided(kappa1=kappa1)
        student = _Told(SD, MEAN, start=T_INIT)
        turn = self.turn(game, student, Gaussian(MEAN, SD), uniform=(0.0999, 0.1001))
        game.partner_loss("fake", turn)
        assert student.told[0] == pytest.approx([0.0] * 4 + [1.0] * 4 if dropped else [1.0] * 8)
        game.student_loss(self.turn(game, student, Gaussian(MEAN, SD), uniform=(0.0, 0.0)))
        assert student.told[1] == [1.0] * 8  # never in the generator's own turn


class _Counting(Gaussian):
    rows = 0

    def denoise(self, x: Tensor, t: Tensor, text: Any) -> Tensor:
        self.rows = len(x)
        return super().denoise(x, t, text)


class _Told(Generator):
    """A generator that remembers what captions it was given."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.told: list[list[float]] = []

    def denoise(self, x: Tensor, t: Tensor, text: Any) -> Tensor:
        self.told.append(text.tokens.flatten().tolist())
        return super().denoise(x, t, text)


def _plain_sid(student: Generator, teacher: Gaussian, fake: Gaussian) -> Tensor:
    """SiD at alpha = 1 written out: mean of w (y - f) (f - x)."""
    corners = Corners(2, level_of(A, S))
    z, eps = corners.normal(1, 1, 1), corners.normal(1, 1, 1)
    t = torch.full((4,), S / (A + S))
    images = student.shift + student.slope * z
    x = (1 - t).view(-1, 1, 1, 1) * images + t.view(-1, 1, 1, 1) * eps
    text = text_of(torch.zeros(4))
    real, said = teacher.denoise(x, t, text), fake.denoise(x, t, text)
    return ((real - said) * (said - images) / (images - real).abs()).mean()


def test_the_weight_carries_no_gradient_and_has_a_floor() -> None:
    images = torch.tensor([2.0, 3.0], requires_grad=True).view(2, 1, 1, 1)
    real, fake = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1), torch.tensor([0.0, 2.0]).view(2, 1, 1, 1)
    loss = sid_lsg.generator_loss(images, real, fake, fake, alpha=1.0)
    # (y - f)(f - x) / |x - y|: the second image equals the teacher's, where the weight is 1 / 1e-5.
    assert loss.tolist() == pytest.approx([1 * (0 - 2) / 1, 1 * (2 - 3) / 1e-5])
    (gradient,) = torch.autograd.grad(loss.sum(), images)
    assert gradient.flatten().tolist() == pytest.approx([-1.0, -1e5])


def test_the_loss_is_a_sum_over_pixels_and_scales_with_neither_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    images, real, fake = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(3))
    whole = sid_lsg.generator_loss(images, real, fake, fake, alpha=0.5)
    by_hand = (real - fake) * ((real - images) - 0.5 * (real - fake))
    weight = 1 / (images - real).abs().mean((1, 2, 3))
    torch.testing.assert_close(whole, weight * by_hand.sum((1, 2, 3)))


def test_an_example_that_is_not_a_number_is_dropped_and_spoils_no_other() -> None:
    good = torch.tensor([2.0, 0.5], requires_grad=True)
    real = torch.tensor([1.0, torch.nan])
    four = [each.view(2, 1, 1, 1) for each in (good, real, torch.zeros(2), torch.zeros(2))]
    loss = sid_lsg.generator_loss(*four, alpha=1.0)
    alone = sid_lsg.generator_loss(*(each[:1] for each in four), alpha=1.0)
    assert loss.tolist() == [float(alone.detach()), 0.0]
    loss.sum().backward()
    assert good.grad is not None
    assert bool(good.grad.isfinite().all())
    assert float(good.grad[1]) == 0
    # Where nothing is left the loss says so, and training stops.
    lost = sid_lsg.generator_loss(*(each[1:] for each in four), alpha=1.0)
    assert bool(lost.isnan().all())


def test_a_teacher_that_breaks_on_one_image_costs_that_image_alone() -> None:
    class Breaks(Gaussian):
        def denoise(self, x: Tensor, t: Tensor, text: Any) -> Tensor:
            # The square root of a negative number: not a number, and neither is its gradient.
            return super().denoise(x, t, text) + 0 * (x[..., :1] - x.detach().min() - 1e-9).sqrt()

    student = Generator(SLOPE, SHIFT, start=T_INIT)
    game = unguided()
    turn = corner_scene(student, Breaks(MEAN, SD), {"fake": Gaussian(SHIFT, SLOPE)}, Corners(2, level_of(A, S)))
    loss = game.student_loss(turn)["sid"]
    loss.backward()
    assert bool(loss.isfinite())
    assert all(torch.isfinite(torch.tensor(numeric(p))) for p in (student.slope, student.shift))


def test_levels_are_uniform_from_t_min_to_below_t_max() -> None:
    asked: list[Tensor] = []

    class Asked(Gaussian):
        def denoise(self, x: Tensor, t: Tensor, text: Any) -> Tensor:
            asked.append(t)
            return super().denoise(x, t, text)

        velocity = denoise

    game = unguided()
    rows = 20_000
    student, fake = Generator(SLOPE, SHIFT, start=T_INIT), Asked(SHIFT, SLOPE)
    turn = corner_scene(student, Gaussian(MEAN, SD), {"fake": fake}, Corners(0, 0.0, uniform=(0.5,) * rows))
    turn = replace(turn, draws=draws(rows))
    game.student_loss(turn)
    game.partner_loss("fake", turn)
    for t in asked:
        level = (1000 * t).round() - 1
        assert (float(level.min()), float(level.max())) == (20, 979)
        assert float(level.mean()) == pytest.approx(499.5, abs=6)


def test_the_generators_input_is_a_zero_image_noised() -> None:
    inputs: list[tuple[float, float]] = []

    class Seen(Generator):
        def denoise(self, x: Tensor, t: Tensor, text: Any) -> Tensor:
            inputs.append((float(x.abs().max()), float(t[0])))
            return super().denoise(x, t, text)

    game = unguided()
    turn = corner_scene(
        Seen(1.0, 0.0, start=1.0), Gaussian(MEAN, SD), {"fake": Gaussian(SHIFT, SLOPE)}, Corners(2, 500.0)
    )
    game.student_loss(turn)
    assert inputs == [pytest.approx((T_INIT, T_INIT))]
    # On Stable Diffusion's schedule that is s z at s / a = 2.5017, SiD's sigma.
    schedule = sd_schedule()
    (t,), unit = game.sampling(schedule)
    assert not unit
    assert t / (1 - t) == pytest.approx(2.5017, abs=1e-4)
    assert t / ((1 - t) ** 2 + t**2) ** 0.5 == pytest.approx(0.9286, abs=1e-4)


def test_several_steps_noise_the_last_image_and_all_carry_gradient() -> None:
    assert sid_lsg.generator_levels(625, 1) == [625]
    assert sid_lsg.generator_levels(625, 4) == [625, 468, 312, 156]
    student = Generator(0.5, 0.2, start=1.0)
    first, second = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), -1.0)
    images = sid_lsg.generate(student, text_of(torch.zeros(1)), (0.6, 0.3), (first, second))
    once = 0.2 + 0.5 * (0.6 * 2.0)
    assert float(images.detach()) == pytest.approx(0.2 + 0.5 * (0.7 * once + 0.3 * -1.0))
    images.sum().backward()
    assert numeric(student.shift) == pytest.approx(1 + 0.5 * 0.7)  # through both calls


def test_the_fake_loss_is_the_error_in_noise_whatever_the_network_predicts() -> None:
    generator = torch.Generator().manual_seed(1)
    images, noise = (torch.randn(3, 2, 4, 4, generator=generator) for _ in range(2))
    t = FLOW.times(torch.tensor([30, 500, 940]))
    said = torch.randn(3, 2, 4, 4, generator=generator)
    velocity = (noise + said) - (images - said * (t / (1 - t)).view(-1, 1, 1, 1))  # errs by `said` in eps
    torch.testing.assert_close(noise_error(velocity, images, noise, t), said.square().sum((1, 2, 3)))
    # An eps network and a v network of the same function: weight a^2 on v, which is what eps = x + (1 - t) u does.
    times = sd_schedule().times(torch.tensor([30, 500, 940]))
    noisy = noised(images, noise, times)
    of_noise, of_velocity = (
        noise_error(native(0.1, 0.8, kind).velocity(noisy, times, text_of(torch.zeros(3))), images, noise, times)
        for kind in ("noise", "velocity")
    )
    torch.testing.assert_close(of_noise, of_velocity)
