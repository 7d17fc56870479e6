"""Latent consistency distillation: one student step must agree with a teacher step followed by a student step.

Luo et al. 2023 (arXiv 2310.04378) as diffusers' example trains it and EdgeFusion (arXiv 2404.11925) uses it: K solver
points, one guided DDIM step of the teacher between neighbours, a running average of the student as the target network.
The teacher may be larger than the student. Legend: B batch, C channels, H W height and width, G embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from nas.blocks.time_embedding import guidance_features
from nas.diffusion import Conditioning, Denoiser, Schedule, noised, to_variance_preserving
from nas.errors import UsageError
from nas.features import body
from nas.objectives import Partner, Scene
from nas.objectives._asking import (
    LEVELS,
    check_above,
    check_schedule,
    guided_answers,
    level_times,
)

Boundary = Literal["auto", "lcm", "none"]
Distance = Literal["huber", "squared"]

SIGMA_DATA = 0.5  # of the boundary condition; diffusers' LCMScheduler has the same
TIMESTEP_SCALING = 10.0  # likewise
_GAME = "consistency"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The term "consistency": mean over batch, channels and pixels of a distance between two clean images.

    Needs real images. If the student's network takes a guidance embedding (input "guidance" of its spec) it is given
    that of w, and so learns every scale in the range at once.

    Attributes:
        weight: what the term is multiplied by in the total.
        points: K, the solver's points, 1000 / K levels apart (50 in diffusers' example: the paper's k = 20).
        w_min: least guidance of the teacher, in the convention of LCM: w = k - 1 of the usual scale k.
        w_max: largest; equal to w_min fixes it. Diffusers' example draws from 5 to 15.
        ema: how much of the target network is kept per step.
        distance: "huber" is the pseudo-Huber sqrt(d^2 + c^2) - c, "squared" d^2.
        huber_c: its c.
        boundary: "lcm" mixes x into the answer so that f(x, level 0) = x, as LCM does on a variance-preserving
            schedule; "none" is the denoiser's answer, and in rectified flow x - t v has that boundary by itself.
            "auto" takes the one that belongs to the student's schedule.
        steps: of `sampling`.
    """

    weight: float = 1.0
    points: int = 50
    w_min: float = 5.0
    w_max: float = 15.0
    ema: float = 0.95
    distance: Distance = "huber"
    huber_c: float = 1e-3
    boundary: Boundary = "auto"
    steps: int = 4
    needs_images: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_above(_GAME, 0, points=self.points, huber_c=self.huber_c, steps=self.steps)
        if LEVELS % self.points:
            raise UsageError(f"{_GAME}: points must divide {LEVELS}, got {self.points}")
        if self.w_max < self.w_min:
            raise UsageError(f"{_GAME}: w_max must be at least w_min, got {self.w_max:g} and {self.w_min:g}")
        if not 0 <= self.ema <= 1:
            raise UsageError(f"{_GAME}: ema must be from 0 to 1, got {self.ema:g}")
        if self.boundary not in ("auto", "lcm", "none"):
            raise UsageError(f"{_GAME}: unknown boundary {self.boundary!r}; known: auto, lcm, none")
        if self.distance not in ("huber", "squared"):
            raise UsageError(f"{_GAME}: unknown distance {self.distance!r}; known: huber, squared")

    def partners(self, student: nn.Module, teacher: nn.Module, batch: object) -> dict[str, Partner]:
        """The target network "target", a running average of the student."""
        return {"target": Partner(module=copy.deepcopy(student), follows=self.ema)}

    def turns(self, step: int) -> Sequence[str]:
        """None: the target follows by itself."""
        return ()

    def student_moves(self, step: int) -> bool:
        """Always."""
        return True

    def partner_loss(self, name: str, scene: Scene) -> dict[str, Tensor]:
        """Never asked: the target has no loss."""
        raise AssertionError(f"{name} does not learn")

    def student_loss(self, scene: Scene) -> dict[str, Tensor]:
        """The term "consistency".

        Raises:
            NasError: the data has no real images, or the schedule is not of 1000 levels.
        """
        check_schedule(scene.schedule, _GAME)
        clean, batch, lcm = scene.batch.images_needed(), scene.batch, self._lcm(scene.schedule)
        start, end = solver_levels(scene.draws.integers(1, self.points + 1), self.points)
        t, until = (level_times(scene.schedule, level, clean) for level in (start, end))
        noise = scene.draws.normal(*clean.shape[1:]).to(clean.dtype)
        w = self.w_min + (self.w_max - self.w_min) * scene.draws.uniform().to(clean.dtype)
        x, text = noised(clean, noise, t), told(scene.student, batch.text, w)
        with torch.no_grad():
            velocity = guided_answers(scene.teacher.velocity, x, t, batch.text, batch.null_text, w + 1)[0]
            before = solver_step(x, t, until, velocity.to(x.dtype))
            target = consistent(scene.partners["target"], before, until, end, text, lcm=lcm)
        online = consistent(scene.student, x, t, start, text, lcm=lcm)
        return {"consistency": distance(online, target.detach(), self.distance, self.huber_c).mean()}

    def sampling(self, schedule: Schedule, steps: int | None = None) -> tuple[tuple[float, ...], bool]:
        """The falling times of `steps` predictions, and that sampling starts from noise of variance one.

        Steps are spread over the K points as diffusers' LCMScheduler spreads them: places floor(linspace(0, K, N)) of
        the falling grid. There c_skip is below 1e-5, so `nas.diffusion.sample_few` needs no boundary condition.
        """
        count = self.steps if steps is None else steps
        levels = sampling_levels(self.points, count)
        return tuple(schedule.times(torch.tensor(levels)).tolist()), True

    def _lcm(self, schedule: Schedule) -> bool:
        return schedule.alpha_bar is not None if self.boundary == "auto" else self.boundary == "lcm"


def guidance_width(student: Denoiser) -> int:
    """G, the width of the guidance embedding that the student's network takes; 0 where it takes none."""
    spec = getattr(body(student), "spec", None) if isinstance(student, nn.Module) else None
    return 0 if spec is None else spec.inputs.get("guidance", (0,))[0]


def told(student: Denoiser, text: Conditioning, w: Tensor) -> Conditioning:
    """The conditions with w [B] embedded, where the student's network takes it."""
    width = guidance_width(student)
    return replace(text, guidance=guidance_features(w, width).to(w.dtype)) if width else text


def solver_levels(number: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Where a solver's step starts and ends, as levels [B], for the points' numbers [B] from 1 to K.

    tau_n = n r - 1 with r = 1000 / K, and the end is max(tau_n - r, 0): the last step ends at level 0, whose noise is
    not none.
    """
    apart = LEVELS // points
    start = number * apart - 1
    return start, (start - apart).clamp_min(0)


def sampling_levels(points: int, steps: int) -> list[int]:
    """The falling levels at which `steps` predictions are made.

    Raises:
        UsageError: more steps than points.
    """
    if not 1 <= steps <= points:
        raise UsageError(f"{_GAME}: a model of {points} solver points samples in 1 to {points} steps, got {steps}")
    apart = LEVELS // points
    return [(points - place * points // steps) * apart - 1 for place in range(steps)]


def solver_step(x: Tensor, t: Tensor, until: Tensor, velocity: Tensor) -> Tensor:
    """One DDIM step from t to `until` [B]: x' = (1 - t') x0 + t' eps [B, C, H, W] in rectified-flow coordinates.

    With x0 = x - t v and eps = x + (1 - t) v that is Euler's x + (t' - t) v; DDIM on a variance-preserving schedule is
    the same step rescaled.
    """
    return x + (until - t).view(-1, 1, 1, 1) * velocity


def boundary_scales(level: Tensor) -> tuple[Tensor, Tensor]:
    """LCM's c_skip and c_out at levels [B] (any real numbers).

    c_out lacks the factor sigma_data that consistency models give it; trainer and sampler of diffusers agree on this
    form, so it is kept (https://github.com/huggingface/diffusers/issues/8547).
    """
    scaled = TIMESTEP_SCALING * level
    both = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / both, scaled / both.sqrt()


def consistent(denoiser: Denoiser, x: Tensor, t: Tensor, level: Tensor, text: Conditioning, *, lcm: bool) -> Tensor:
    """The consistency function f(x, t) [B, C, H, W] at x in rectified flow's scale, t [B] the time of `level` [B].

    LCM mixes in x as its own network sees it, so in variance-preserving scale: f = c_skip x_VP + c_out x0.
    """
    clean = denoiser.denoise(x, t, text).to(x.dtype)
    if not lcm:
        return clean
    skip, out = (scale.view(-1, 1, 1, 1) for scale in boundary_scales(level.to(x.dtype)))
    return skip * to_variance_preserving(x, t.view(-1, 1, 1, 1))[0] + out * clean


def distance(online: Tensor, target: Tensor, kind: Distance, huber_c: float) -> Tensor:
    """The distance of every value [B, C, H, W]."""
    squared = (online - target).square()
    return squared if kind == "squared" else (squared + huber_c**2).sqrt() - huber_c
