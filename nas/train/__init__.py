"""Training at length: a recipe's stages take a student from a teacher's lessons to a network that can be sampled.

`load_recipe` reads a recipe, `train_recipe` carries it out, resumes it where it was killed and writes a student's file
that `nas.students.load_student` reads; `dry_run` says beforehand what it would take.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nas.paths import atomic_write
from nas.students import WEIGHTS, load_student, save_student
from nas.train.recipe import Recipe, SamplingSettings, Stage, StudentSettings
from nas.train.recipe_file import load_recipe, recipes
from nas.train.recipe_text import as_toml
from nas.train.rehearsal import DryRun, Forecast, Memory, dry_run
from nas.train.run import Course, Machine, Report, StageResult, about, claim, course, run_stage, stage_folder, stamp
from nas.train.scores import Scores, judge
from nas.train.sources import Drawn, Subject

__all__ = [
    "RESULT",
    "DryRun",
    "Forecast",
    "Machine",
    "Memory",
    "Recipe",
    "Report",
    "SamplingSettings",
    "Scores",
    "Stage",
    "StageResult",
    "StudentSettings",
    "Subject",
    "TrainResult",
    "as_toml",
    "dry_run",
    "load_recipe",
    "recipes",
    "train_recipe",
]

RECIPE, RESULT = "recipe.toml", "result.json"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished run.

    Attributes:
        folder: holds the network, result.json and a folder per stage.
        weights: the averaged network of the last stage.
        stages: in order.
        scores: of student and teacher, where the task can check images.
        params: of the trained network.
        seconds: of training, all stages.
        resumed_from: steps that an earlier run had done, None for a fresh one.
        first_process: whether this process is the one that writes and speaks.
    """

    folder: Path
    weights: Path
    stages: tuple[StageResult, ...]
    scores: Scores | None
    params: int
    seconds: float
    resumed_from: int | None
    first_process: bool


def train_recipe(
    recipe: Recipe,
    subject: Subject,
    out: Path,
    *,
    seed: int = 0,
    resume: bool = True,
    machine: Machine | None = None,
    report: Report | None = None,
) -> TrainResult:
    """Carries a recipe out; a run that was killed and is started again goes on where it was.

    Under `accelerate launch` every process calls this with the same arguments.

    Args:
        recipe: its stages.
        subject: the student's structure, the teacher and the data.
        out: folder of the run.
        seed: of initialisation, drawings and games.
        resume: take up the run in `out`; False refuses a folder that has one.
        machine: where and how it is computed.
        report: called with stage, done, total and a note.

    Raises:
        NasError: teacher, candidate, data and stages do not go together; the folder belongs to another run or cannot be
            written; or a loss is not finite (the checkpoint from before it is kept).
    """
    tell: Report = report or (lambda stage, done, total, note: None)
    run = course(recipe, subject, seed=seed, machine=machine)
    folder = claim(run, out, resume)
    results: list[StageResult] = []
    taken_up: list[int | None] = []
    for number in range(len(recipe.stages)):
        result, resumed_from = run_stage(run, number, folder, tell)
        results.append(result)
        taken_up.append(resumed_from)
    done = sum(step or 0 for step in taken_up)
    weights, scores = folder / WEIGHTS, None
    if run.first_process:
        scores = _conclude(run, folder, tell)
    found = TrainResult(
        folder=folder,
        weights=weights,
        stages=tuple(results),
        scores=scores,
        params=results[-1].params,
        seconds=sum(result.seconds for result in results),
        resumed_from=done or None,
        first_process=run.first_process,
    )
    if run.first_process:
        _write(run, found)
    run.accelerator.wait_for_everyone()
    return found


def _conclude(run: Course, folder: Path, tell: Report) -> Scores | None:
    """Puts the last stage's network where the run's is looked for, and has it judged where the task can."""
    last = len(run.recipe.stages) - 1
    stage = run.recipe.stages[last]
    trained = load_student(stage_folder(folder, last, stage))
    save_student(folder / WEIGHTS, trained.denoiser, trained.sampling, about(run, stage))
    if not isinstance(run.source, Drawn):
        return None
    tell("check", 0, 1, f"{run.recipe.sampling.images} images of student and teacher")
    return judge(run.source, trained.denoiser.to(run.source.device), trained.sampling, run.recipe.sampling, folder)


def _write(run: Course, found: TrainResult) -> None:
    """result.json: the run's record."""
    record: dict[str, Any] = {
        "recipe": run.recipe.name,
        "params": found.params,
        "seconds": found.seconds,
        "stages": [asdict(stage) for stage in found.stages],
        "scores": None if found.scores is None else {**asdict(found.scores), "grid": found.scores.grid.name},
        "identity": run.identity,
        "provenance": stamp(run),
    }
    atomic_write(found.folder / RECIPE, as_toml(run.recipe))
    atomic_write(found.folder / RESULT, json.dumps(record, indent=1) + "\n")
