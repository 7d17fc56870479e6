"""Rectified flow against closed forms: every expected number here comes from the Gaussian's algebra, not from a run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from nas.diffusion import (
    Coefficients,
    Conditioning,
    FlowDenoiser,
    NativeDenoiser,
    Preconditioner,
    Schedule,
    clean_and_noise,
    convert,
    guided,
    noised,
    rectified_flow,
    sample,
    sample_few,
    sample_times,
    to_rectified_flow,
    to_variance_preserving,
    variance_preserving,
)
from nas.errors import NasError

KINDS = ("clean", "noise", "velocity", "score")


class Gaussian:
    """The exact denoiser of N(mean, sd^2 I) in any schedule (O1); its mean may be shifted by the text."""

    def __init__(self, mean: float, sd: float) -> None:
        self.mean, self.sd = mean, sd

    def clean(self, x: Tensor, at: Coefficients, mean: Tensor | float) -> Tensor:
        return mean + at.a * self.sd**2 / (at.a**2 * self.sd**2 + at.s**2) * (x - at.a * mean)

    def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        mean = self.mean + text.tokens.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return self.clean(x, rectified_flow(t.view(-1, 1, 1, 1)), mean)


class Zero(nn.Module):
    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return torch.zeros_like(sample)


class Echo(nn.Module):
    """Returns its input and remembers how it was called."""

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.seen = (sample.shape, timestep)
        return sample


def schedules() -> list[Coefficients]:
    t = torch.tensor([0.03, 0.2, 0.5, 0.9], dtype=torch.float64).view(-1, 1, 1, 1)
    angle = t * math.pi / 2
    # An arbitrary third schedule (a = 2 - t^2, s = 3 t) exercises the general Wronskian form.
    odd = Coefficients(a=2 - t**2, s=3 * t, da=-2 * t, ds=torch.full_like(t, 3))
    return [rectified_flow(t), variance_preserving(angle.cos() ** 2), odd]


def told(*shape: int, value: float = 0.0) -> Conditioning:
    return Conditioning(tokens=torch.full(shape, value))


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(4, 3, 4, 4, generator=generator, dtype=torch.float64)
    return clean, torch.randn(4, 3, 4, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("at", schedules(), ids=["rf", "vp", "odd"])
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("to", KINDS)
def test_every_conversion_matches_the_definition(at: Coefficients, source: str, to: str) -> None:
    clean, noise = pair()
    x = at.a * clean + at.s * noise
    truth = {"clean": clean, "noise": noise, "velocity": at.da * clean + at.ds * noise, "score": -noise / at.s}
    torch.testing.assert_close(convert(truth[source], source, to, x, at), truth[to], rtol=1e-10, atol=1e-10)  # type: ignore[arg-type]


def test_velocity_is_the_time_derivative() -> None:
    clean, noise = pair()
    t, step = torch.tensor(0.3, dtype=torch.float64), 1e-6
    after, before = rectified_flow(t + step), rectified_flow(t - step)
    slope = ((after.a * clean + after.s * noise) - (before.a * clean + before.s * noise)) / (2 * step)
    x = rectified_flow(t).a * clean + t * noise
    torch.testing.assert_close(convert(clean, "clean", "velocity", x, rectified_flow(t)), slope, rtol=0, atol=1e-8)
    torch.testing.assert_close(x, noised(clean, noise, t.expand(4)))


def test_vp_velocity_is_the_usual_v() -> None:
    clean, noise = pair()
    at = schedules()[1]
    x = at.a * clean + at.s * noise
    torch.testing.assert_close(convert(clean, "clean", "velocity", x, at), at.a * noise - at.s * clean)


def test_loss_equivalences() -> None:
    clean, noise = pair()
    other, t = clean + 0.1 * noise, torch.tensor(0.3, dtype=torch.float64)
    at = rectified_flow(t)
    x = at.a * clean + at.s * noise

    def gap(kind: str) -> Tensor:
        return (convert(clean, "clean", kind, x, at) - convert(other, "clean", kind, x, at)).square().sum()  # type: ignore[arg-type]

    torch.testing.assert_close(gap("velocity"), gap("clean") / t**2)
    torch.testing.assert_close(gap("noise"), (1 - t) ** 2 * gap("velocity"))


def test_zero_terminal_snr_is_refused_for_noise_only() -> None:
    x = torch.ones(1, 1, 1, 1)
    at = rectified_flow(torch.tensor(1.0))
    with pytest.raises(NasError, match="signal coefficient is 0"):
        clean_and_noise(x, "noise", x, at)
    clean, _ = clean_and_noise(x * 3, "velocity", x, at)
    assert clean.item() == -2.0


def test_unknown_prediction_is_named() -> None:
    x = torch.ones(1, 1, 1, 1)
    with pytest.raises(NasError, match="'epsilon'"):
        convert(x, "epsilon", "clean", x, rectified_flow(torch.tensor(0.5)))  # type: ignore[arg-type]
    with pytest.raises(NasError, match="'v'"):
        convert(x, "clean", "v", x, rectified_flow(torch.tensor(0.5)))  # type: ignore[arg-type]


def test_teacher_of_another_schedule_gives_the_same_clean_image() -> None:
    exact = Gaussian(0.7, 0.5)
    alpha_bar = torch.tensor([0.99, 0.5, 0.04, 0.005], dtype=torch.float64).view(-1, 1, 1, 1)
    vp = variance_preserving(alpha_bar)
    clean, noise = pair()
    x = vp.a * clean + vp.s * noise
    x_rf, t = to_rectified_flow(x, vp)
    in_vp, in_rf = exact.clean(x, vp, exact.mean), exact.clean(x_rf, rectified_flow(t), exact.mean)
    torch.testing.assert_close(in_rf, in_vp, rtol=1e-12, atol=1e-12)
    back, alpha_back = to_variance_preserving(x_rf, t)
    torch.testing.assert_close(back, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alpha_back, alpha_bar, rtol=1e-12, atol=1e-12)


def test_stable_diffusion_grid_point() -> None:
    from diffusers import DDPMScheduler

    grid = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    at = variance_preserving(grid[625].double())
    assert float(at.s / at.a) == pytest.approx(2.5017, abs=5e-5)


@pytest.mark.parametrize("patch", [1, 2])
def test_without_a_network_the_preconditioner_is_the_exact_gaussian_denoiser(patch: int) -> None:
    mean = (-0.7, 0.1, 0.4)
    denoiser = FlowDenoiser(Zero(), Preconditioner(mean=mean, sd=0.35), patch=patch)
    x, _ = pair()
    t = torch.tensor([1e-3, 0.2, 0.7, 1.0], dtype=torch.float64)
    wanted = Gaussian(0.0, 0.35).clean(
        x, rectified_flow(t.view(-1, 1, 1, 1)), torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1)
    )
    torch.testing.assert_close(denoiser.denoise(x, t, told(4, 1, 1)), wanted, rtol=1e-10, atol=1e-10)


def test_preconditioned_input_and_target_have_variance_one() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = 4000
    clean = 0.2 + 0.35 * torch.randn(rows, 1, 2, 2, generator=generator)
    noise = torch.randn(rows, 1, 2, 2, generator=generator)
    pre = Preconditioner(mean=(0.2,), sd=0.35)
    for value in (0.05, 0.5, 0.95):
        t = torch.full((rows,), value)
        x = noised(clean, noise, t)
        target = (noise - clean - pre.skip(x, t)) / pre.output_scale(x, t)
        assert float(pre.network_input(x, t).var()) == pytest.approx(1, abs=0.05)
        assert float(target.var()) == pytest.approx(1, abs=0.05)


def test_denoiser_folds_pixels_and_scales_time() -> None:
    network, pre = Echo(), Preconditioner(mean=(0.3,), sd=0.35)
    denoiser = FlowDenoiser(network, pre, patch=2)
    x, t = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0.25, 0.5])
    out = denoiser(x, t, told(2, 1, 1))
    shape, timestep = network.seen
    assert shape == (2, 12, 2, 2)
    assert timestep.tolist() == [250.0, 500.0]
    torch.testing.assert_close(out, pre.skip(x, t) + pre.output_scale(x, t) * pre.network_input(x, t))
    torch.testing.assert_close(denoiser.denoise(x, t, told(2, 1, 1)), x - t.view(-1, 1, 1, 1) * out)


def test_times_are_inside_and_half_of_them_shifted() -> None:
    times = sample_times(20000, torch.Generator().manual_seed(0))
    assert float(times.min()) > 0
    assert float(times.max()) < 1
    logits = torch.logit(times.double())
    assert float(logits[0::2].mean()) == pytest.approx(0, abs=0.05)
    assert float(logits[1::2].mean()) == pytest.approx(1.2, abs=0.06)
    assert float(logits[1::2].std()) == pytest.approx(1.3, abs=0.06)


# Standard deviation after N uniform Euler steps of the exact denoiser of N(0.7, 0.5^2), distillation notes O3.
@pytest.mark.parametrize(("steps", "sd"), [(1, 0.0), (2, 0.2), (4, 0.340541), (8, 0.414785), (16, 0.455683)])
def test_sampler_has_the_closed_form_solver_error(steps: int, sd: float) -> None:
    text = told(64, 1, 1)
    exact, shape = Gaussian(0.7, 0.5), (1, 8, 8)
    noise = torch.randn((64, *shape), generator=torch.Generator().manual_seed(5))
    out = sample(exact, text, text, shape=shape, generator=torch.Generator().manual_seed(5), steps=steps, guidance=1.0)
    # The map is affine in the starting noise, so its slope is read off exactly rather than estimated.
    torch.testing.assert_close(out, 0.7 + sd * noise, rtol=0, atol=1e-5)


def test_guidance_of_equal_covariances_is_a_shifted_gaussian() -> None:
    exact, k, shape = Gaussian(0.1, 0.5), 2.5, (1, 4, 4)
    text, null = told(3, 2, 1, value=0.4), told(1, 2, 1, value=-0.2)

    def run(texts: Conditioning, guidance: float) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return sample(exact, texts, null, shape=shape, generator=generator, steps=8, guidance=guidance)

    # O5: guiding means m_u, m_c equals the denoiser of mean m_u + k (m_c - m_u).
    torch.testing.assert_close(run(text, k), run(told(3, 2, 1, value=-0.2 + k * 0.6), 1.0), rtol=0, atol=1e-5)


def test_guidance_commutes_with_conversion() -> None:
    clean, noise = pair()
    at = schedules()[2]
    x = at.a * clean + at.s * noise
    first = guided(convert(clean, "clean", "noise", x, at), convert(noise, "clean", "noise", x, at), 3.0)
    torch.testing.assert_close(first, convert(guided(clean, noise, 3.0), "clean", "noise", x, at))


def test_sampler_refuses_no_steps() -> None:
    text = told(1, 1, 1)
    with pytest.raises(NasError, match="at least 1 step, got 0"):
        sample(Gaussian(0, 1), text, text, shape=(1, 2, 2), generator=torch.Generator(), steps=0)


# Discrete schedules and networks on them.


def sd_schedule(prediction: str = "epsilon") -> Schedule:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return Schedule.of({"_class_name": "DDIMScheduler", "prediction_type": prediction, **betas}, "the test")


# Distillation notes, section 0: level, signal-to-noise ratio s/a and rectified-flow time of Stable Diffusion 1.x.
@pytest.mark.parametrize(
    ("level", "ratio", "time"),
    [(0, 0.0292, 0.0283), (19, 0.1345, 0.1185), (250, 0.6958, 0.4103), (499, 1.6129, 0.6173), (625, 2.5017, 0.7144),
     (979, 12.966, 0.9284), (999, 14.615, 0.9360)],
)  # fmt: skip
def test_levels_of_stable_diffusion(level: int, ratio: float, time: float) -> None:
    t = float(sd_schedule().times(torch.tensor(level)))
    assert t == pytest.approx(time, abs=5e-5)
    assert t / (1 - t) == pytest.approx(ratio, rel=5e-4, abs=5e-5)


def test_levels_of_rectified_flow() -> None:
    assert Schedule().times(torch.tensor([0, 249, 999])).tolist() == pytest.approx([0.001, 0.25, 1.0])
    assert (Schedule().least, Schedule().most, Schedule().levels) == (0.0, 1.0, 1000)
    assert Schedule.of({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "the test").alpha_bar is None
    with pytest.raises(NasError, match="no alpha_bar"):
        Schedule().nearest(torch.tensor([0.5]))


def test_unknown_prediction_types_are_refused() -> None:
    with pytest.raises(NasError, match="the test has prediction_type 'score' in its scheduler; known: epsilon, "):
        sd_schedule("score")


class ExactNetwork(nn.Module):
    """The exact prediction for N(0.7, 0.5^2) data on a variance-preserving schedule, as a network would give it."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule, self.exact = schedule, Gaussian(0.7, 0.5)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        assert self.schedule.alpha_bar is not None
        grid = self.schedule.alpha_bar.double().log()
        low = timestep.floor().long().clamp(max=998)
        alpha_bar = (grid[low] + (timestep - low) * (grid[low + 1] - grid[low])).exp().to(sample.dtype)
        at = variance_preserving(alpha_bar.view(-1, 1, 1, 1))
        return convert(self.exact.clean(sample, at, 0.7), "clean", self.schedule.prediction, sample, at)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_network_on_another_schedule_is_asked_at_equal_signal_to_noise(prediction: str) -> None:
    schedule = sd_schedule(prediction)
    denoiser = NativeDenoiser(ExactNetwork(schedule), schedule)
    x, _ = pair()
    t = torch.tensor([0.05, 0.3, 0.61, 0.93], dtype=torch.float64)  # between levels
    wanted = Gaussian(0.7, 0.5).clean(x, rectified_flow(t.view(-1, 1, 1, 1)), 0.7)
    text = told(4, 1, 1)
    torch.testing.assert_close(denoiser.denoise(x, t, text), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(denoiser(x, t, text), (x - wanted) / t.view(-1, 1, 1, 1), rtol=1e-6, atol=1e-5)


def test_beyond_its_schedule_a_network_is_asked_at_the_end() -> None:
    schedule = sd_schedule()
    network = Echo()
    denoiser = NativeDenoiser(network, schedule)
    x, _ = pair()
    denoiser.denoise(x, torch.tensor([1e-3, 0.0283, 0.95, 1.0], dtype=torch.float64), told(4, 1, 1))
    assert network.seen[1].tolist() == pytest.approx([0, 0, 999, 999], abs=0.05)


def test_a_network_of_rectified_flow_is_asked_plainly() -> None:
    network = Echo()
    denoiser = NativeDenoiser(network, Schedule())
    x, t = torch.ones(2, 3, 4, 4), torch.tensor([0.25, 0.5])
    assert torch.equal(denoiser.velocity(x, t, told(2, 1, 1)), x)
    assert network.seen[1].tolist() == [250.0, 500.0]
    torch.testing.assert_close(denoiser.denoise(x, t, told(2, 1, 1)), x - t.view(-1, 1, 1, 1) * x)


def test_other_conditions_reach_the_network_by_name() -> None:
    seen: dict[str, Tensor] = {}

    class Listening(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, **rest: Tensor) -> Tensor:
            seen.update(rest)
            return sample

    text = Conditioning(tokens=torch.zeros(2, 1, 1), pooled=torch.ones(2, 3), layout=torch.ones(2, 12, 2, 2))
    x, t = torch.zeros(2, 3, 4, 4), torch.tensor([0.25, 0.5])
    pre = Preconditioner(mean=(0.0,), sd=1.0)
    out = FlowDenoiser(Listening(), pre, patch=2).velocity(x, t, text)
    assert seen.keys() == {"pooled"}  # the layout is added to the folded input instead
    torch.testing.assert_close(out, pre.output_scale(x, t).expand_as(x))


# Few steps.


def test_few_steps_of_the_exact_denoiser_have_their_closed_form() -> None:
    exact, shape = Gaussian(0.7, 0.5), (1, 4, 4)

    def drawn(times: tuple[float, ...], unit_start: bool) -> Tensor:
        generator = torch.Generator().manual_seed(8)
        return sample_few(exact, told(3, 1, 1), times=times, shape=shape, generator=generator, unit_start=unit_start)

    noise = torch.Generator().manual_seed(8)
    first, second = (torch.randn(3, *shape, generator=noise) for _ in range(2))
    t, u = 0.8, 0.4
    slope = [(1 - s) * 0.25 / ((1 - s) ** 2 * 0.25 + s**2) for s in (t, u)]
    for unit, start in ((True, first * math.hypot(t, 1 - t)), (False, first * t)):
        one = 0.7 + slope[0] * (start - (1 - t) * 0.7)
        torch.testing.assert_close(drawn((t,), unit), one, rtol=0, atol=1e-5)
        again = (1 - u) * one + u * second
        two = 0.7 + slope[1] * (again - (1 - u) * 0.7)
        torch.testing.assert_close(drawn((t, u), unit), two, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn((1.0,), True), drawn((1.0,), False))


@pytest.mark.parametrize("times", [(), (0.0,), (1.2,), (0.3, 0.5), (0.5, 0.5)])
def test_few_steps_fall(times: tuple[float, ...]) -> None:
    with pytest.raises(NasError, match="needs falling times"):
        sample_few(Gaussian(0, 1), told(1, 1, 1), times=times, shape=(1, 2, 2), generator=torch.Generator())


def test_the_last_level_of_zero_terminal_snr_can_be_asked() -> None:
    schedule = Schedule(prediction="velocity", alpha_bar=torch.tensor([0.99, 0.5, 0.0], dtype=torch.float64))
    step, alpha_bar = schedule.nearest(torch.tensor([0.5, 0.0], dtype=torch.float64))
    assert step.tolist() == pytest.approx([1.0, 2.0])
    assert alpha_bar.tolist() == pytest.approx([0.5, 0.0], abs=1e-9)
