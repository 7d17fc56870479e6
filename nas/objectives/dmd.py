"""Distribution matching distillation, DMD2: the student's images are moved by the difference of two scores.

Yin et al. 2024 (arXiv 2405.14867, as its released code trains it): a critic that learns the student's distribution on
its own, faster, time scale; no gradient through the scores; optionally a GAN on the critic's middle features; several
steps by backward simulation. Legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nas.diffusion import Conditioning, Denoiser, Schedule, start_noise
from nas.errors import UsageError
from nas.features import anatomy, captured
from nas.objectives import Batch, Partner, Scene
from nas.objectives._asking import (
    LEVELS,
    check_above,
    check_falling,
    check_levels,
    check_schedule,
    guided_answers,
    image_noise,
    level_times,
    noise_error,
    normaliser,
    renoised,
    sampled_times,
    trainable_copy,
)
from nas.objectives._heads import GAN_LOSSES, GanLoss, Heads, discriminator_loss, generator_loss, middle

_GAME = "dmd"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The student's terms "dmd" and, with a GAN, "gan"; the critic's "noise" and "gan".

    "dmd" is a mean over batch, channels and pixels whose value is half the squared normalised score difference and
    whose gradient at an image is that difference over the number of values. The critic's "noise" is a mean too.

    Attributes:
        weight: what the student's terms are multiplied by in the total.
        guidance: of the teacher's score (1.75 for SD 1.5); the critic's is never guided.
        levels: falling levels of the student's steps; the first is pure noise. (999, 749, 499, 249) is the published
            four-step student.
        t_min: least level of noise at which scores are compared.
        t_max: the levels end before it.
        student_every: critic turns per student turn; 5 is what made the regression loss of the first DMD superfluous,
            10 was used for SD 1.5.
        gan_weight: of the student's term "gan", 0 for none (1e-3 for SD 1.5, 5e-3 for SDXL); needs real images.
        critic_gan_weight: of the critic's.
        gan_loss: "softplus" or "hinge".
        gan_layer: the critic's layer whose output the discriminator reads; "" is the middle block's.
        critic_lr: learning rate of the critic and its head.
        critic_betas: AdamW's.
        critic_weight_decay: AdamW's.
        critic_clip: largest norm of its gradient.
    """

    weight: float = 1.0
    guidance: float = 1.75
    levels: tuple[int, ...] = (999,)
    t_min: int = 20
    t_max: int = 980
    student_every: int = 5
    gan_weight: float = 0.0
    critic_gan_weight: float = 1e-2
    gan_loss: GanLoss = "softplus"
    gan_layer: str = ""
    critic_lr: float = 1e-5
    critic_betas: tuple[float, float] = (0.9, 0.999)
    critic_weight_decay: float = 0.01
    critic_clip: float = 10.0

    def __post_init__(self) -> None:
        check_levels(_GAME, t_min=self.t_min, t_max=self.t_max)
        check_above(_GAME, 0, student_every=self.student_every, critic_lr=self.critic_lr)
        if self.t_max <= self.t_min:
            raise UsageError(f"{_GAME}: t_max must be above t_min, got {self.t_max} and {self.t_min}")
        check_falling(_GAME, self.levels)
        if self.gan_loss not in GAN_LOSSES:
            raise UsageError(f"{_GAME}: unknown gan_loss {self.gan_loss!r}; known: {', '.join(GAN_LOSSES)}")

    @property
    def needs_images(self) -> bool:
        """For the GAN only."""
        return self.gan_weight > 0

    def partners(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> dict[str, Partner]:
        """The critic "fake", of the teacher's shape and weights whatever the student's, and its head with a GAN."""
        critic = Critic(trainable_copy(teacher), self.gan_layer)
        if self.gan_weight > 0:
            critic.attach(batch)
        return {
            "fake": Partner(
                module=critic,
                lr=self.critic_lr,
                betas=(self.critic_betas[0], self.critic_betas[1]),
                weight_decay=self.critic_weight_decay,
                clip=self.critic_clip,
            )
        }

    def turns(self, step: int) -> Sequence[str]:
        """The critic, at every step."""
        return ("fake",)

    def student_moves(self, step: int) -> bool:
        """At every `student_every`-th step, after as many turns of the critic."""
        return (step + 1) % self.student_every == 0

    def partner_loss(self, name: str, scene: Scene) -> dict[str, Tensor]:
        """The critic's term "noise" at all levels, unguided, and "gan" (weighted)."""
        check_schedule(scene.schedule, _GAME)
        critic, text = scene.partners[name], scene.batch.text
        with torch.no_grad():
            images = self._generated(scene)
        noise = image_noise(scene)
        t = level_times(scene.schedule, scene.draws.integers(0, LEVELS), noise)
        velocity = critic.velocity(renoised(images, noise, t), t, text)
        terms = {"noise": noise_error(velocity, images, noise, t).mean() / images[0].numel()}
        if self.gan_weight > 0:
            clean = scene.batch.images_needed()
            real, fake = (self._logits(scene, critic, each) for each in (clean, images))
            terms["gan"] = self.critic_gan_weight * discriminator_loss(real, fake, self.gan_loss)
        return terms

    def student_loss(self, scene: Scene) -> dict[str, Tensor]:
        """The terms "dmd" and "gan" (weighted); only the latter's gradient goes through the critic."""
        check_schedule(scene.schedule, _GAME)
        critic, batch = scene.partners["fake"], scene.batch
        images = self._generated(scene)
        noise = image_noise(scene)
        t = level_times(scene.schedule, scene.draws.integers(self.t_min, self.t_max), noise)
        with torch.no_grad():
            x = renoised(images, noise, t)
            real = guided_answers(scene.teacher.denoise, x, t, batch.text, batch.null_text, self.guidance)[0]
            fake = critic.denoise(x, t, batch.text)
        terms = {"dmd": matching_loss(images.to(x.dtype), real, fake).mean()}
        if self.gan_weight > 0:
            terms["gan"] = self.gan_weight * generator_loss(self._logits(scene, critic, images), self.gan_loss)
        return terms

    def sampling(self, schedule: Schedule, steps: int | None = None) -> tuple[tuple[float, ...], bool]:
        """The falling times of the student's predictions, and that it starts from noise of variance one.

        Raises:
            UsageError: more steps than it is trained for; of fewer, they are spread over its levels.
        """
        return sampled_times(_GAME, schedule, self.levels, steps), True

    def _generated(self, scene: Scene) -> Tensor:
        """Images [B, C, H, W] of one of the student's steps, the same step for the whole batch."""
        times = scene.schedule.times(torch.tensor(self.levels)).tolist()
        last = scene.draws.integer(0, len(times))
        return simulate(
            scene.student, scene.batch.text, times[: last + 1], [image_noise(scene) for _ in range(last + 1)]
        )

    def _logits(self, scene: Scene, critic: Critic, images: Tensor) -> Tensor:
        noise = image_noise(scene)
        t = level_times(scene.schedule, scene.draws.integers(0, LEVELS), noise)
        return critic.logits(renoised(images, noise, t), t, scene.batch.text)


class Critic(nn.Module):
    """A denoiser of the student's own images, with a discriminator on one of its layers where one is attached.

    Args:
        denoiser: learns.
        layer: the submodule that the discriminator reads; "" is the middle block's last.
    """

    def __init__(self, denoiser: nn.Module, layer: str = "") -> None:
        super().__init__()
        self.denoiser = denoiser
        self.layer = layer

    def attach(self, batch: Batch) -> None:
        """Makes the discriminator, for features of the shape that a batch of real images has."""
        self.layer = self.layer or middle(anatomy(self.denoiser))
        clean = batch.images_needed()
        with torch.no_grad(), captured(self.denoiser, [self.layer]) as features:
            self.denoise(clean, torch.full((len(clean),), 0.5, dtype=clean.dtype, device=clean.device), batch.text)
        self.heads = Heads(features).to(clean)

    def velocity(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """See `nas.diffusion.Denoiser`."""
        asked: Denoiser = self.denoiser  # type: ignore[assignment]
        return asked.velocity(x, t, text)

    def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """See `nas.diffusion.Denoiser`."""
        asked: Denoiser = self.denoiser  # type: ignore[assignment]
        return asked.denoise(x, t, text)

    def logits(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The discriminator's logits [B, 1] of noised images [B, C, H, W] at t [B]."""
        with captured(self.denoiser, [self.layer]) as features:
            self.velocity(x, t, text)
        return self.heads.logits(features)


def simulate(student: Denoiser, text: Conditioning, times: Sequence[float], noises: Sequence[Tensor]) -> Tensor:
    """Images [B, C, H, W] of the student's prediction at the last of some falling times, gradient through it only.

    Backward simulation: the input of each step is what the student itself drew at the one before, noised again, so that
    it is trained on what it will meet when sampling. The first input is noise of variance one.
    """
    x = start_noise(noises[0], times[0], unit=True)
    for number, time in enumerate(times[:-1]):
        with torch.no_grad():
            images = student.denoise(x, _same(time, x), text)
            x = renoised(images, noises[number + 1], _same(times[number + 1], x))
    return student.denoise(x, _same(times[-1], x), text)


def matching_loss(images: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """Each example's loss [B], a mean over channels and pixels, whose gradient at the images is (f - y) w / (C H W).

    The weight w = 1 / mean |x - y| makes the levels' gradients alike.

    Args:
        images: the student's x [B, C, H, W].
        real: the teacher's clean image y at the noised images, no gradient.
        fake: the critic's f.
    """
    with torch.no_grad():
        moved = images - normaliser(images, real) * (fake.to(images.dtype) - real.to(images.dtype))
    return 0.5 * (images - moved).square().flatten(1).mean(1)


def _same(time: float, like: Tensor) -> Tensor:
    return torch.full((len(like),), time, dtype=like.dtype, device=like.device)
