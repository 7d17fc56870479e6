"""What a finished run is worth on the embedded task: the checker on the student and on its teacher, alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nas.judge import drawn, grid, write_png
from nas.judge.scoring import SEED
from nas.students import Sampling
from nas.targets import Fresh
from nas.train.recipe import SamplingSettings
from nas.train.sources import GRID_IMAGES, Drawn

GRID = "grid.png"
SPLITS = ("held-out", "all")


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What the checker says; `nas evaluate` says more.

    Attributes:
        student: set of captions ("held-out", "all") -> name -> share of images that are right.
        teacher: the same of the teacher, for the same captions and starting noise.
        held_out_loss: mean squared difference of the student's and the teacher's velocity on drawings of held-out
            captions; None for a network of few steps, which is no velocity any more.
        grid: sampled images of held-out captions.
    """

    student: dict[str, dict[str, float]]
    teacher: dict[str, dict[str, float]]
    held_out_loss: float | None
    grid: Path


def judge(source: Drawn, student: nn.Module, how: Sampling, settings: SamplingSettings, folder: Path) -> Scores:
    """Samples student and teacher from the same noise, and lets the task's checker look at both."""
    found: dict[str, dict[str, dict[str, float]]] = {"student": {}, "teacher": {}}
    plain = Sampling(steps=settings.steps, guidance=settings.guidance)
    asked: Any = student
    for split in SPLITS:
        pipeline = replace(source.pipeline, split=split)
        captions = pipeline.random_prompts(settings.images, SEED)
        for who, network, wanted in (("student", asked, how), ("teacher", source.first, plain)):
            pictures = drawn(network, pipeline, wanted, captions, seed=SEED)
            found[who][split] = source.task.check(pictures, captions).means()
            if who == "student" and split == SPLITS[0]:
                shown = write_png(folder / GRID, grid(pictures[:GRID_IMAGES]))
    loss = None if how.times else _held_out_loss(source, student)
    return Scores(student=found["student"], teacher=found["teacher"], held_out_loss=loss, grid=shown)


@torch.no_grad()
def _held_out_loss(source: Drawn, student: Any) -> float:
    lesson = source.lesson()
    data = Fresh(lesson=lesson, size=256, seed=SEED, null_every=0, device=source.device, splits=("held-out",))
    batch = data.batch(0)
    x, t = batch.point()
    difference = student.velocity(x, t, batch.text) - lesson.teacher.velocity(x, t, batch.text)
    return float(difference.square().mean())
