"""Losses against closed forms: least squares, regression of a mixture, SnapGen's identities, equivalent predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from loss_cases import FEATURES, batch, of_features, outputs, value
from torch import Tensor, nn
from torch.distributions import Normal, SigmoidTransform, TransformedDistribution
from torch.nn import functional

from nas.batches import Batch, Outputs
from nas.diffusion import Conditioning, NativeDenoiser, Schedule, convert, noised, rectified_flow, variance_preserving
from nas.distill import predict
from nas.features import Projection
from nas.objectives import objective
from nas.objectives.multi_level import balanced, data_share

DOUBLE = torch.float64


def minimised(parameters: Iterable[Tensor], loss: Callable[[], Tensor]) -> float:
    """The smallest value of a convex loss."""
    optimiser = torch.optim.LBFGS(
        list(parameters), max_iter=400, tolerance_grad=1e-14, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        found = loss()
        found.backward()
        return found

    optimiser.step(closure)
    return float(loss().detach())


def times_of(t: Tensor, clean: Tensor, noise: Tensor) -> Batch:
    """A batch of given images, noise and times."""
    return replace(batch(rows=len(t), dtype=clean.dtype), clean=clean, noise=noise, t=t, images=None)


# ---------------------------------------------------------------------------------- least squares (O10)


@pytest.mark.parametrize("residual", [0.0, 0.3], ids=["in span", "not in span"])
def test_a_projection_trained_alone_reaches_least_squares(residual: float) -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(6, 3, 4, 4, generator=generator, dtype=DOUBLE)
    mixing = torch.randn(5, 3, generator=generator, dtype=DOUBLE)
    rest = torch.randn(6, 5, 4, 4, generator=generator, dtype=DOUBLE)
    wanted = torch.einsum("ds,bshw->bdhw", mixing, given) + 0.7 + residual * rest
    torch.manual_seed(0)
    projection = Projection(given.shape, wanted.shape).double()
    each, examples = objective("features"), batch(rows=6)
    loss = minimised(
        projection.parameters(), lambda: value(each, *of_features([projection(given)], [wanted]), examples)
    )
    columns = torch.cat([given.movedim(1, -1).reshape(-1, 3), torch.ones(96, 1, dtype=DOUBLE)], dim=1)
    targets = wanted.movedim(1, -1).reshape(-1, 5)
    best = torch.linalg.lstsq(columns, targets).solution
    assert loss == pytest.approx(float((targets - columns @ best).square().mean()), rel=1e-9, abs=1e-20)
    torch.testing.assert_close(projection.map.weight.flatten(1), best[:3].T, rtol=1e-6, atol=1e-8)
    assert (loss > 1e-3) == (residual > 0)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_an_affine_student_of_a_mixture_learns_its_regression(t: float) -> None:
    # Data +-m: x0* = m tanh(a m x / s^2). The quantiles of both halves stand for the expectation.
    m, a, s, count = 1.5, 1 - t, t, 4000
    quantiles = Normal(0, 1).icdf((torch.arange(count, dtype=DOUBLE) + 0.5) / count)
    clean = torch.cat([torch.full_like(quantiles, m), torch.full_like(quantiles, -m)]).view(-1, 1, 1, 1)
    noise = torch.cat([quantiles, quantiles]).view(-1, 1, 1, 1)
    given = times_of(torch.full((2 * count,), t, dtype=DOUBLE), clean, noise)
    x, _ = given.point()
    teacher = Outputs(velocity=(x - m * torch.tanh(a * m * x / s**2)) / t)
    slope, intercept = (torch.zeros((), dtype=DOUBLE, requires_grad=True) for _ in range(2))
    for name in ("output", "task"):
        minimised(
            (slope, intercept),
            lambda name=name: value(objective(name), Outputs(velocity=slope * x + intercept), teacher, given),
        )
        target = teacher.velocity if name == "output" else given.velocity
        covariance = ((x - x.mean()) * (target - target.mean())).mean()
        found, offset = float(slope.detach()), float(intercept.detach())
        assert found == pytest.approx(float(covariance / x.var(correction=0)), rel=1e-8)
        # Cov(x0*, x) = Cov(x0, x) = a m^2, so teacher and data lead to the same best affine student.
        clean_slope = a * m**2 / (a**2 * m**2 + s**2)
        assert found == pytest.approx((1 - clean_slope) / t, abs=2e-3)
        assert offset == pytest.approx(0, abs=1e-8)


def test_masking_beyond_everything_is_plain_distillation() -> None:
    student, teacher, given = outputs(1, grad=True), outputs(2), batch()
    plain = value(objective("features"), student, teacher, given)
    wide = value(objective("features", mask_sd=1e6), student, teacher, given)
    assert float(plain.detach()) == float(wide.detach())
    narrow = value(objective("features", mask_sd=1.0), student, teacher, given)
    assert float(narrow.detach()) < 0.7 * float(plain.detach())
    found = [torch.autograd.grad(loss, student.features[next(iter(FEATURES))])[0] for loss in (plain, wide)]
    assert torch.equal(found[0], found[1])


# ------------------------------------------------------------------------------------- SnapGen's S (O10)


def test_the_datas_share_is_the_logit_normal_density_over_its_maximum() -> None:
    density = TransformedDistribution(Normal(torch.tensor(0.0, dtype=DOUBLE), 1), SigmoidTransform())
    t = torch.linspace(0.001, 0.999, 9999, dtype=DOUBLE)
    rho = density.log_prob(t).exp()
    # The maximum is at 1/2, so dividing by it brings the density to [0, 1].
    assert float(t[rho.argmax()]) == 0.5
    assert float(rho.max()) == pytest.approx(4 / math.sqrt(2 * math.pi))
    torch.testing.assert_close(data_share(t), rho / rho.max(), rtol=1e-10, atol=1e-12)
    assert data_share(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0, 1, 0], abs=1e-30)


def test_balanced_losses_have_the_value_of_the_datas_loss() -> None:
    student, teacher, given = outputs(1, dtype=DOUBLE), outputs(2, dtype=DOUBLE), batch(dtype=DOUBLE)
    terms = objective("multi_level")(student, teacher, given)
    task = float(value(objective("task"), student, None, given))
    assert {name: float(term) for name, term in terms.items()} == {
        "task_and_output": pytest.approx(task, rel=1e-14),
        "task_and_features": pytest.approx(task, rel=1e-14),
    }
    terms = objective("multi_level", scale_features=False)(student, teacher, given)
    assert float(terms["task_and_output"]) == pytest.approx(task, rel=1e-14)
    assert float(terms["features"]) == pytest.approx(float(value(objective("features"), student, teacher, given)))


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_balanced_gradients_do_not_see_the_scale_of_the_teachers_loss(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, generator=generator, dtype=DOUBLE, requires_grad=True)
    data, taught = (torch.randn(4, generator=generator, dtype=DOUBLE) for _ in range(2))
    share = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=DOUBLE)

    def gradient(factor: float) -> Tensor:
        loss = balanced((weight - data) ** 2, factor * (weight - taught) ** 2, share).sum()
        return torch.autograd.grad(loss, weight)[0]

    torch.testing.assert_close(gradient(scale), gradient(1.0), rtol=1e-10, atol=0)
    # d S = alpha dL_task + (1 - alpha) (L_task / L_kd) dL_kd, in closed form.
    error, taught_error = (weight - data).detach(), (weight - taught).detach()
    expected = share * 2 * error + (1 - share) * error**2 / taught_error**2 * 2 * taught_error
    torch.testing.assert_close(gradient(1.0), expected)


def test_balanced_features_do_not_see_the_features_units() -> None:
    given, each = batch(dtype=DOUBLE), objective("multi_level")

    def gradients(factor: float) -> list[Tensor]:
        student, teacher = (outputs(seed, dtype=DOUBLE, grad=seed == 1) for seed in (1, 2))
        scaled = [
            replace(side, features={key: factor * feature for key, feature in side.features.items()})
            for side in (student, teacher)
        ]
        loss = value(each, scaled[0], scaled[1], given)
        return list(torch.autograd.grad(loss, list(student.features.values())))

    torch.testing.assert_close(gradients(1000.0), gradients(1.0), rtol=1e-10, atol=0)


def test_the_middle_of_the_schedule_follows_the_data_and_its_ends_the_teacher() -> None:
    def gradient(t: float) -> tuple[Tensor, Tensor, Tensor]:
        student, teacher = outputs(1, dtype=DOUBLE, grad=True), outputs(2, dtype=DOUBLE)
        given = replace(batch(dtype=DOUBLE), t=torch.full((4,), t, dtype=DOUBLE))
        loss = objective("multi_level")(student, teacher, given)["task_and_output"]
        (found,) = torch.autograd.grad(loss, student.velocity)
        plain = student.velocity.detach()
        return found.flatten(), (plain - given.velocity).flatten(1), (plain - teacher.velocity).flatten(1)

    found, to_data, to_teacher = gradient(0.5)
    torch.testing.assert_close(found, (2 * to_data / to_data.numel()).flatten())
    found, to_data, to_teacher = gradient(1e-4)
    ratio = to_data.square().mean(1, keepdim=True) / to_teacher.square().mean(1, keepdim=True)
    torch.testing.assert_close(found, (2 * ratio * to_teacher / to_teacher.numel()).flatten())


def test_a_student_that_equals_its_teacher_is_left_to_the_data() -> None:
    given = batch(dtype=DOUBLE)
    student, teacher = outputs(1, dtype=DOUBLE, grad=True), outputs(1, dtype=DOUBLE)
    terms = objective("multi_level")(student, teacher, given)
    task = (student.velocity - given.velocity).square().flatten(1).mean(1)
    torch.testing.assert_close(terms["task_and_output"], (data_share(given.t) * task).mean())
    sum(terms.values()).backward()
    assert all(bool(tensor.grad.isfinite().all()) for tensor in (student.velocity, *student.features.values()))
    # So near to its teacher that the ratio overflows: still finite.
    tiny = torch.full((1,), 1e-44)
    assert float(balanced(torch.ones(1), tiny, torch.full((1,), 0.25))) == 0.25


def test_every_example_is_balanced_on_its_own() -> None:
    student, teacher, given = (make(dtype=DOUBLE) for make in (partial(outputs, 1), partial(outputs, 2), batch))
    # One example's teacher is a thousand times further away than the others'.
    far = torch.tensor([1000.0, 1, 1, 1], dtype=DOUBLE).view(-1, 1, 1, 1)
    moved = replace(teacher, velocity=student.velocity + far * (teacher.velocity - student.velocity))

    def gradient(side: Outputs) -> Tensor:
        leaf = student.velocity.clone().requires_grad_()
        loss = objective("multi_level")(replace(student, velocity=leaf), side, given)["task_and_output"]
        return torch.autograd.grad(loss, leaf)[0]

    torch.testing.assert_close(gradient(moved)[1:], gradient(teacher)[1:], rtol=1e-10, atol=0)


def test_rows_without_a_caption_count_with_their_example() -> None:
    # Where both texts are asked, features have a second row per example: first all with, then all without a caption.
    student, teacher, given = (make(dtype=DOUBLE) for make in (partial(outputs, 1), partial(outputs, 2), batch))
    key = next(iter(FEATURES))
    taught = torch.cat([teacher.features[key], outputs(3, dtype=DOUBLE).features[key]])
    far = torch.cat([taught[:5], 1000 * taught[5:6], taught[6:]])  # example 1 without its caption

    def gradient(wanted: Tensor) -> Tensor:
        leaf = torch.cat([student.features[key]] * 2).requires_grad_()
        sides = replace(student, features={key: leaf}), replace(teacher, features={key: wanted})
        return torch.autograd.grad(objective("multi_level")(*sides, given)["task_and_features"], leaf)[0]

    near, moved = gradient(taught).view(2, 4, -1), gradient(far).view(2, 4, -1)
    others = [0, 2, 3]
    torch.testing.assert_close(moved[:, others], near[:, others], rtol=1e-10, atol=0)
    assert float((moved[0, 1] - near[0, 1]).norm()) > 0.1 * float(near[0, 1].norm())


# --------------------------------------------------------------------------- equivalent predictions (O11)


class Function(nn.Module):
    """One denoising function as a network that predicts `kind` at the fractional level of a schedule."""

    def __init__(self, schedule: Schedule, sharpness: float) -> None:
        super().__init__()
        self.schedule, self.sharpness = schedule, sharpness

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        assert self.schedule.alpha_bar is not None
        grid = self.schedule.alpha_bar.log()
        below = timestep.floor().long().clamp(0, len(grid) - 2)
        alpha_bar = torch.lerp(grid[below], grid[below + 1], timestep - below).exp().view(-1, 1, 1, 1)
        clean = torch.tanh(self.sharpness * sample + text.mean((1, 2)).view(-1, 1, 1, 1))
        return convert(clean, "clean", self.schedule.prediction, sample, variance_preserving(alpha_bar))


def native(kind: str, sharpness: float) -> NativeDenoiser:
    # Stable Diffusion 1.x: betas rise linearly in their root from 0.00085 to 0.012.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=DOUBLE) ** 2
    schedule = Schedule(prediction=kind, alpha_bar=(1 - betas).cumprod(0))  # type: ignore[arg-type]
    return NativeDenoiser(Function(schedule, sharpness), schedule)


@pytest.mark.parametrize("space", ["velocity", "noise", "clean"])
def test_prediction_types_of_one_function_give_one_loss(space: str) -> None:
    given = batch(dtype=DOUBLE)
    answers: dict[str, tuple[Any, Any]] = {
        kind: tuple(predict(native(kind, sharp), given, with_null=True) for sharp in (0.5, 0.8))
        for kind in ("noise", "velocity", "clean")
    }
    each = objective("output", space=space)
    losses = [float(value(each, answers[ours][0], answers[theirs][1], given)) for ours in answers for theirs in answers]
    assert losses == pytest.approx([losses[0]] * 9, rel=1e-10)
    # What it must be, from the function itself: x0 is tanh of the input in the schedule's own scale.
    x, t = given.point()
    scaled = x / ((1 - t) ** 2 + t**2).sqrt().view(-1, 1, 1, 1)
    texts = (given.text, given.null_text.like(given.text))
    errors = [
        (torch.tanh(0.5 * scaled + shift) - torch.tanh(0.8 * scaled + shift)).square().flatten(1).mean(1)
        for shift in (text.tokens.mean((1, 2)).view(-1, 1, 1, 1) for text in texts)
    ]
    factor = {"velocity": 1 / t**2, "noise": ((1 - t) / t) ** 2, "clean": torch.ones(4, dtype=DOUBLE)}[space]
    assert losses[0] == pytest.approx(float((factor * (errors[0] + errors[1]) / 2).mean()), rel=1e-10)


@pytest.mark.parametrize("name", ["output", "task"])
@pytest.mark.parametrize("space", ["noise", "clean"])
def test_a_space_is_the_difference_of_such_predictions(name: str, space: str) -> None:
    given = batch(dtype=DOUBLE)
    student, teacher = (outputs(seed, dtype=DOUBLE, null=False) for seed in (1, 2))
    x, t = given.point()
    at = rectified_flow(t.view(-1, 1, 1, 1))
    target = teacher.velocity if name == "output" else given.velocity
    ours, theirs = (convert(each, "velocity", space, x, at) for each in (student.velocity, target))  # type: ignore[arg-type]
    loss = value(objective(name, space=space), student, teacher, given)
    torch.testing.assert_close(loss, functional.mse_loss(ours, theirs))
    if name == "task":  # eps and x0 that were mixed in, not only something consistent with itself
        torch.testing.assert_close(theirs, given.noise if space == "noise" else given.clean)


def test_noise_of_the_same_function_is_the_same_in_both_schedules() -> None:
    # BK-SDM compares the noise predictions of a variance-preserving network; x0 and eps are schedule-free.
    given = batch(dtype=DOUBLE)
    networks = [native("noise", sharpness) for sharpness in (0.5, 0.8)]
    outer = [predict(each, given, with_null=False) for each in networks]
    x, t = given.point()
    norm = ((1 - t) ** 2 + t**2).sqrt()
    level, _ = networks[0].schedule.nearest(((1 - t) / norm) ** 2)
    inner = [each.network(x / norm.view(-1, 1, 1, 1), level, given.text.tokens) for each in networks]
    loss = value(objective("output", space="noise"), *outer, given)
    torch.testing.assert_close(loss, functional.mse_loss(*inner), rtol=1e-9, atol=0)


def test_a_batch_may_bring_the_noised_images_alone() -> None:
    given = batch()
    x, _ = given.point()
    assert torch.equal(x, noised(given.clean, given.noise, given.t))
    bare = Batch(text=given.text, null_text=Conditioning(tokens=torch.zeros(1, 5, 2)), x=x, t=given.t)
    each = objective("output", space="noise")
    assert torch.equal(value(each, outputs(1), outputs(2), bare), value(each, outputs(1), outputs(2), given))
