"""Score identity distillation with long and short guidance: one-step generators without any image (SiD-LSG).

Zhou et al. 2024 (arXiv 2406.01561, as its released code trains it) on Zhou et al. 2024 (SiD, arXiv 2404.04057). The
fake score is a copy of the teacher that learns the generator's own distribution; the generator is the student, which
may be smaller. Legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nas.diffusion import Conditioning, Denoiser, Schedule, start_noise
from nas.errors import UsageError
from nas.objectives import Partner, Scene
from nas.objectives._asking import (
    check_above,
    check_levels,
    check_schedule,
    guided_answers,
    image_noise,
    level_times,
    noise_error,
    normaliser,
    renoised,
    trainable_copy,
)

_GAME = "sid_lsg"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The student's term "sid" and the fake score's "noise", both summed over channels and pixels, batch means.

    The value of "sid" at alpha = 1 is 0 in expectation wherever the fake score is exact, although its gradient is not:
    it says nothing about convergence.

    Prompts are all the data it needs, each with its caption: the generator is never trained without one.

    Attributes:
        weight: what the student's term is multiplied by in the total.
        alpha: weight of the squared score difference that is taken off the projected one. 0.5 is the gradient of the
            Fisher divergence; the published runs have 1 (SiD-LSG) and 1.2 (SiD).
        kappa1: guidance of the fake score while it is trained.
        kappa2: of the fake score where it is compared with the teacher.
        kappa3: of the fake score inside the projection; the released code ties it to kappa2.
        kappa4: of the teacher. All four equal and above 1 is the recommended long and short guidance; where covariances
            agree the generator learns guidance kappa4 kappa1 / kappa2.
        t_min: least level of noise that images are compared at.
        t_max: the levels end before it.
        t_init: the generator's own level. Its input is s z with s the noise coefficient there (a zero image noised),
            not noise of variance one. 625 of Stable Diffusion's levels has s / a = 2.5, SiD's sigma; in rectified
            flow that is level 713.
        steps: calls of the generator; the i-th at level t_init (1 - i / steps), each noising the last one's image.
        caption_dropout: share of captions that the fake score's turn replaces by none, before the generator is called,
            if any of kappa1 to kappa3 is not 1 (its answer without a caption is trained by these alone).
        fake_lr: learning rate of the fake score.
        fake_betas: AdamW's.
        fake_eps: AdamW's.
    """

    weight: float = 1.0
    alpha: float = 1.0
    kappa1: float = 1.5
    kappa2: float = 1.5
    kappa3: float = 1.5
    kappa4: float = 1.5
    t_min: int = 20
    t_max: int = 980
    t_init: int = 625
    steps: int = 1
    caption_dropout: float = 0.1
    fake_lr: float = 1e-6
    fake_betas: tuple[float, float] = (0.0, 0.999)
    fake_eps: float = 1e-8
    needs_images: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_levels(_GAME, t_min=self.t_min, t_max=self.t_max, t_init=self.t_init)
        check_above(_GAME, 0, steps=self.steps, fake_lr=self.fake_lr)
        if self.t_max <= self.t_min:
            raise UsageError(f"{_GAME}: t_max must be above t_min, got {self.t_max} and {self.t_min}")
        if not 0 <= self.caption_dropout < 1:
            raise UsageError(f"{_GAME}: caption_dropout must be from 0 to below 1, got {self.caption_dropout:g}")

    def partners(self, student: nn.Module, teacher: nn.Module, batch: object) -> dict[str, Partner]:
        """The fake score "fake", of the teacher's shape and weights whatever the student's."""
        betas = (self.fake_betas[0], self.fake_betas[1])
        return {"fake": Partner(module=trainable_copy(teacher), lr=self.fake_lr, betas=betas, eps=self.fake_eps)}

    def turns(self, step: int) -> Sequence[str]:
        """The fake score first: at the start it equals the teacher, and the generator would learn nothing."""
        return ("fake",)

    def student_moves(self, step: int) -> bool:
        """Always: strictly one to one."""
        return True

    def partner_loss(self, name: str, scene: Scene) -> dict[str, Tensor]:
        """The term "noise" of the fake score; through guidance kappa1 both of its answers learn."""
        check_schedule(scene.schedule, _GAME)
        text, null_text = scene.batch.text, scene.batch.null_text
        if any(kappa != 1 for kappa in (self.kappa1, self.kappa2, self.kappa3)):
            text = text.where(scene.draws.uniform() < self.caption_dropout, null_text)
        with torch.no_grad():
            images = self._generated(scene, text)
        noise = image_noise(scene)
        t = level_times(scene.schedule, scene.draws.integers(self.t_min, self.t_max), noise)
        x = renoised(images, noise, t)
        velocity = guided_answers(scene.partners[name].velocity, x, t, text, null_text, self.kappa1)[0]
        return {"noise": noise_error(velocity, images, noise, t).mean()}

    def student_loss(self, scene: Scene) -> dict[str, Tensor]:
        """The term "sid". Gradients flow through the images, the fake score and the teacher."""
        check_schedule(scene.schedule, _GAME)
        text, null_text = scene.batch.text, scene.batch.null_text
        images = self._generated(scene, text)
        if images.requires_grad:
            images.register_hook(_finite)
        noise = image_noise(scene)
        t = level_times(scene.schedule, scene.draws.integers(self.t_min, self.t_max), noise)
        x = renoised(images, noise, t)
        real = guided_answers(scene.teacher.denoise, x, t, text, null_text, self.kappa4)[0]
        fake = guided_answers(scene.partners["fake"].denoise, x, t, text, null_text, self.kappa2, self.kappa3)
        return {"sid": generator_loss(images.to(x.dtype), real, *fake, alpha=self.alpha).mean()}

    def sampling(self, schedule: Schedule, steps: int | None = None) -> tuple[tuple[float, ...], bool]:
        """The falling times of the generator's calls, and that it starts from a zero image noised to the first."""
        count = self.steps if steps is None else steps
        return tuple(schedule.times(torch.tensor(generator_levels(self.t_init, count))).tolist()), False

    def _generated(self, scene: Scene, text: Conditioning) -> Tensor:
        """The generator's images [B, C, H, W]."""
        levels = torch.tensor(generator_levels(self.t_init, self.steps))
        times = scene.schedule.times(levels).tolist()
        return generate(scene.student, text, times, [image_noise(scene) for _ in times])


def generator_levels(t_init: int, steps: int) -> list[int]:
    """The falling levels of the generator's calls: floor(t_init (1 - i / N)).

    Raises:
        UsageError: so many steps that two are at one level.
    """
    levels = [t_init * (steps - i) // steps for i in range(steps)]
    if len(set(levels)) < len(levels) or steps < 1:
        raise UsageError(f"{_GAME}: {steps} steps do not fit below level {t_init}")
    return levels


def generate(student: Denoiser, text: Conditioning, times: Sequence[float], noises: Sequence[Tensor]) -> Tensor:
    """The generator's images [B, C, H, W] from one noise [B, C, H, W] per time; gradients flow through all calls.

    The student is never guided. The first input is a zero image noised to times[0].
    """
    x = start_noise(noises[0], times[0], unit=False)
    images = x
    for number, (time, noise) in enumerate(zip(times, noises, strict=True)):
        t = torch.full((len(noise),), time, dtype=noise.dtype, device=noise.device)
        if number:
            x = renoised(images, noise, t)
        images = student.denoise(x, t, text)
    return images


def generator_loss(images: Tensor, real: Tensor, fake: Tensor, fake_projected: Tensor, *, alpha: float) -> Tensor:
    """Each example's loss [B], summed over channels and pixels: w (y - f) [(y - x) - alpha (y - f')].

    Nothing in the product is detached but the weight w = 1 / mean |x - y| (the released code's whole stand-in for the
    paper's omega(t)). An example with an answer that is not a number counts 0 and gives no gradient, as in that code;
    if none is left the loss is not a number, and training stops.

    Args:
        images: the generator's x [B, C, H, W].
        real: the teacher's clean image y at the noised images [B, C, H, W].
        fake: the fake score's f under kappa2 [B, C, H, W].
        fake_projected: its f' under kappa3.
        alpha: see `Objective`.
    """
    dtype = images.dtype
    real, fake, fake_projected = real.to(dtype), fake.to(dtype), fake_projected.to(dtype)
    with torch.no_grad():
        whole = (images + real + fake + fake_projected).isfinite().flatten(1).all(1).view(-1, 1, 1, 1)
        whole = whole | ~whole.any()
    images, real, fake, fake_projected = (
        torch.where(whole, each, torch.zeros_like(each)) for each in (images, real, fake, fake_projected)
    )
    product = (real - fake) * ((real - images) - alpha * (real - fake_projected))
    return (normaliser(images, real) * product).flatten(1).sum(1)


def _finite(gradient: Tensor) -> Tensor:
    """The gradient at the generator's images with NaN as 0 and infinities as 1e5, as the released code has it.

    There it is done at the weights; here one bad example loses its own gradient and no other's, and a gradient that is
    not finite within the student itself still stops the training.
    """
    return gradient.nan_to_num(nan=0.0, posinf=1e5, neginf=-1e5)
