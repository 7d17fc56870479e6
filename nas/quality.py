"""The proxy: a small copy of a candidate, distilled for seconds, says how well the candidate would learn.

Every candidate sees the same teacher, rows, order, noise and preconditioning; only the network differs, and between
the seeds of one candidate only its initialisation. Two things are scored and kept apart: how closely the student
follows the teacher, and how much of what the caption changes it has learnt.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nas import families, registry, teachers
from nas.build import build
from nas.diffusion import FlowDenoiser
from nas.distill import TrainSettings, predict, train
from nas.errors import NasError
from nas.network import NetworkSpec, Scale
from nas.objectives import Objective, objective
from nas.paths import data_dir
from nas.space import Candidate
from nas.targets import Cached, Lesson, Rows, TargetSettings, cached_targets

_EVALUATED = 128  # held-out rows per forward pass


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """How candidates are scored. Scores are comparable only between equal settings and equal teachers.

    The one rule of scale: widths, head width and norm groups are divided, everything else is kept (stages, residual
    blocks, transformer depths, head counts, convolution kinds, attention kinds, FFN ratio).

    Attributes:
        task: the plug-in of nas/tasks/ that is drawn.
        width_divisor: what widths and head width are divided by.
        norm_groups: groups of every GroupNorm.
        patch: pixels folded into channels per side: images 3x32x32 become latents 48x8x8 at 4.
        steps: optimiser steps per seed.
        batch: rows per step; no row is seen twice.
        lr: peak learning rate.
        null_every: every n-th row is trained without its caption.
        text_weight: weight of the text objective; above 0 every row is asked with and without its caption, which
            doubles the work of a step.
        held_rows: rows the score is read from.
        seeds: one run each; the median counts.
        data_seed: of the rows.
    """

    task: str = "shapes"
    width_divisor: int = 16
    norm_groups: int = 4
    patch: int = 4
    steps: int = 24
    batch: int = 16
    lr: float = 3e-3
    null_every: int = 4
    text_weight: float = 0.0
    held_rows: int = 256
    seeds: tuple[int, ...] = (0, 1, 2)
    data_seed: int = 0

    @property
    def targets(self) -> TargetSettings:
        """The cache these settings read."""
        return TargetSettings(rows=self.steps * self.batch, held_rows=self.held_rows, seed=self.data_seed)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What the students are trained on."""
        text = (objective("text", weight=self.text_weight),) if self.text_weight > 0 else ()
        return (objective("output"), *text)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A candidate's score.

    Attributes:
        quality_db: fidelity to the teacher on held-out rows, 10 log10(P / mse), median of the seeds, higher is better.
            P is the mean square of what the teacher's velocity has beyond the preconditioner's skip path, so 0 dB is a
            network that adds nothing.
        quality_sd: standard deviation of one seed's quality_db; 0 with one seed.
        text_db: -20 log10(text_error), median of the seeds.
        text_sd: standard deviation of one seed's text_db.
        text_error: relative error (root mean square) of v(caption) - v(no caption) against the teacher's; 1 is a
            student that ignores the caption.
        loss: mse of the velocity on held-out rows, median of the seeds.
        seeds_db: each seed's quality_db.
        params: parameters of the small copy.
        seconds: wall time of all seeds.
    """

    quality_db: float
    quality_sd: float
    text_db: float
    text_sd: float
    text_error: float
    loss: float
    seeds_db: tuple[float, ...]
    params: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """One trained student against the teacher on held-out rows; see `Quality` for the units."""

    quality_db: float
    text_error: float
    loss: float

    @property
    def text_db(self) -> float:
        """-20 log10(text_error)."""
        return -20 * math.log10(self.text_error)


def teacher_hash(teacher: str) -> str:
    """What a study's identity holds of its teacher.

    Raises:
        NasError: no such teacher.
    """
    return teachers.teacher_digest(teacher)


def prepare(teacher: str, settings: ProxySettings, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Computes the teacher's targets unless they are cached, so that no candidate's time includes it."""
    _targets(teacher, settings, on_progress)


def score(candidate: Candidate, teacher: str, settings: ProxySettings) -> Quality:
    """Trains the candidate's small copy once per seed and scores each against the teacher.

    Runs in one thread; fit for a process pool.

    Raises:
        NasError: the candidate cannot be scaled down, or its training diverged.
    """
    train_rows, held = _targets(teacher, settings)
    began = time.perf_counter()
    with _one_thread():
        found = [_run(candidate, teacher, settings, seed, train_rows, held) for seed in settings.seeds]
    decibels, text = [f.quality_db for f, _ in found], [f.text_db for f, _ in found]
    return Quality(
        quality_db=statistics.median(decibels),
        quality_sd=_spread(decibels),
        text_db=statistics.median(text),
        text_sd=_spread(text),
        text_error=statistics.median(f.text_error for f, _ in found),
        loss=statistics.median(f.loss for f, _ in found),
        seeds_db=tuple(decibels),
        params=found[0][1],
        seconds=time.perf_counter() - began,
    )


def embedded_lesson(teacher: str, task: str) -> tuple[teachers.EmbeddedTeacher, Lesson]:
    """A teacher of drawn images, and the pairing with what is drawn.

    Raises:
        NasError: no such teacher, or one that brings no text encoder and preconditioner of its own.
    """
    loaded = _load_teacher(teacher)
    if not isinstance(loaded, teachers.EmbeddedTeacher):
        raise NasError(
            f"teacher {teacher!r} cannot teach the task {task}: it has no text encoder for its captions",
            hint="use the teacher 'embedded', or a .safetensors file that benchmarks/train_teacher.py wrote",
        )
    return loaded, Lesson(teacher=loaded, task=registry.load("nas.tasks", task).Task())


@functools.cache
def _load_teacher(teacher: str) -> Any:
    return teachers.load_teacher(teacher)


def small_copy(candidate: Candidate, teacher: teachers.EmbeddedTeacher, settings: ProxySettings) -> NetworkSpec:
    """The candidate's structure at proxy scale, for the teacher's images and text.

    Raises:
        NasError: a width does not divide, or the family cannot be scaled.
    """
    space = candidate.space
    head_width, rest = divmod(int(space.fixed["head_width"]), settings.width_divisor)
    if rest or head_width == 0:
        raise NasError(
            f"space {space.name}: head width {space.fixed['head_width']} cannot be divided by the proxy's"
            f" {settings.width_divisor}"
        )
    channels, height, width = teacher.image_shape
    tokens, text_width = teacher.text_shape
    scale = Scale(
        width_divisor=settings.width_divisor,
        head_width=head_width,
        norm_groups=settings.norm_groups,
        latent_channels=channels * settings.patch**2,
        height=height // settings.patch,
        width=width // settings.patch,
        text_tokens=tokens,
        text_width=text_width,
    )
    return families.scaled(candidate, scale)


def student(spec: NetworkSpec, teacher: teachers.EmbeddedTeacher, patch: int, seed: int) -> FlowDenoiser:
    """The network `spec` behind the teacher's preconditioner, initialised from `seed`."""
    return FlowDenoiser(build(spec, seed=seed), teacher.preconditioner, patch=patch)


@torch.no_grad()
def fidelity_of(denoiser: FlowDenoiser, held: Rows) -> Fidelity:
    """How closely a student follows the teacher on held-out rows."""
    residual = error = change = change_error = 0.0
    for first in range(0, len(held), _EVALUATED):
        batch = held.batch(slice(first, first + _EVALUATED))
        outputs, teacher = predict(denoiser, batch, with_null=True), batch.teacher
        assert teacher is not None  # cached rows bring it
        assert outputs.null_velocity is not None  # asked for
        assert teacher.null_velocity is not None
        skip = denoiser.preconditioner.skip(*batch.point())
        wanted = teacher.velocity - teacher.null_velocity
        residual += float((teacher.velocity - skip).square().sum())
        error += float((teacher.velocity - outputs.velocity).square().sum())
        change += float(wanted.square().sum())
        change_error += float((wanted - (outputs.velocity - outputs.null_velocity)).square().sum())
    return Fidelity(
        quality_db=10 * math.log10(residual / error),
        text_error=math.sqrt(change_error / change),
        loss=error / held.velocity.numel(),
    )


def cannot_see(settings: ProxySettings) -> tuple[str, ...]:
    """What a reader must know this score says nothing about."""
    rows = settings.steps * settings.batch
    return (
        f"It scores a copy with widths divided by {settings.width_divisor} after {settings.steps} steps on {rows:,}"
        " drawn 32x32 scenes: what shows only at full width, at full resolution or late in training is not in it.",
        "So short a run favours networks that learn fast, which are often the small and shallow ones; a larger network"
        " may overtake them with training. The front can therefore end well below the budget.",
        "Captions are hardly learnt in so short a run, so the quality does not judge where cross-attention stands; the"
        " text score beside it says how much of the caption's effect each student has learnt (0 dB: none).",
        "It compares networks under output distillation with one recipe; a network that needs another learning rate"
        " or another loss is scored lower than it deserves.",
        "Differences below about two standard deviations of the seeds are ties.",
    )


def fidelity(settings: ProxySettings, teacher: str) -> dict[str, Any] | None:
    """How well this score ranked against longer training; None where these settings and teacher were never tested.

    Written by benchmarks/proxy_rank.py.
    """
    try:
        path = data_dir("reports") / "benchmarks" / "proxy_rank.json"
    except NasError:
        return None  # an installed package has no reports
    if not path.is_file():
        return None
    card: dict[str, Any] = json.loads(path.read_text())
    same = card["proxy"] == json.loads(json.dumps(asdict(settings)))
    return card if same and card["teacher_digest"] == teacher_hash(teacher) else None


def _targets(
    teacher: str, settings: ProxySettings, on_progress: Callable[[int, int], None] | None = None
) -> tuple[Rows, Rows]:
    digest = f"{teacher_hash(teacher)}/{settings.task}"
    return cached_targets(digest, lambda: embedded_lesson(teacher, settings.task)[1], settings.targets, on_progress)


def _run(
    candidate: Candidate, teacher: str, settings: ProxySettings, seed: int, train_rows: Rows, held: Rows
) -> tuple[Fidelity, int]:
    loaded, _ = embedded_lesson(teacher, settings.task)
    fresh = student(small_copy(candidate, loaded, settings), loaded, settings.patch, seed)
    data = Cached(
        rows=train_rows, size=settings.batch, null_every=0 if settings.text_weight > 0 else settings.null_every
    )
    schedule = TrainSettings(steps=settings.steps, batch=settings.batch, lr=settings.lr)
    trained = train(fresh, data, settings.objectives, schedule)
    return fidelity_of(trained.average, held), sum(p.numel() for p in fresh.parameters())


def _spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread per process: networks this small run no faster on two, and the pool has a process per core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
