"""`nas train`: a recipe carried out on a chosen network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.console import Progress, closing, command_line, duration, result, result_json, resumable, table
from nas.cli.names import chosen
from nas.errors import NasError, UsageError, unknown

if TYPE_CHECKING:
    from nas.train import DryRun, Recipe, Subject, TrainResult

RUNS = Path("runs")
DEFAULT_RECIPE = "shapes"


def train(
    subject: Annotated[
        str | None, typer.Argument(help="STUDY#CANDIDATE; STUDY alone is its recommended candidate.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="A recipe's name, or the path of a .toml file.")] = DEFAULT_RECIPE,
    teacher: Annotated[
        str | None,
        typer.Option(help="'embedded', a teacher's file, a diffusers folder or a hub id; the study's by default."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A folder that nas cache made; the embedded teacher draws its own.")
    ] = None,
    space: Annotated[str | None, typer.Option(help="A space, with --reference or --candidate.")] = None,
    reference: Annotated[str | None, typer.Option(help="A published network of the space.")] = None,
    candidate: Annotated[str | None, typer.Option(help="name=value,… ; the rest is taken from --reference.")] = None,
    resolution: Annotated[int | None, typer.Option(metavar="PX", help="Image side instead of the space's.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps of all stages together; they keep their shares.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Changes the recipe: lr=1e-4, STAGE.batch=8; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation, examples and noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16 in all stages.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile the networks where that can be.")] = False,
    checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, about a third more time.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run (default runs/ and what is trained).")] = None,
    resume: Annotated[bool, typer.Option(help="Take up the run that is in the folder.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and train nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a chosen network by a recipe. The same command resumes; `accelerate launch -m nas train …` runs several."""
    from nas.train import Machine, load_recipe, train_recipe
    from nas.train import dry_run as rehearse
    from nas.train.decoding import trains_decoder

    found = load_recipe(recipe, changes or (), steps=steps).with_precision(precision)
    whom, name = _subject(subject, space, reference, candidate, resolution, teacher, data)
    machine = Machine(device=_device(device), compiled=compiled, gradient_checkpointing=checkpointing)
    words = [part for part in (name, found.name if recipe != DEFAULT_RECIPE or not name else "") if part]
    folder = out if out is not None else RUNS / "-".join(words)
    if dry_run:
        with _progress() as report:
            said = rehearse(found, whom, seed=seed, machine=machine, report=report)
        if _speaks():
            _say_plan(said, as_json)
            closing(following=command_line(leave_out=("--dry-run", "--json")), as_json=as_json)
        return
    with resumable(command_line(leave_out=("--no-resume",))), _progress() as report:
        trained = train_recipe(found, whom, folder, seed=seed, resume=resume, machine=machine, report=report)
    if trained.first_process:
        _say(trained, found, name, as_json)
        then = "evaluate" if trains_decoder(found) else "sample"
        closing(wrote=trained.weights, following=f"nas {then} {trained.folder}", as_json=as_json)


def _subject(
    study: str | None,
    space: str | None,
    reference: str | None,
    candidate: str | None,
    resolution: int | None,
    teacher: str | None,
    data: str | None,
) -> tuple[Subject, str]:
    """What the recipe is applied to, and what to call it."""
    from nas.train import Subject

    if study is None and space is None:
        if reference is not None or candidate is not None or resolution is not None:
            raise UsageError("--reference, --candidate and --resolution need --space", hint="nas spaces")
        return Subject(candidate=None, teacher=teacher or "embedded", data=data), ""
    network, key = chosen(study, space, reference, candidate, resolution)
    if study is None:
        return Subject(candidate=network, teacher=teacher or "embedded", data=data), f"{network.space.name}-{key}"
    from nas.paths import find_study
    from nas.record import read_study

    folder = find_study(study.partition("#")[0])
    asked = teacher if teacher is not None else str(read_study(folder)["teacher"])
    return Subject(candidate=network, teacher=asked, data=data), f"{folder.name}-{network.key}"


def _speaks() -> bool:
    """Whether this is the process that speaks, of the several that `accelerate launch` starts."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _progress() -> Iterator[Callable[[str, float, float, str], None]]:
    if not _speaks():
        yield lambda stage, done, total, note: None
        return
    with Progress("train") as progress:
        yield progress


def _device(name: str) -> str:
    import torch

    if name not in ("cpu", "cuda"):
        raise unknown("device to train on", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise NasError("torch sees no CUDA device here", hint="leave --device out")
    return name


def _say(found: TrainResult, recipe: Recipe, name: str, as_json: bool) -> None:
    """The outcome of a run."""
    if as_json:
        result_json({"network": name or None, "recipe": recipe.name, **_plain(found)})
        return
    resumed = f", of which {found.resumed_from} were done before" if found.resumed_from is not None else ""
    result(
        f"{name or recipe.name}: {found.params:,} parameters trained for {recipe.steps} steps in"
        f" {duration(found.seconds)}{resumed}"
    )
    if len(found.stages) > 1:
        rows = [(s.name, s.steps, s.params, duration(s.seconds), s.loss) for s in found.stages]
        result(table(("stage", "steps", "parameters", "time", "last loss"), rows))
    if found.scores is not None:
        result(_scores_table(found.scores.student, found.scores.teacher))
        result(f"samples {found.scores.grid}")
    result(f"curves: tensorboard --logdir {found.folder}")


def _plain(found: TrainResult) -> dict[str, Any]:
    from dataclasses import asdict

    return {key: value for key, value in asdict(found).items() if key != "first_process"}


def _scores_table(student: Mapping[str, Mapping[str, float]], teacher: Mapping[str, Mapping[str, float]]) -> str:
    """What share of images the checker found right, per set of captions, of student and teacher."""
    rows = [
        (f"{who}, {split} captions", *(f"{share:.1%}" for share in scores.values()))
        for split in student
        for who, scores in (("student", student[split]), ("teacher", teacher[split]))
    ]
    first = next(iter(student.values()))
    return table(("right", *first), rows)


def _say_plan(found: DryRun, as_json: bool) -> None:
    """What a run would take."""
    from nas.train import as_toml

    stages = [
        {**vars(stage), "memory": {**vars(stage.memory), "total": stage.memory.total}, "seconds": stage.seconds}
        for stage in found.stages
    ]
    if as_json:
        plain = {"name": found.recipe.name, **found.recipe.to_json()}
        result_json({"recipe": plain, "inherited": found.inherited, "stages": stages, "seconds": found.seconds})
        return
    result(as_toml(found.recipe))
    for stage in found.stages:
        result(f"{stage.name}: {stage.data}")
    if found.inherited is not None:
        result(f"{found.inherited:.1%} of the student's parameters come from the teacher")
    rows = [
        (
            stage.name,
            stage.params,
            stage.teacher_params,
            "yes" if stage.compiled else "no",
            stage.steps_per_second,
            stage.steps,
            duration(stage.seconds),
        )
        for stage in found.stages
    ]
    result(table(("stage", "student", "teacher", "compiled", "steps/s", "steps", "time"), rows))
    parts = ("weights", "gradients", "optimiser", "averages", "teacher", "activations", "total", "measured")
    memory = [(s["name"], *(_mebibytes(s["memory"][part]) for part in parts)) for s in stages]
    result(table(("memory in MiB", *parts), memory))
    result(f"training would take about {duration(found.seconds)} on this machine")


def _mebibytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20
