"""A teacher's answers about drawn examples, from the cache: whoever comes first computes them, the others wait.

Legend: R rows, C channels, H W height and width, T text tokens, D text width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nas.batches import stream
from nas.diffusion import noised
from nas.targets.files import cached_rows, path_of
from nas.targets.lessons import Drawing, Lesson, draw
from nas.targets.rows import Rows
from nas.times import Times

CHUNK = 256  # rows per generator, so that a longer cache begins with the rows of a shorter one
_HELD_OUT_SEED = 1_000_003  # added to the seed, so that no held-out row is a training row
_SPLITS = {"train": ("train",), "held": ("held-out", "train")}


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


def cached_targets(
    digest: str,
    lesson: Callable[[], Lesson],
    settings: TargetSettings,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Rows, Rows]:
    """Training and held-out rows: memory-mapped from the cache, computed where they are not there yet.

    A file serves every request for as many rows as it has or fewer, and one for more continues it; a killed process
    loses at most the 256 rows that it was at.

    Args:
        digest: of whatever decides the answers: the teacher's file and the task.
        lesson: loads them; called only if there is something to compute.
        settings: what to draw.
        on_progress: called with rows done and rows in all while computing.
    """
    total = settings.rows + settings.held_rows
    load = functools.cache(lesson)

    def part(name: str, count: int, before: int) -> dict[str, Tensor]:
        def tick(done: int) -> None:
            if on_progress is not None:
                on_progress(min(total, before + done), total)

        about = _about(digest, settings.seed, name)
        return cached_rows(about, count, CHUNK, lambda index: _chunk(load(), settings.seed, name, index), tick)

    train = part("train", settings.rows, 0)
    held = part("held", settings.held_rows, settings.rows)
    null = cached_rows(_about(digest, 0, "null"), 1, 1, lambda _: {"text": _null(load())})
    return _rows(train, null), _rows(held, null)


def _rows(fields: Mapping[str, Tensor], null: Mapping[str, Tensor]) -> Rows:
    return Rows(
        x=fields["x"],
        t=fields["t"],
        text=fields["text"],
        velocity=fields["velocity"],
        null_velocity=fields["null_velocity"],
        null_text=null["text"],
    )


def cache_path(digest: str, settings: TargetSettings, part: str = "train") -> Path:
    """The file of one part ("train", "held"); its name changes with what its rows depend on, not with their number."""
    return path_of(_about(digest, settings.seed, part))


def _about(digest: str, seed: int, part: str) -> dict[str, Any]:
    return {"teacher": digest, "seed": seed, "part": part}


def _chunk(lesson: Lesson, seed: int, part: str, index: int) -> dict[str, Tensor]:
    seed += _HELD_OUT_SEED if part == "held" else 0
    return _answer(lesson, draw(lesson.task, CHUNK, _SPLITS[part], stream(seed, index), Times()))


@torch.no_grad()
def _null(lesson: Lesson) -> Tensor:
    return lesson.teacher.null_text().tokens.float().cpu()


@torch.no_grad()
def _answer(lesson: Lesson, drawing: Drawing) -> dict[str, Tensor]:
    x = noised(drawing.clean, drawing.noise, drawing.t)
    x = x.half().float()  # the teacher must answer what the students will be asked
    text, teacher = lesson.text(drawing.captions), lesson.teacher
    there, t = x.to(text.device), drawing.t.to(text.device)
    found = {
        "x": x.half(),
        "t": drawing.t,
        "text": text.tokens.float(),
        "velocity": teacher.velocity(there, t, text).half(),
        "null_velocity": teacher.velocity(there, t, teacher.null_text(len(x))).half(),
    }
    return {name: part.cpu() for name, part in found.items()}
