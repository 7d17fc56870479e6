"""Few-step distillation of one student on the embedded task: python benchmarks/few_steps.py [--only ARM ...].

The student of benchmarks/embedded_student.py is first distilled by `output`; every arm then starts from that. All are
sampled at 1, 2 and 4 steps from the same captions and noise, beside the teacher at 20 steps and the undistilled student
at 1, 2, 4 (Euler steps with guidance, which doubles its calls; few-step arms need none) and 20. Runs resume, finished
ones are kept.

Prints every arm's share of held-out captions found right at 1, 2 and 4 steps last, and writes
reports/benchmarks/few_steps.csv, .json and a grid of samples per row in reports/benchmarks/few_steps/.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import embedded_student as es
import pandas as pd
import torch
from PIL import Image

from nas.bench import embedded_lesson
from nas.diffusion import FLOW, Denoiser
from nas.distill import Checkpoints, TrainSettings, train
from nas.judge import EmbeddedPipeline, scores
from nas.judge.scoring import drawn
from nas.objectives import Objective, objective
from nas.paths import atomic_write
from nas.provenance import provenance
from nas.students import WEIGHTS, Sampling, load_student, save_student
from nas.targets import Fresh, Lesson

STEPS = (1, 2, 4)
BASE = TrainSettings(steps=1500, batch=64, lr=2e-3, warmup=50)
GUIDANCE = 2.0  # of the teacher wherever one is asked for guided answers, and of the undistilled student


def few(steps: int, **changes: Any) -> TrainSettings:
    """The settings of an arm."""
    common: dict[str, Any] = {"batch": 32, "warmup": 50, "decay_share": 0.3, "betas": (0.0, 0.99), "clip": 0.0}
    return TrainSettings(**{"steps": steps, **common, **changes})


_GAME = {"critic_lr": 1e-3, "student_every": 3, "critic_betas": (0.0, 0.99), "guidance": GUIDANCE}
_LEVELS = (999, 749, 499, 249)
# Objectives, settings and the steps that the arm can be sampled in. Learning rates are those of a network a thousand
# times smaller than the published ones; guidance, schedules and alternation follow the papers where nothing is said.
ARMS: dict[str, tuple[tuple[tuple[str, dict[str, Any]], ...], TrainSettings, tuple[int, ...]]] = {
    "consistency": (
        (("consistency", {"w_min": GUIDANCE - 1, "w_max": GUIDANCE - 1}),),
        few(900, lr=5e-4, betas=(0.9, 0.99), clip=1.0),
        STEPS,
    ),
    "dmd-1": ((("dmd", {**_GAME, "levels": (999,)}),), few(1000, lr=4e-4), (1,)),
    "dmd-4": ((("dmd", {**_GAME, "levels": _LEVELS}),), few(900, lr=4e-4), (4,)),
    "sid_lsg": (
        (
            (
                "sid_lsg",
                {**{f"kappa{k}": GUIDANCE for k in (1, 2, 3, 4)}, "t_init": 713, "fake_lr": 5e-4},
            ),
        ),
        few(600, lr=2e-4),
        STEPS,
    ),
    "adversarial": (
        (("adversarial", {"levels": _LEVELS, "lr": 5e-4}), ("output", {})),
        few(600, lr=4e-4),
        (4,),
    ),
}


def made(arm: str) -> tuple[Objective, ...]:
    """The arm's objectives."""
    return tuple(objective(name, **settings) for name, settings in ARMS[arm][0])


def base(runs: Path) -> Path:
    """The undistilled student that every arm starts from."""
    weights = runs / "base" / WEIGHTS
    if not weights.is_file():
        teacher, lesson = embedded_lesson("embedded", "shapes")
        found = train(
            es.student(lesson, 0),
            Fresh(lesson=lesson, size=BASE.batch, seed=0),
            (objective("output"),),
            BASE,
            teacher=teacher,
            checkpoints=Checkpoints(folder=weights.parent, every=100),
        )
        save_student(weights, found.average, Sampling(guidance=GUIDANCE), es.about() | {"arm": "base"})
    return weights


def trained(arm: str, runs: Path) -> Path:
    """One arm from the base."""
    weights = runs / arm / WEIGHTS
    if weights.is_file():
        return weights
    teacher, lesson = embedded_lesson("embedded", "shapes")
    student = load_student(base(runs)).denoiser.requires_grad_(True)
    settings = ARMS[arm][1]
    began = time.process_time()
    found = train(
        student,
        Fresh(lesson=lesson, size=settings.batch, seed=0, null_every=0),
        made(arm),
        settings,
        teacher=teacher,
        checkpoints=Checkpoints(folder=weights.parent, every=100),
        on_progress=lambda history: print(arm, history[-1], file=sys.stderr, flush=True),
        report_every=100,
    )
    about = {"arm": arm, "training_steps": settings.steps, "cpu_s": round(time.process_time() - began, 1)}
    sampling = sampling_of(arm, ARMS[arm][2][-1])
    return save_student(weights, found.average, sampling, es.about() | about)


def sampling_of(arm: str, steps: int) -> Sampling:
    """How an arm's student is sampled in `steps`."""
    game: Any = made(arm)[0]
    times, unit_start = game.sampling(FLOW, steps)
    return Sampling(times=times, unit_start=unit_start)


def euler(steps: int) -> Sampling:
    """How the teacher and the undistilled student are sampled."""
    return Sampling(steps=steps, guidance=GUIDANCE)


def row(
    name: str, steps: int, denoiser: Denoiser, sampling: Sampling, lesson: Lesson, options: argparse.Namespace
) -> dict[str, Any]:
    """Scores and a grid of samples."""
    found = scores(denoiser, lesson, sampling, prompts=options.prompts)
    generator = torch.Generator().manual_seed(4)
    captions = lesson.task.sample(32, "held-out", generator)
    images = drawn(denoiser, EmbeddedPipeline(lesson=lesson), sampling, captions)
    pixels = Image.fromarray(lesson.task.grid(images))
    buffer = io.BytesIO()
    pixels.resize((pixels.width * 3, pixels.height * 3), Image.Resampling.NEAREST).save(buffer, format="PNG")
    atomic_write(options.out / "few_steps" / f"{name}-{steps}.png", buffer.getvalue())
    print(name, steps, found, file=sys.stderr, flush=True)
    return {"network": name, "steps": steps, **found}


def main() -> None:
    """Trains what is missing, scores everything, sums up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(ARMS), default=list(ARMS))
    parser.add_argument("--train-only", action="store_true", help="score nothing")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--runs", type=Path, default=Path("runs/few_steps"))
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = {arm: trained(arm, options.runs) for arm in options.only}
    if options.train_only:
        return
    _, lesson = embedded_lesson("embedded", "shapes")
    rows = [row("teacher", 20, lesson.teacher, euler(20), lesson, options)]
    student = load_student(base(options.runs)).denoiser
    rows += [row("undistilled", steps, student, euler(steps), lesson, options) for steps in (*STEPS, 20)]
    for arm, weights in files.items():
        student = load_student(weights).denoiser
        rows += [row(arm, steps, student, sampling_of(arm, steps), lesson, options) for steps in ARMS[arm][2]]
    frame = pd.DataFrame(rows)
    atomic_write(options.out / "few_steps.csv", frame.to_csv(index=False, float_format="%.6g"))
    about = {
        "command": "python benchmarks/few_steps.py",
        "prompts": options.prompts,
        "arms": {arm: load_student(weights).about for arm, weights in files.items()},
        "provenance": provenance(seed=0),
    }
    atomic_write(options.out / "few_steps.json", json.dumps(about, indent=1) + "\n")
    print(frame.to_string(index=False))
    print(", ".join(f"{r['network']} at {r['steps']}: {r['correct']:.1%}" for r in rows))


if __name__ == "__main__":
    main()
