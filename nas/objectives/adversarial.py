"""Adversarial step distillation: the student's images, noised again, must pass for data before a frozen teacher's eyes.

The few-step stage of SnapGen (arXiv 2412.09619) in the form of UFOGen (Xu et al. 2023, arXiv 2311.09257: noised
prediction against noised data) and LADD (Sauer et al. 2024, arXiv 2403.12015: heads on the features of the frozen
teacher, through which the student's gradient flows). A recipe's stage has it beside `output`, which keeps the student
near the teacher. Legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nas.diffusion import Conditioning, Denoiser, Schedule, noised
from nas.errors import UsageError
from nas.features import anatomy, captured
from nas.objectives import Batch, Partner, Scene
from nas.objectives._asking import (
    LEVELS,
    check_above,
    check_falling,
    check_schedule,
    image_noise,
    level_times,
    renoised,
    sampled_times,
    trainable_copy,
)
from nas.objectives._heads import (
    GAN_LOSSES,
    GanLoss,
    Heads,
    discriminator_loss,
    encoder,
    generator_loss,
    roughness,
)

Renoise = Literal["logit_normal", "uniform", "previous"]
Backbone = Literal["teacher", "critic"]

_GAME = "adversarial"
_MODES = ("logit_normal", "uniform", "previous")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The student's term "gan"; the discriminator's "gan" and, where it is asked for, "roughness". Batch means.

    Needs real images: they are what the student's images are told from.

    Attributes:
        weight: what the student's term is multiplied by in the total.
        levels: falling levels of the student's steps; each example is noised to one of them.
        gan_loss: "hinge" (LADD) or "softplus" (DMD2, FastGen).
        backbone: whose features the heads read: the frozen "teacher"'s, or those of a "critic", a copy of it that
            learns with them (UFOGen).
        layers: the backbone's layers with a head each; none given are the last of every down stage and the middle's.
        renoise: where images are told apart: "logit_normal" times sigmoid(N(mean, sd)), "uniform" over all levels, or
            the level "previous" to the student's in a uniform grid, max(t - 1000 / N, 0) (UFOGen).
        renoise_mean: of "logit_normal". LADD has 1, at which discriminators of small models were reported to stay at
            chance, so low noise is the default.
        renoise_sd: of "logit_normal".
        shared_noise: whether a real and a generated image get the same noise (Flash Diffusion).
        roughness_weight: of the approximate R1 penalty on real images; FastGen has 100 to 1000 where it has it.
        roughness_noise: its noise's standard deviation.
        student_every: discriminator turns per student turn (UFOGen 2, FastGen 5).
        lr: learning rate of the heads, and of the critic.
        betas: AdamW's (UFOGen).
        weight_decay: AdamW's.
        clip: largest norm of the gradient (UFOGen).
    """

    weight: float = 1.0
    levels: tuple[int, ...] = (999, 749, 499, 249)
    gan_loss: GanLoss = "hinge"
    backbone: Backbone = "teacher"
    layers: tuple[str, ...] = ()
    renoise: Renoise = "logit_normal"
    renoise_mean: float = -1.0
    renoise_sd: float = 1.0
    shared_noise: bool = False
    roughness_weight: float = 0.0
    roughness_noise: float = 0.1
    student_every: int = 1
    lr: float = 1e-4
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    needs_images: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_falling(_GAME, self.levels)
        check_above(_GAME, 0, student_every=self.student_every, lr=self.lr, renoise_sd=self.renoise_sd, clip=self.clip)
        for name, value, known in (
            ("gan_loss", self.gan_loss, GAN_LOSSES),
            ("renoise", self.renoise, _MODES),
            ("backbone", self.backbone, ("teacher", "critic")),
        ):
            if value not in known:
                raise UsageError(f"{_GAME}: unknown {name} {value!r}; known: {', '.join(known)}")

    def partners(self, student: nn.Module, teacher: nn.Module, batch: Batch) -> dict[str, Partner]:
        """The discriminator "discriminator": heads, and with the backbone "critic" a copy of the teacher."""
        layers = tuple(self.layers) or encoder(anatomy(teacher))
        own = trainable_copy(teacher) if self.backbone == "critic" else None
        made = Discriminator(teacher, batch, layers, own)
        betas = (self.betas[0], self.betas[1])
        return {
            "discriminator": Partner(
                module=made, lr=self.lr, betas=betas, weight_decay=self.weight_decay, clip=self.clip
            )
        }

    def turns(self, step: int) -> Sequence[str]:
        """The discriminator, at every step."""
        return ("discriminator",)

    def student_moves(self, step: int) -> bool:
        """At every `student_every`-th step, after as many turns of the discriminator."""
        return (step + 1) % self.student_every == 0

    def partner_loss(self, name: str, scene: Scene) -> dict[str, Tensor]:
        """The discriminator's term "gan", and "roughness" (weighted)."""
        discriminator, clean = scene.partners[name], scene.batch.images_needed()
        with torch.no_grad():
            images, level = self._generated(scene)
        t, noise, other = self._renoising(scene, level)
        x = renoised(clean, noise, t)
        real = discriminator.logits(scene.teacher, x, t, scene.batch.text)
        fake = discriminator.logits(scene.teacher, renoised(images, other, t), t, scene.batch.text)
        terms = {"gan": discriminator_loss(real, fake, self.gan_loss)}
        if self.roughness_weight > 0:
            moved = x + self.roughness_noise * image_noise(scene)
            rough = roughness(real, discriminator.logits(scene.teacher, moved, t, scene.batch.text))
            terms["roughness"] = self.roughness_weight * rough
        return terms

    def student_loss(self, scene: Scene) -> dict[str, Tensor]:
        """The term "gan"; its gradient flows through the discriminator and its frozen backbone."""
        scene.batch.images_needed()
        images, level = self._generated(scene)
        t, _, noise = self._renoising(scene, level)
        x = renoised(images, noise, t)
        logits = scene.partners["discriminator"].logits(scene.teacher, x, t, scene.batch.text)
        return {"gan": generator_loss(logits, self.gan_loss)}

    def sampling(self, schedule: Schedule, steps: int | None = None) -> tuple[tuple[float, ...], bool]:
        """The falling times of the student's predictions, and that it starts from noise of variance one.

        Raises:
            UsageError: more steps than it is trained for; of fewer, they are spread over its levels.
        """
        return sampled_times(_GAME, schedule, self.levels, steps), True

    def _generated(self, scene: Scene) -> tuple[Tensor, Tensor]:
        """The student's images [B, C, H, W] from noised data, and the levels [B] of its inputs."""
        check_schedule(scene.schedule, _GAME)
        clean = scene.batch.images_needed()
        chosen = scene.draws.integers(0, len(self.levels))
        level = torch.tensor(self.levels, device=chosen.device)[chosen]
        t = level_times(scene.schedule, level, clean)
        noise = image_noise(scene).to(clean.dtype)
        return scene.student.denoise(noised(clean, noise, t), t, scene.batch.text), level

    def _renoising(self, scene: Scene, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The times [B] at which images are told apart, the noise of real ones [B, C, H, W], and of generated ones."""
        noise, other = image_noise(scene), image_noise(scene)
        normal, uniform = scene.draws.normal(), scene.draws.integers(0, LEVELS)
        known = getattr(scene.teacher, "schedule", scene.schedule)
        if self.renoise == "logit_normal":
            t = torch.sigmoid(self.renoise_mean + self.renoise_sd * normal).to(noise.dtype)
            t = t.clamp(known.least, known.most)
        else:
            previous = (level - LEVELS // len(self.levels)).clamp_min(0)
            t = level_times(scene.schedule, uniform if self.renoise == "uniform" else previous, noise)
        return t, noise, noise if self.shared_noise else other


class Discriminator(nn.Module):
    """Heads on the features of a denoiser of noised images.

    The frozen teacher is told who it is at every call and is no part of this module, so that it is neither saved nor
    trained with it.

    Args:
        teacher: whose features decide the heads' shapes.
        batch: real images.
        layers: names of its layers.
        own: a copy of the teacher that learns and is asked in its place; None asks the teacher.
    """

    def __init__(self, teacher: nn.Module, batch: Batch, layers: Sequence[str], own: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.own = own
        clean = batch.images_needed()
        t = torch.full((len(clean),), 0.5, dtype=clean.dtype, device=clean.device)
        with torch.no_grad():
            self.heads = Heads(self._features(teacher, clean, t, batch.text)).to(clean)

    def logits(self, teacher: Denoiser, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """Logits [B, heads] of noised images [B, C, H, W] at t [B]."""
        return self.heads.logits(self._features(teacher, x, t, text))

    def _features(self, teacher: Any, x: Tensor, t: Tensor, text: Conditioning) -> Mapping[str, Tensor]:
        asked: Any = teacher if self.own is None else self.own
        with captured(asked, self.layers) as features:
            asked.velocity(x, t, text)
        return {name: features[name] for name in self.layers}
