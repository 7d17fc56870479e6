"""What a teacher says about drawn examples: computed once and cached for proxies, or fresh at every step for long runs.

Legend: B batch, R rows, C channels, H W height and width, T text tokens, D text width.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save
from torch import Tensor

from nas.diffusion import noised, sample_times
from nas.distill import Batch
from nas.errors import NasError
from nas.network import short_hash
from nas.objectives import Outputs
from nas.paths import atomic_write, cache_dir
from nas.teachers import Teacher

_CHUNK = 256  # rows per generator, so that a longer cache begins with the rows of a shorter one
_FORMAT = 1  # raise it when the content of a cache file changes meaning
_HELD_OUT_SEED = 1_000_003  # added to the seed, so that no held-out row is a training row


class Task(Protocol):
    """What is drawn: `nas.tasks.shapes.Task` and its like."""

    def sample(self, count: int, split: str, generator: torch.Generator) -> list[Any]:
        """Captions of a split."""
        ...

    def render(self, batch: Sequence[Any], generator: torch.Generator) -> Tensor:
        """Images [B, C, H, W]."""
        ...

    def check(self, images: Tensor, batch: Sequence[Any]) -> Any:
        """What is right about images [B, C, H, W], given their captions."""
        ...

    def grid(self, images: Tensor) -> Any:
        """Images side by side as uint8 [rows, columns, 3]."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    def tokens(self, batch: Sequence[Any]) -> Tensor:
        """Token ids [B, T]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Who teaches what."""

    teacher: Teacher
    task: Task

    @torch.no_grad()
    def text(self, captions: Sequence[Any]) -> Tensor:
        """The teacher's text [B, T, D] of captions."""
        return self.teacher.encode(self.task.tokens(captions))


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """What decides a cache's content, besides the teacher.

    Attributes:
        rows: training rows.
        held_rows: rows for scoring: every other one is a new drawing of a caption that training may have, the rest
            are of captions that no training row has.
        seed: of captions, drawings, times and noise.
    """

    rows: int
    held_rows: int
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Examples with the teacher's answers; images are kept in float16, which every student then sees alike.

    Attributes:
        x: x_t [R, C, H, W].
        t: [R].
        text: [R, T, D].
        velocity: the teacher's answer given the caption [R, C, H, W].
        null_velocity: its answer given the null caption [R, C, H, W].
        null_text: [1, T, D].
    """

    x: Tensor
    t: Tensor
    text: Tensor
    velocity: Tensor
    null_velocity: Tensor
    null_text: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: slice, device: torch.device | None = None) -> Batch:
        """Some of the rows in float32, with both of the teacher's answers."""
        x, t, text, velocity, null = (
            part[rows].to(device=device, dtype=torch.float32)
            for part in (self.x, self.t, self.text, self.velocity, self.null_velocity)
        )
        teacher = Outputs(velocity=velocity, null_velocity=null)
        return Batch(x=x, t=t, text=text, teacher=teacher, null_text=self.null_text.to(device=x.device))


@dataclass(frozen=True, kw_only=True)
class Cached:
    """`Batches` of a cache: step s takes the rows from s * size, and starts again at the end.

    Attributes:
        rows: what there is.
        size: rows per batch.
        null_every: every n-th row is asked without its caption; 0 asks none so (objectives that need both answers of
            each row do not need it).
    """

    rows: Rows
    size: int
    null_every: int = 0

    def batch(self, step: int) -> Batch:
        """The rows of that step."""
        per_pass = len(self.rows) // self.size
        if per_pass == 0:
            raise NasError(f"a cache of {len(self.rows)} rows has no batch of {self.size}")
        first = step % per_pass * self.size
        return drop_captions(self.rows.batch(slice(first, first + self.size)), self.null_every)


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """`Batches` drawn and answered anew at every step, the same for the same step.

    Attributes:
        lesson: its teacher on the device to train on.
        size: rows per batch.
        seed: with the step, decides the drawings.
        null_every: as for `Cached`.
        both: also ask the teacher for its answer without a caption (text objectives need it; doubles its cost).
        device: where the batches are wanted.
        splits: of the captions, taking turns.
    """

    lesson: Lesson
    size: int
    seed: int = 0
    null_every: int = 10
    both: bool = False
    device: torch.device | None = None
    splits: tuple[str, ...] = ("train",)

    def batch(self, step: int) -> Batch:
        """The rows of that step."""
        x, t, captions = _draw(self.lesson.task, self.size, self.splits, _generator(self.seed, step))
        x, t, text = x.to(self.device), t.to(self.device), self.lesson.text(captions)
        teacher = self.lesson.teacher
        with torch.no_grad():
            null_text = teacher.null_text()
            if self.null_every and not self.both:
                text = torch.where(_every(self.null_every, text), null_text, text)
            velocity = teacher.velocity(x, t, text)
            null = teacher.velocity(x, t, null_text.expand_as(text)) if self.both else None
        return Batch(x=x, t=t, text=text, teacher=Outputs(velocity=velocity, null_velocity=null), null_text=null_text)


def drop_captions(batch: Batch, every: int) -> Batch:
    """The batch with every n-th caption taken away and the teacher's answer to match; 0 changes nothing."""
    null, null_text = batch.teacher.null_velocity, batch.null_text
    if every == 0 or null is None or null_text is None:
        return batch
    text = torch.where(_every(every, batch.text), null_text, batch.text)
    velocity = torch.where(_every(every, null), null, batch.teacher.velocity)
    return Batch(x=batch.x, t=batch.t, text=text, teacher=Outputs(velocity=velocity))


def _every(count: int, like: Tensor) -> Tensor:
    """True [B, 1, ...] at every count-th row, from the first on."""
    rows = torch.arange(len(like), device=like.device) % count == 0
    return rows.view(-1, *(1,) * (like.dim() - 1))


# ------------------------------------------------------------------------------------------------------ the cache


def cached_targets(
    digest: str,
    lesson: Callable[[], Lesson],
    settings: TargetSettings,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Rows, Rows]:
    """Training and held-out rows from the cache; whoever comes first computes them, the others wait for it.

    Args:
        digest: of whatever decides the answers: the teacher's file and the task.
        lesson: loads them; called only if there is something to compute.
        settings: what to draw.
        on_progress: called with rows done and rows in all while computing.
    """
    path = cache_path(digest, settings)
    if not path.is_file():
        # Released by the operating system when its holder dies, so a killed worker leaves nobody waiting.
        with FileLock(path.with_suffix(".lock")):
            if not path.is_file():
                _compute(path, lesson(), settings, on_progress)
    return _load(str(path))


def cache_path(digest: str, settings: TargetSettings) -> Path:
    """The cache file; its name changes with anything that changes its content."""
    key = short_hash(json.dumps([_FORMAT, digest, asdict(settings)], sort_keys=True))
    return cache_dir("targets") / f"{key}.safetensors"


@functools.lru_cache(maxsize=2)
def _load(path: str) -> tuple[Rows, Rows]:
    tensors = load_file(path)
    null_text = tensors["null_text"]

    def part(name: str) -> Rows:
        fields = {key: tensors[f"{name}.{key}"] for key in ("x", "t", "text", "velocity", "null_velocity")}
        return Rows(null_text=null_text, **fields)

    return part("train"), part("held")


def _compute(
    path: Path, lesson: Lesson, settings: TargetSettings, on_progress: Callable[[int, int], None] | None
) -> None:
    total, done = settings.rows + settings.held_rows, 0
    tensors = {"null_text": lesson.teacher.null_text().detach().clone()}
    for name, count, splits, seed in (
        ("train", settings.rows, ("train",), settings.seed),
        ("held", settings.held_rows, ("held-out", "train"), settings.seed + _HELD_OUT_SEED),
    ):
        chunks = []
        for index in range(-(-count // _CHUNK)):
            chunks.append(_answer(lesson, *_draw(lesson.task, _CHUNK, splits, _generator(seed, index))))
            done = min(total, done + _CHUNK)
            if on_progress is not None:
                on_progress(done, total)
        tensors |= {f"{name}.{key}": torch.cat([c[key] for c in chunks])[:count].contiguous() for key in chunks[0]}
    atomic_write(path, save(tensors))


def _generator(seed: int, index: int) -> torch.Generator:
    """An own stream for every (seed, index); torch's CPU generator takes only the lower 32 bits of a seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, index)).generate_state(1)[0]))


def _draw(
    task: Task, count: int, splits: tuple[str, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor, list[Any]]:
    """Noised drawings [count, C, H, W], times [count] and captions, the splits taking turns."""
    drawn = [task.sample(count, split, generator) for split in splits]
    captions = [drawn[i % len(drawn)][i] for i in range(count)]
    clean = task.render(captions, generator)
    t = sample_times(count, generator)
    noise = torch.randn(clean.shape, generator=generator)
    if len(splits) > 1:
        # Times alternate between two distributions; shuffled, so that each split meets both.
        t = t[torch.randperm(count, generator=generator)]
    return noised(clean, noise, t), t, captions


@torch.no_grad()
def _answer(lesson: Lesson, x: Tensor, t: Tensor, captions: list[Any]) -> dict[str, Tensor]:
    x = x.half().float()  # the teacher must answer what the students will be asked
    text, teacher = lesson.text(captions), lesson.teacher
    velocity = teacher.velocity(x, t, text)
    null_velocity = teacher.velocity(x, t, teacher.null_text(len(x)))
    return {
        "x": x.half(),
        "t": t,
        "text": text.float(),
        "velocity": velocity.half(),
        "null_velocity": null_velocity.half(),
    }
