"""What a teacher says about drawn examples: computed once and cached for proxies, or fresh at every step for long runs.

Legend: B batch, R rows, C channels, H W height and width, T text tokens, D text width.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock
from safetensors.torch import load_file, save
from torch import Tensor

from nas.batches import WHOLE, Batch, Outputs, Part, stream
from nas.diffusion import Conditioning, noised
from nas.errors import NasError
from nas.network import short_hash
from nas.paths import atomic_write, cache_dir
from nas.teachers import Teacher
from nas.times import Times

_CHUNK = 256  # rows per generator, so that a longer cache begins with the rows of a shorter one
_FORMAT = 1  # raise it when the content of a cache file changes meaning
_PROMPTS = 7_001  # a random stream of its own: a game draws the noise of the same step from the plain one
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
    def text(self, captions: Sequence[Any]) -> Conditioning:
        """The teacher's conditions of captions."""
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
        complete: adds to text conditions what a teacher makes of them and the cache does not hold; None adds nothing.
    """

    x: Tensor
    t: Tensor
    text: Tensor
    velocity: Tensor
    null_velocity: Tensor
    null_text: Tensor
    complete: Callable[[Conditioning], Conditioning] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: slice, device: torch.device | None = None) -> Batch:
        """Some of the rows in float32, with both of the teacher's answers."""
        x, t, text, velocity, null_velocity = (
            part[rows].to(device=device, dtype=torch.float32)
            for part in (self.x, self.t, self.text, self.velocity, self.null_velocity)
        )
        teacher = Outputs(velocity=velocity, null_velocity=null_velocity)
        said, null = (Conditioning(tokens=each) for each in (text, self.null_text.to(x.device)))
        if self.complete is not None:
            with torch.no_grad():
                said, null = self.complete(said), self.complete(null)
        return Batch(x=x, t=t, text=said, teacher=teacher, null_text=null)


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

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        """The rows of that step."""
        per_pass = len(self.rows) // self.size
        if per_pass == 0:
            raise NasError(f"a cache of {len(self.rows)} rows has no batch of {self.size}")
        first = step % per_pass * self.size
        own = part.rows(self.size)
        rows = self.rows.batch(slice(first + own.start, first + own.stop))
        return drop_captions(rows, self.null_every, first=own.start)


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """`Batches` drawn anew at every step, the same for the same step; the loop asks the teacher.

    Attributes:
        lesson: its teacher on the device to train on.
        size: rows per batch.
        seed: with the step, decides the drawings.
        null_every: as for `Cached`.
        device: where the batches are wanted.
        splits: of the captions, taking turns.
        times: at which noise levels.
    """

    lesson: Lesson
    size: int
    seed: int = 0
    null_every: int = 10
    device: torch.device | None = None
    splits: tuple[str, ...] = ("train",)
    times: Times = field(default_factory=Times)

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        """The rows of that step."""
        drawing = _draw(self.lesson.task, self.size, self.splits, stream(self.seed, step), self.times)
        own = part.rows(self.size)
        clean, noise, t = (each[own].to(self.device) for each in (drawing.clean, drawing.noise, drawing.t))
        text, null_text = _told(self.lesson, drawing.captions[own], self.null_every, own.start)
        return Batch(text=text, null_text=null_text, clean=clean, noise=noise, t=t)


@dataclass(frozen=True, kw_only=True)
class Prompted:
    """`Batches` of captions alone, drawn anew at every step, for objectives that need no images.

    Attributes:
        lesson: its teacher on the device to train on.
        size: rows per batch.
        seed: with the step, decides the captions.
        null_every: as for `Cached`; 0 because data-free methods drop captions themselves, if at all.
        splits: of the captions, taking turns.
    """

    lesson: Lesson
    size: int
    seed: int = 0
    null_every: int = 0
    splits: tuple[str, ...] = ("train",)

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        """The captions of that step."""
        captions = _captions(self.lesson.task, self.size, self.splits, stream(_PROMPTS, self.seed, step))
        own = part.rows(self.size)
        text, null_text = _told(self.lesson, captions[own], self.null_every, own.start)
        return Batch(text=text, null_text=null_text)


def _told(lesson: Lesson, captions: Sequence[Any], null_every: int, first: int) -> tuple[Conditioning, Conditioning]:
    """The conditions of captions, every n-th of the whole batch dropped, and those of no caption."""
    text = lesson.text(captions)
    with torch.no_grad():
        null_text = lesson.teacher.null_text()
    if null_every:
        text = text.where(_every(null_every, len(text), first, text.device), null_text)
    return text, null_text


def drop_captions(batch: Batch, every: int, first: int = 0) -> Batch:
    """The batch with every n-th caption taken away and the teacher's answer to match; 0 changes nothing.

    Args:
        batch: with the teacher's answers.
        every: n.
        first: the place of its first row in the whole batch.
    """
    teacher = batch.teacher
    if every == 0 or teacher is None or teacher.null_velocity is None:
        return batch
    dropped = _every(every, len(batch), first, batch.text.device)
    velocity = torch.where(dropped.view(-1, 1, 1, 1), teacher.null_velocity, teacher.velocity)
    text = batch.text.where(dropped, batch.null_text)
    return replace(batch, text=text, teacher=Outputs(velocity=velocity))


def _every(count: int, rows: int, first: int, device: torch.device | None) -> Tensor:
    """True [B] at every count-th row of the whole batch, from its first on."""
    return (torch.arange(rows, device=device) + first) % count == 0


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
    tensors = {"null_text": lesson.teacher.null_text().tokens.detach().clone()}
    for name, count, splits, seed in (
        ("train", settings.rows, ("train",), settings.seed),
        ("held", settings.held_rows, ("held-out", "train"), settings.seed + _HELD_OUT_SEED),
    ):
        chunks = []
        for index in range(-(-count // _CHUNK)):
            chunks.append(_answer(lesson, _draw(lesson.task, _CHUNK, splits, stream(seed, index), Times())))
            done = min(total, done + _CHUNK)
            if on_progress is not None:
                on_progress(done, total)
        tensors |= {f"{name}.{key}": torch.cat([c[key] for c in chunks])[:count].contiguous() for key in chunks[0]}
    atomic_write(path, save(tensors))


@dataclass(frozen=True, kw_only=True)
class _Drawing:
    """Drawings [R, C, H, W], noise of their shape, times [R] and captions."""

    clean: Tensor
    noise: Tensor
    t: Tensor
    captions: list[Any]


def _captions(task: Task, count: int, splits: tuple[str, ...], generator: torch.Generator) -> list[Any]:
    """`count` captions, the splits taking turns."""
    drawn = [task.sample(count, split, generator) for split in splits]
    return [drawn[i % len(drawn)][i] for i in range(count)]


def _draw(task: Task, count: int, splits: tuple[str, ...], generator: torch.Generator, times: Times) -> _Drawing:
    """`count` drawings, the splits taking turns."""
    captions = _captions(task, count, splits, generator)
    clean = task.render(captions, generator)
    t = times.draw(count, generator)
    noise = torch.randn(clean.shape, generator=generator)
    if len(splits) > 1:
        # Times alternate between two distributions; shuffled, so that each split meets both.
        t = t[torch.randperm(count, generator=generator)]
    return _Drawing(clean=clean, noise=noise, t=t, captions=captions)


@torch.no_grad()
def _answer(lesson: Lesson, drawing: _Drawing) -> dict[str, Tensor]:
    x = noised(drawing.clean, drawing.noise, drawing.t)
    x = x.half().float()  # the teacher must answer what the students will be asked
    text, teacher = lesson.text(drawing.captions), lesson.teacher
    velocity = teacher.velocity(x, drawing.t, text)
    null_velocity = teacher.velocity(x, drawing.t, teacher.null_text(len(x)))
    return {
        "x": x.half(),
        "t": drawing.t,
        "text": text.tokens.float(),
        "velocity": velocity.half(),
        "null_velocity": null_velocity.half(),
    }
