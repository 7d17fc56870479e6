"""Examples drawn anew at every step, and what the teacher makes of their captions.

Legend: B batch, R rows, C channels, H W height and width, T text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nas.batches import WHOLE, Batch, Part, stream
from nas.diffusion import Conditioning
from nas.targets.rows import each_nth
from nas.teachers import Teacher
from nas.times import Times

_PROMPTS = 7_001  # a random stream of its own: a game draws the noise of the same step from the plain one


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
        drawing = draw(self.lesson.task, self.size, self.splits, stream(self.seed, step), self.times)
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
        text = text.where(each_nth(null_every, len(text), first, text.device), null_text)
    return text, null_text


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Drawings [R, C, H, W], noise of their shape, times [R] and captions."""

    clean: Tensor
    noise: Tensor
    t: Tensor
    captions: list[Any]


def _captions(task: Task, count: int, splits: tuple[str, ...], generator: torch.Generator) -> list[Any]:
    """`count` captions, the splits taking turns."""
    drawn = [task.sample(count, split, generator) for split in splits]
    return [drawn[i % len(drawn)][i] for i in range(count)]


def draw(task: Task, count: int, splits: tuple[str, ...], generator: torch.Generator, times: Times) -> Drawing:
    """`count` drawings, the splits taking turns."""
    captions = _captions(task, count, splits, generator)
    clean = task.render(captions, generator)
    t = times.draw(count, generator)
    noise = torch.randn(clean.shape, generator=generator)
    if len(splits) > 1:
        # Times alternate between two distributions; shuffled, so that each split meets both.
        t = t[torch.randperm(count, generator=generator)]
    return Drawing(clean=clean, noise=noise, t=t, captions=captions)
