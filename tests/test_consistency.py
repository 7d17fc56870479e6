"""Latent consistency against closed forms: grid, boundary, solver, fixed point."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gaussian_world import (
    Gaussian,
    GaussianData,
    Table,
    double,
    draws,
    native,
    null_text,
    partners_of,
    scene,
    sd_schedule,
    text_of,
)
from torch import Tensor, nn

from nas.diffusion import FLOW, Conditioning, FlowDenoiser, NativeDenoiser, Preconditioner, sample_few
from nas.distill import TrainSettings, train
from nas.objectives import consistency, objective

MEAN, SD = 0.7, 0.5  # of the data


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    with double():
        yield


def game(**settings: Any) -> Any:
    """Without guidance, unless it is asked for."""
    return objective("consistency", **{"w_min": 0.0, "w_max": 0.0, "distance": "squared", **settings})


class TestGrid:
    def test_points(self) -> None:
        start, end = consistency.solver_levels(torch.arange(1, 51), 50)
        assert start.tolist() == list(range(19, 1000, 20))
        assert end.tolist() == [0, *range(19, 980, 20)]  # 0 and not -1
        assert consistency.solver_levels(torch.tensor([1, 4]), 4)[0].tolist() == [249, 999]

    def test_every_point_is_trained(self) -> None:
        asked: list[Tensor] = []

        class Asked(Gaussian):
            def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
                asked.append(t)
                return super().denoise(x, t, text)

        student = Asked(MEAN, SD)
        turn = scene(student, Gaussian(MEAN, SD), GaussianData(4000).batch(0), {"target": Asked(MEAN, SD)})
        game().student_loss(turn)
        target, online = ((1000 * t).round().long() - 1 for t in asked)
        assert sorted(set(online.tolist())) == list(range(19, 1000, 20))
        assert bool((target == (online - 20).clamp_min(0)).all())
        assert torch.bincount((online + 1) // 20)[1:].double().std() < 15  # of 80 each: uniform

    def test_sampling_levels_are_diffusers(self) -> None:
        from diffusers import LCMScheduler

        scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        for steps in (1, 2, 3, 4, 8, 50):
            scheduler.set_timesteps(steps)
            assert consistency.sampling_levels(50, steps) == scheduler.timesteps.tolist()
        times, unit = game().sampling(sd_schedule(), 4)
        assert unit
        assert times == pytest.approx(sd_schedule().times(torch.tensor([999, 759, 499, 259])).tolist())


class TestBoundary:
    def test_scales_are_diffusers(self) -> None:
        from diffusers import LCMScheduler

        scheduler = LCMScheduler()
        for level in (0, 1, 19, 500, 999):
            theirs = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(float(level)))
            ours = consistency.boundary_scales(torch.tensor([float(level)]))
            assert [float(each) for each in ours] == pytest.approx([float(each) for each in theirs], rel=1e-6)
        # c_out without the factor sigma_data: 0.9999965 and not half of it (diffusers issue 8547).
        assert [float(each) for each in consistency.boundary_scales(torch.tensor([19.0]))] == pytest.approx(
            [6.93e-6, 0.9999965], rel=1e-3
        )

    def test_any_network_is_the_identity_at_level_zero_in_its_own_scale(self) -> None:
        torch.manual_seed(0)
        network = nn.Conv2d(1, 1, 1)

        def call(module: nn.Module, sample: Tensor, timestep: Tensor, text: Conditioning) -> Tensor:
            return module(sample)

        student = NativeDenoiser(network, sd_schedule(), call)
        x, level = torch.randn(5, 1, 1, 1), torch.zeros(5, dtype=torch.long)
        t = student.schedule.times(level)
        text = text_of(torch.zeros(5))
        native_x = x / ((1 - t) ** 2 + t**2).sqrt().view(-1, 1, 1, 1)
        found = consistency.consistent(student, x, t, level, text, lcm=True)
        torch.testing.assert_close(found, native_x, rtol=0, atol=1e-6)
        plain = consistency.consistent(student, x, t, level, text, lcm=False)
        assert float((plain - native_x).abs().max().detach()) > 0.01
        # At the first point of the grid it is the network's answer already.
        level = torch.full((5,), 19)
        t = student.schedule.times(level)
        found, plain = (consistency.consistent(student, x, t, level, text, lcm=each) for each in (True, False))
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)

    def test_rectified_flow_has_its_own(self) -> None:
        assert game()._lcm(sd_schedule())
        assert not game()._lcm(FLOW)
        assert game(boundary="lcm")._lcm(FLOW)
        network = FlowDenoiser(nn.Conv2d(1, 1, 1), Preconditioner(mean=(0.0,), sd=0.5))
        network.velocity = lambda x, t, text: torch.ones_like(x)  # type: ignore[method-assign]
        x, t = torch.randn(3, 1, 1, 1), torch.full((3,), 1e-9)
        found = consistency.consistent(network, x, t, torch.zeros(3), text_of(torch.zeros(3)), lcm=False)
        torch.testing.assert_close(found, x, rtol=0, atol=1e-8)


class TestSolver:
    def test_ddim_multiplies_the_centred_state(self) -> None:
        teacher = Gaussian(MEAN, SD)
        x, t, until = torch.tensor([2.0, -1.0]).view(2, 1, 1, 1), torch.full((2,), 0.7), torch.full((2,), 0.4)
        stepped = consistency.solver_step(x, t, until, teacher.velocity(x, t, text_of(torch.zeros(2))))
        factor = (0.6 * 0.3 * SD**2 + 0.4 * 0.7) / (0.3**2 * SD**2 + 0.7**2)
        torch.testing.assert_close(stepped, 0.6 * MEAN + factor * (x - 0.3 * MEAN))

    @pytest.mark.parametrize(
        ("steps", "sd"), [(1, 0.0), (2, 0.2), (4, 0.340541), (8, 0.414785), (16, 0.455683), (64, 0.488555)]
    )
    def test_published_error_of_uniform_steps(self, steps: int, sd: float) -> None:
        teacher, x = Gaussian(MEAN, SD), torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
        for step in range(steps, 0, -1):
            t, until = (torch.full((2,), each / steps) for each in (step, step - 1))
            x = consistency.solver_step(x, t, until, teacher.velocity(x, t, text_of(torch.zeros(2))))
        assert float((x[1] - x[0]).detach()) == pytest.approx(sd, abs=5e-7)
        assert float(x[0].detach()) == pytest.approx(MEAN)  # noise of 0 is the mean's

    def test_the_prediction_of_the_teacher_does_not_matter(self) -> None:
        x, t, until = torch.randn(4, 1, 1, 1), *sd_schedule().times(torch.tensor([[999] * 4, [979] * 4]))
        text = text_of(torch.zeros(4))
        stepped = [
            consistency.solver_step(x, t, until, native(MEAN, SD, kind).velocity(x, t, text))
            for kind in ("noise", "velocity", "clean")
        ]
        torch.testing.assert_close(stepped[1], stepped[0])
        torch.testing.assert_close(stepped[2], stepped[0])


def fixed_point(points: int, teacher: nn.Module, table: Table) -> Table:
    """The student that agrees with the teacher's steps all the way down: the product of the DDIM multipliers."""
    asked: Any = teacher
    schedule, text = table.schedule, text_of(torch.zeros(2))
    probe = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)  # in native scale
    with torch.no_grad():
        for number in range(1, points + 1):
            level, end = consistency.solver_levels(torch.full((2,), number), points)
            t, until = schedule.times(level), schedule.times(end)
            x = probe * ((1 - t) ** 2 + t**2).sqrt().view(-1, 1, 1, 1)
            before = consistency.solver_step(x, t, until, asked.velocity(x, t, text))
            f = consistency.consistent(table, before, until, end, text, lcm=True).flatten()
            skip, out = (float(scale[0]) for scale in consistency.boundary_scales(level.double()))
            table.intercept[level[0]], table.slope[level[0]] = f[0] / out, (f[1] - f[0] - skip) / out
    return table


def function_at(table: Table, level: int) -> tuple[float, float]:
    """Slope and intercept of the student's consistency function, in native scale."""
    skip, out = (float(scale) for scale in consistency.boundary_scales(torch.tensor(float(level))))
    slope, intercept = table.slope.detach()[level], table.intercept.detach()[level]
    return float(skip + out * slope), float(out * intercept)


class TestFixedPoint:
    def test_product_at_fifty_points(self) -> None:
        table = fixed_point(50, native(MEAN, SD), Table(sd_schedule()))
        assert function_at(table, 999) == (
            pytest.approx(0.47703471598716, abs=1e-9),
            pytest.approx(0.676907123, abs=1e-8),
        )

    @pytest.mark.parametrize(
        ("points", "sd"), [(10, 0.39977), (20, 0.44471), (50, 0.47620), (100, 0.48799), (200, 0.49423), (500, 0.49805)]
    )
    def test_error_of_the_solver_falls_with_the_points(self, points: int, sd: float) -> None:
        schedule = sd_schedule()
        assert schedule.alpha_bar is not None
        table = fixed_point(points, native(MEAN, SD), Table(schedule))
        marginal = schedule.alpha_bar[999] * SD**2 + 1 - schedule.alpha_bar[999]
        assert function_at(table, 999)[0] * float(marginal) ** 0.5 == pytest.approx(sd, abs=6e-6)

    def test_the_loss_and_its_gradient_vanish_there_and_nowhere_near(self) -> None:
        teacher = native(MEAN, SD)
        student, target = (fixed_point(50, teacher, Table(sd_schedule())) for _ in range(2))
        for nudge in (0.0, 1e-3):
            with torch.no_grad():
                student.slope[499] += nudge
            student.zero_grad()
            turn = scene(student, teacher, GaussianData(512, mean=MEAN, sd=SD).batch(0), {"target": target})
            loss = game().student_loss(turn)["consistency"]
            loss.backward()
            assert student.slope.grad is not None
            if nudge == 0:
                assert float(loss.detach()) < 1e-20
                assert float(student.slope.grad.abs().max()) < 1e-10
            else:
                assert float(loss.detach()) > 1e-9
                assert (student.slope.grad.abs() > 1e-8).nonzero().flatten().tolist() == [499]

    def test_training_reaches_it(self) -> None:
        class Whitened(Table):
            """The table in units in which every level's data has variance one, so that all learn equally fast."""

            def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
                level, wide = self.level(t), t.view(-1, 1, 1, 1)
                norm = ((1 - wide) ** 2 + wide**2).sqrt()
                a, s = (1 - wide) / norm, wide / norm
                whitened = (x / norm - a * MEAN) / (a**2 * SD**2 + s**2).sqrt()
                return self.slope[level].view(-1, 1, 1, 1) * whitened + self.intercept[level].view(-1, 1, 1, 1)

        teacher, student = native(MEAN, SD), Whitened(sd_schedule())
        wanted = fixed_point(5, teacher, Table(sd_schedule()))
        each, data = game(points=5, ema=0.8), GaussianData(64, mean=MEAN, sd=SD)
        partners = partners_of(each, student, teacher, data.batch(0))
        target: Any = partners["target"]
        optimiser = torch.optim.SGD(student.parameters(), lr=1.5)
        for step in range(200):
            each.student_loss(scene(student, teacher, data.batch(step), partners, seed=step))["consistency"].backward()
            optimiser.step()
            optimiser.zero_grad()
            with torch.no_grad():
                for old, new in zip(target.parameters(), student.parameters(), strict=True):
                    old.lerp_(new, 1 - each.ema)
        probe, t = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), sd_schedule().times(torch.tensor([999, 999]))
        found, exact = (each.denoise(probe, t, text_of(torch.zeros(2))) for each in (student, wanted))
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)


class TestGuidance:
    PULL = 0.6

    def loss(self, each: Any, caption_mean: float, *, w_seed: int = 0) -> float:
        """The loss of a student that is the fixed point of the teacher whose mean is `caption_mean`."""
        teacher = native(MEAN, SD, pull=self.PULL)
        student = fixed_point(50, native(caption_mean, SD), Table(sd_schedule()))
        data = GaussianData(256, mean=MEAN, sd=SD, caption=1.0).batch(0)
        turn = scene(student, teacher, data, {"target": student}, seed=w_seed)
        return float(each.student_loss(turn)["consistency"].detach())

    @pytest.mark.parametrize("w", [0.0, 1.5, 7.0])
    def test_w_is_one_less_than_the_usual_scale(self, w: float) -> None:
        guided = MEAN + (w + 1) * self.PULL
        assert self.loss(game(w_min=w, w_max=w), guided) < 1e-18
        for wrong in (w, w + 2):
            assert self.loss(game(w_min=w, w_max=w), MEAN + wrong * self.PULL) > 1e-6

    def test_w_zero_is_the_unguided_solver(self) -> None:
        assert self.loss(game(), MEAN + self.PULL) < 1e-18

    def test_w_is_drawn_from_its_range(self) -> None:
        drawn: list[Tensor] = []

        class Asked(Gaussian):
            def velocity(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
                # The caption's answer is 1 and the other 0, so the guided one is the scale itself.
                return text.tokens.view(-1, 1, 1, 1).expand_as(x)

        student = Gaussian(MEAN, SD)
        data = GaussianData(4000, caption=1.0).batch(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                consistency, "solver_step", lambda x, t, until, velocity: drawn.append(velocity.flatten()) or x
            )
            each = game(w_min=2.0, w_max=14.0)
            each.student_loss(scene(student, Asked(MEAN, SD), data, {"target": student}))
        assert float(drawn[0].min()) == pytest.approx(3, abs=0.02)
        assert float(drawn[0].max()) == pytest.approx(15, abs=0.02)
        assert float(drawn[0].mean()) == pytest.approx(9, abs=0.2)


class TestExactModel:
    """The consistency function in closed form, sampled."""

    @pytest.mark.parametrize("steps", [1, 2, 4])
    def test_noising_again_keeps_the_distribution(self, steps: int) -> None:
        class Exact(Gaussian):
            def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
                t = t.view(-1, 1, 1, 1)
                return MEAN + SD * ((1 - t) ** 2 * SD**2 + t**2).rsqrt() * (x - (1 - t) * MEAN)

        rows = 100_000
        times, unit = game().sampling(FLOW, steps)
        images = sample_few(
            Exact(MEAN, SD),
            text_of(torch.zeros(rows)),
            times=times,
            shape=(1, 1, 1),
            generator=torch.Generator().manual_seed(0),
            unit_start=unit,
        )
        assert float(images.mean()) == pytest.approx(MEAN, abs=0.005)
        assert float(images.std()) == pytest.approx(SD, abs=0.005)


def test_pseudo_huber() -> None:
    online, target = torch.tensor([0.0, 3.0, 1e-6]), torch.zeros(3)
    found = consistency.distance(online, target, "huber", 1e-3)
    assert found.tolist() == pytest.approx([0, math.hypot(3, 1e-3) - 1e-3, 1e-12 / 2e-3], rel=1e-3)
    assert consistency.distance(online, target, "squared", 1e-3).tolist() == pytest.approx([0, 9, 1e-12])


class TestTarget:
    def test_it_is_an_average_of_the_student_in_eval_mode(self) -> None:
        class Drops(Gaussian):
            modes: tuple[bool, ...] = ()

            def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
                type(self).modes += (self.training,)
                return super().denoise(x, t, text)

        student, teacher = Drops(0.1, 0.4), Gaussian(MEAN, SD).requires_grad_(False)
        each = game(ema=0.9)
        settings = TrainSettings(steps=3, batch=8, lr=1e-2, warmup=1)
        train(student, GaussianData(8), [each], settings, teacher=teacher)
        assert Drops.modes == (False, True) * 3  # the target's call, then the student's

    def test_ema_arithmetic(self) -> None:
        start = Gaussian(0.0, 1.0)
        partner = game(ema=0.95).partners(start, Gaussian(MEAN, SD), None)["target"]
        assert partner.follows == 0.95
        assert partner.lr is None
        assert partner.module is not start
        # n updates towards one value leave mu^n of the start.
        average = 0.0
        for _ in range(10):
            average = partner.follows * average + (1 - partner.follows) * 1.0
        assert average == pytest.approx(1 - 0.95**10)

    def test_no_gradient_reaches_it(self) -> None:
        student, target = Gaussian(0.1, 0.4), Gaussian(0.1, 0.4)
        turn = scene(student, Gaussian(MEAN, SD), GaussianData(8).batch(0), {"target": target})
        game().student_loss(turn)["consistency"].backward()
        assert all(p.grad is None for p in target.parameters())
        assert student.mean.grad is not None


def test_the_teachers_null_caption_is_the_batches() -> None:
    told: list[Tensor] = []

    class Told(Gaussian):
        def velocity(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
            told.append(text.tokens.flatten())
            return super().velocity(x, t, text)

    data = GaussianData(2, caption=0.5).batch(0)
    student = Gaussian(MEAN, SD)
    game(w_min=1.0, w_max=1.0).student_loss(scene(student, Told(MEAN, SD), data, {"target": student}))
    assert told[0].tolist() == [0.5, 0.5, 0.0, 0.0]
    assert null_text().tokens.tolist() == [[[0.0]]]
    assert draws(2).total == 2
