"""The one training loop: proxy runs of forty steps and full runs of thousands are the same code.

Everything random or scheduled is a function of the step, and a checkpoint holds the rest, so a run that was killed and
resumed ends in the same bits as one that was not. Legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from nas.batches import Batches
from nas.distill.asking import answer, predict
from nas.distill.checkpoints import checkpoint_files, resume, save
from nas.distill.engine import Engine
from nas.distill.run import start
from nas.distill.settings import Checkpoints, Progress, Student, Trained, TrainSettings
from nas.distill.turns import Record, line, step
from nas.objectives import Objective

__all__ = [
    "Checkpoints",
    "Engine",
    "Progress",
    "TrainSettings",
    "Trained",
    "answer",
    "checkpoint_files",
    "predict",
    "train",
]


def train(
    student: Student,
    data: Batches,
    objectives: Sequence[Objective],
    settings: TrainSettings,
    *,
    teacher: nn.Module | None = None,
    engine: Engine | None = None,
    checkpoints: Checkpoints | None = None,
    on_progress: Callable[[Sequence[Progress]], None] | None = None,
    report_every: int = 20,
    watch: Callable[[int, Student, Sequence[Progress]], None] | None = None,
    watch_at: Collection[int] = (),
) -> Trained[Student]:
    """Trains `student` in place and returns its averaged copy.

    Args:
        student: on the device to train on; its weights are the starting point.
        data: batches on that device.
        objectives: their weighted terms are summed.
        settings: the schedule.
        teacher: frozen, on that device; may be left out where the batches bring its answers.
        engine: where to run; this process by default.
        checkpoints: where to save and resume; None saves nothing.
        on_progress: called with the record so far at each new line of it.
        report_every: steps per line.
        watch: called after each of the steps `watch_at` with that step, the averaged student in eval mode and the
            record, a line of which then ends there; what it raises ends the run.
        watch_at: those steps.

    Raises:
        NasError: a loss or gradient that is not finite (the last checkpoint is from before it), no objectives, no
            teacher where one is needed, or a checkpoint of other settings.
    """
    run = start(student, data, tuple(objectives), settings, teacher, engine or Engine(settings.precision))
    pending: list[Record] = []
    average: Any
    cuda = [p.device for p in student.parameters() if p.device.type == "cuda"][:1]
    # The caller's own random state is left as it was.
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(settings.seed + run.engine.rank)
        if checkpoints is not None and checkpoints.resume:
            resume(run, checkpoints)
        began = time.perf_counter() - run.seconds
        student.train()
        while run.step < settings.steps:
            pending.append(step(run))
            last = run.step == settings.steps
            due = checkpoints is not None and (last or run.step % checkpoints.every == 0)
            watched = watch is not None and run.step in watch_at
            if last or due or watched or run.step % report_every == 0:
                run.seconds = time.perf_counter() - began
                run.history.append(line(run, pending))
                pending.clear()
                if on_progress is not None:
                    on_progress(run.history)
            if due and checkpoints is not None:
                save(run, checkpoints)
            if watched and watch is not None:
                average = run.average.eval()
                paused = time.perf_counter()
                watch(run.step, average, run.history)
                began += time.perf_counter() - paused
    average = run.average.eval()
    return Trained(average=average, history=tuple(run.history), resumed_from=run.resumed_from)
