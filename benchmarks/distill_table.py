"""Five ways to distil one student, at equal compute and three seeds: python benchmarks/distill_table.py [--steps 500].

The student is the embedded teacher without three blocks (benchmarks/embedded_student.py). Every arm gets the same
multiply-accumulates: a step costs three calls of the student (forward, and backward as two) and, where the arm has a
teacher, one of the teacher, so "no distillation" takes more steps. Everything else is the same: the drawings of a seed,
batch, learning rate, the start from the teacher's weights. Runs resume, and finished ones are kept.

Prints the mean share of held-out captions that the checker finds right, per arm, last, and writes
reports/benchmarks/distill_table.csv and .json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import embedded_student as es
import pandas as pd
import torch

from nas.bench import embedded_lesson
from nas.distill import Checkpoints, TrainSettings, train
from nas.judge import scores
from nas.objectives import Objective, objective
from nas.paths import atomic_write
from nas.provenance import provenance
from nas.students import WEIGHTS, Sampling, load_student, save_student
from nas.targets import Fresh, Lesson

# What each arm minimises: the published sums, with the published weights.
ARMS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "none": (("task", {}),),
    "output": (("output", {}),),
    "multi_level": (("multi_level", {}),),  # SnapGen: both of its levels hold the task loss
    "self_attention": (("task", {}), ("output", {}), ("self_attention", {})),  # KOALA
    "layers": (("task", {}), ("output", {"weight": 0.5}), ("layers", {"weight": 0.5})),  # SSD-1B
}
SEEDS = (0, 1, 2)
BATCH, RATE = 64, 2e-3


def objectives(arm: str) -> tuple[Objective, ...]:
    """The arm's losses."""
    return tuple(objective(name, **settings) for name, settings in ARMS[arm])


def steps_of(arm: str, steps: int, lesson: Lesson) -> int:
    """The arm's steps, so that all take as many multiply-accumulates as `steps` with a teacher."""
    student, teacher = es.macs(es.student_spec(lesson)), es.macs(es.teacher_network(lesson).spec)
    if arm != "none":
        return steps
    return round(steps * (3 * student + teacher) / (3 * student))


def trained(arm: str, seed: int, steps: int, folder: Path) -> Path:
    """One training; its file is kept, so that it is done once."""
    weights = folder / WEIGHTS
    if weights.is_file():
        return weights
    teacher, lesson = embedded_lesson("embedded", "shapes")
    taken = steps_of(arm, steps, lesson)
    began = time.process_time()
    found = train(
        es.student(lesson, seed),
        Fresh(lesson=lesson, size=BATCH, seed=seed),
        objectives(arm),
        TrainSettings(steps=taken, batch=BATCH, lr=RATE, warmup=50, seed=seed),
        teacher=teacher,
        checkpoints=Checkpoints(folder=folder, every=100),
    )
    about = {"arm": arm, "seed": seed, "steps": taken, "cpu_s": round(time.process_time() - began, 1)}
    return save_student(weights, found.average, Sampling(), es.about() | about)


def scored(weights: Path, lesson: Lesson, prompts: int) -> dict[str, Any]:
    """A trained student's row."""
    found = load_student(weights)
    return {name: found.about[name] for name in ("arm", "seed", "steps", "cpu_s")} | scores(
        found.denoiser, lesson, Sampling(), prompts=prompts
    )


def main() -> None:
    """Runs what is missing and sums up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="of the arms with a teacher")
    parser.add_argument("--prompts", type=int, default=512, help="held-out captions that are drawn and checked")
    parser.add_argument("--runs", type=Path, default=Path("runs/distill_table"))
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    files = []
    for seed in SEEDS:
        for arm in ARMS:
            print(f"{arm}, seed {seed}", file=sys.stderr, flush=True)
            files.append(trained(arm, seed, options.steps, options.runs / f"{arm}-{seed}"))
    _, lesson = embedded_lesson("embedded", "shapes")
    rows = [scored(weights, lesson, options.prompts) for weights in files]
    atomic_write(options.out / "distill_table.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))
    frame = pd.DataFrame(rows)
    numbers = [name for name in frame.columns if name not in ("arm", "seed")]
    grouped = frame.groupby("arm", sort=False)[numbers]
    means, spreads = grouped.mean().round(5), grouped.std().round(5)
    teacher, lesson = embedded_lesson("embedded", "shapes")
    summary = {
        "command": f"python benchmarks/distill_table.py --steps {options.steps} --prompts {options.prompts}",
        "student_params": es.params(es.student(lesson, 0).network),  # type: ignore[arg-type]
        "teacher_unet_params": es.params(es.teacher_network(lesson)),
        "teacher_params": sum(parameter.numel() for parameter in teacher.parameters()),
        "batch": BATCH,
        "lr": RATE,
        "teacher": scores(lesson.teacher, lesson, Sampling(), prompts=options.prompts),
        "untrained": scores(es.student(lesson, 0).eval(), lesson, Sampling(), prompts=options.prompts),
        "mean": means.to_dict("index"),
        "sd_of_seeds": spreads.to_dict("index"),
        "provenance": provenance(seed=0),
    }
    atomic_write(options.out / "distill_table.json", json.dumps(summary, indent=1) + "\n")
    print(pd.DataFrame(summary["mean"]).T.to_string())
    print(", ".join(f"{arm} {value:.1%}" for arm, value in means["correct"].items()))


if __name__ == "__main__":
    main()
