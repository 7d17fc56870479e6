"""Games end to end through the training loop: each finds a Gaussian teacher's distribution.

The generator is x = shift + slope z; the fake score's family is the exact denoiser of any Gaussian. Images have many
independent values, so that a batch is a large sample and the weight 1 / mean |x - y| hardly depends on it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gaussian_world import Corners, Gaussian, GaussianData, Generator, corner_scene, double, level_of, numeric
from torch import Tensor

from nas.distill import TrainSettings, train
from nas.objectives import objective, sid_lsg

MEAN, SD = -0.5, 0.8  # the teacher's
STARTS = ((0.2, 2.0), (3.0, 2.0))  # slope and shift
SHAPE = (1, 32, 32)
RATE = 0.1


def trained(game: Any, start: tuple[float, float], *, at: float, steps: int = 220) -> tuple[float, float]:
    """The averaged generator's slope and shift after training one to one with its fake score."""
    generator, teacher = Generator(*start, start=at), Gaussian(MEAN, SD, shape=SHAPE).requires_grad_(False)
    settings = TrainSettings(steps=steps, batch=4, lr=RATE, betas=(0.0, 0.999), warmup=1, decay_share=0.6, clip=0.0)
    found = train(generator, GaussianData(4, prompts_only=True), [game], settings, teacher=teacher).average
    return float(found.slope.detach()), float(found.shift.detach())


def plain_sid(alpha: float) -> Any:
    kappas = {f"kappa{i}": 1.0 for i in range(1, 5)}
    return objective("sid_lsg", alpha=alpha, fake_lr=2 * RATE, **kappas)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_reaches_the_teacher(alpha: float, start: tuple[float, float]) -> None:
    slope, shift = trained(plain_sid(alpha), start, at=0.626)
    # z is symmetric, so a generator of slope -0.8 draws the same images.
    assert abs(slope) == pytest.approx(SD, abs=0.01)
    assert shift == pytest.approx(MEAN, abs=0.02)


@pytest.mark.parametrize("start", STARTS)
def test_dmd_reaches_the_teacher(start: tuple[float, float]) -> None:
    game = objective(
        "dmd", guidance=1.0, student_every=1, critic_lr=2 * RATE, critic_betas=(0.0, 0.999), critic_weight_decay=0.0
    )
    slope, shift = trained(game, start, at=1.0)
    assert abs(slope) == pytest.approx(SD, abs=0.01)
    assert shift == pytest.approx(MEAN, abs=0.02)


def naive(images: Tensor, real: Tensor, fake: Tensor, fake_projected: Tensor, *, alpha: float) -> Tensor:
    """The Fisher divergence with the fake score taken for a constant: what a missing projected term leaves."""
    return (real - fake).square().flatten(1).sum(1)


def test_naive_fisher_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sid_lsg, "generator_loss", naive)
    slope, shift = trained(plain_sid(1.0), STARTS[0], at=0.626)
    assert abs(abs(slope) - SD) > 0.3 or abs(shift - MEAN) > 1.0


def test_naive_fisher_always_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sid_lsg, "generator_loss", naive)
    a, s = 0.8, 0.6
    with double():
        for slope in (0.2, 0.5, 1.5):  # of which the first two should grow to 0.8
            student, fake = Generator(slope, MEAN, start=0.626), Gaussian(MEAN, slope).requires_grad_(False)
            turn = corner_scene(student, Gaussian(MEAN, SD), {"fake": fake}, Corners(2, level_of(a, s)))
            plain_sid(1.0).student_loss(turn)["sid"].backward()
            real, own = (a * sd**2 / (a**2 * sd**2 + s**2) for sd in (SD, slope))
            assert numeric(student.slope) == pytest.approx(2 * a**2 * slope * (real - own) ** 2, rel=1e-9)
            assert numeric(student.slope) > 0


def test_long_and_short_guidance_reaches_the_guided_teacher() -> None:
    # kappa_eff = kappa4 kappa1 / kappa2 = 1 * 2 / 4: half of the caption's pull.
    game = objective("sid_lsg", kappa1=2.0, kappa2=4.0, kappa3=4.0, kappa4=1.0, fake_lr=2 * RATE, caption_dropout=0.5)
    pull = 0.8
    generator = Generator(SD, MEAN, start=0.626)
    generator.slope.requires_grad_(False)
    generator.shift.requires_grad_(False)  # so that without a caption it draws what the teacher draws
    teacher = Gaussian(MEAN, SD, pull=pull, shape=SHAPE).requires_grad_(False)
    settings = TrainSettings(steps=220, batch=4, lr=RATE, betas=(0.0, 0.999), warmup=1, decay_share=0.6, clip=0.0)
    data = GaussianData(4, caption=1.0, prompts_only=True)
    found = train(generator, data, [game], settings, teacher=teacher).average
    assert float(found.pull.detach()) == pytest.approx(0.5 * pull, abs=0.02)
    assert torch.equal(found.slope, generator.slope)
