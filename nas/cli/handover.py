"""`nas train`, `nas sample`: what happens to a candidate after it was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from nas.cli.console import (
    Progress,
    closing,
    command_line,
    duration,
    result,
    result_json,
    resumable,
    table,
)
from nas.errors import NasError, unknown

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

RUNS = Path("runs")


def train(
    subject: Annotated[str, typer.Argument(help="STUDY#CANDIDATE; STUDY alone is its recommended candidate.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 1500,
    batch: Annotated[int, typer.Option(min=1, help="Fresh drawings per step.")] = 64,
    text_weight: Annotated[
        float, typer.Option(min=0.0, help="Of the text objective; above 0 a step costs double.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of initialisation and drawings.")] = 0,
    teacher: Annotated[str | None, typer.Option(help="'embedded' or a teacher's file; the study's by default.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Folder of the run (default runs/STUDY-CANDIDATE).")] = None,
    resume: Annotated[bool, typer.Option(help="Take up the run that is in the folder.")] = True,
    as_json: Json = False,
) -> None:
    """Distil a chosen candidate at length. Scores it beside its teacher; the same command resumes."""
    from nas.record import candidate_of, read_study
    from nas.train import RecipeSettings, train_candidate

    folder, candidate = candidate_of(subject)
    run = out if out is not None else RUNS / f"{folder.name}-{candidate.key}"
    with resumable(command_line(leave_out=("--no-resume",))), Progress("train") as progress:
        found = train_candidate(
            candidate,
            RecipeSettings(steps=steps, batch=batch, text_weight=text_weight, seed=seed),
            run,
            teacher=teacher if teacher is not None else str(read_study(folder)["teacher"]),
            resume=resume,
            device=_device(device),
            report=progress,
        )
    if as_json:
        result_json({"study": folder.name, "candidate": candidate.key, **vars(found)})
    else:
        resumed = f", taken up at step {found.resumed_from}" if found.resumed_from is not None else ""
        result(
            f"{candidate}: {found.params:,} parameters trained for {steps} steps in {duration(found.seconds)}{resumed};"
            f" held-out loss {found.held_out_loss:.4f}"
        )
        result(_scores_table(found.scores, found.teacher_scores))
        result(f"samples {found.grid}")
    closing(wrote=found.weights, following=f"nas sample {found.folder}", as_json=as_json)


def _scores_table(student: Mapping[str, Mapping[str, float]], teacher: Mapping[str, Mapping[str, float]]) -> str:
    """What share of images the checker found right, per set of captions, of student and teacher."""
    rows = [
        (f"{who}, {split} captions", *(f"{share:.1%}" for share in scores.values()))
        for split in student
        for who, scores in (("student", student[split]), ("teacher", teacher[split]))
    ]
    first = next(iter(student.values()))
    return table(("right", *first), rows)


def _device(name: str) -> str:
    import torch

    if name not in ("cpu", "cuda"):
        raise unknown("device to train on", name, ("cpu", "cuda"))
    if name == "cuda" and not torch.cuda.is_available():
        raise NasError("torch sees no CUDA device here", hint="leave --device out")
    return name


def sample(
    run: Annotated[Path, typer.Argument(help="A run's folder, its name under runs/, or a .safetensors file of one.")],
    captions: Annotated[
        list[str] | None, typer.Option(help="A caption; may be given again. Without: random held-out ones.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images per caption, or random captions.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Denoiser calls per image.")] = 20,
    guidance: Annotated[float, typer.Option(min=0.0, help="Of classifier-free guidance; 1 is none.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the starting noise.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="The PNG to write (default samples.png in the run).")] = None,
    as_json: Json = False,
) -> None:
    """Draw captions with a trained network. Each image is checked against its caption."""
    from nas.paths import writable_dir
    from nas.train import sample_checkpoint

    source = run if run.exists() or not (RUNS / run).exists() else RUNS / run
    grid = out if out is not None else (source if source.is_dir() else source.parent) / "samples.png"
    if not source.exists():
        known = [folder.name for folder in RUNS.glob("*") if folder.is_dir()]
        raise unknown("run", run, known, where=f"{RUNS}/", hint="nas train STUDY#CANDIDATE")
    writable_dir(grid.parent)
    with Progress("sample") as progress:
        progress("sample", 0, 1, f"{steps} steps")
        found = sample_checkpoint(
            source, captions or (), grid, count=count, seed=seed, steps=steps, guidance=guidance, device=_device(device)
        )
    if as_json:
        result_json(
            {
                "run": source,
                "grid": found.grid,
                "images": [
                    {"caption": text, "correct": right}
                    for text, right in zip(found.captions, found.correct, strict=True)
                ],
                "scores": found.scores,
            }
        )
    else:
        for text, right in zip(found.captions, found.correct, strict=True):
            result(f"{'right' if right else 'wrong'}  {text}")
        result(", ".join(f"{name} {share:.1%}" for name, share in found.scores.items()))
    weights = source / "network.safetensors" if source.is_dir() else source
    closing(wrote=found.grid, following=f"nas export {weights}", as_json=as_json)
