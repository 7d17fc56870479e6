"""A chosen candidate and the smallest of the space, trained alike at length, beside their teacher.

    python benchmarks/train_front.py STUDY#CANDIDATE [--steps 1500] [--text-weight 0]

"Smallest" is the space's candidate of fewest parameters, found by going down every choice. Both run `nas train`'s own
code, side by side, one thread each, and resume if they are killed. Prints the checker's all-correct shares last and
writes reports/benchmarks/train_front.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nas.objectives import objective
from nas.paths import atomic_write
from nas.pricing import Pricer
from nas.provenance import provenance
from nas.record import candidate_of
from nas.space import Candidate, SearchSpace
from nas.train import Recipe, Subject, load_recipe, train_recipe
from nas.train.recipe import Goal


def smallest(space: SearchSpace) -> Candidate:
    """The candidate of fewest parameters that changing any one choice does not make smaller."""
    pricer = Pricer(space)
    row = space.sample(1, 0)[0]
    while True:
        others = [row.copy() for _ in range(sum(len(c.values) for c in space.choices))]
        places = [(i, v) for i, c in enumerate(space.choices) for v in range(len(c.values))]
        for other, (column, value) in zip(others, places, strict=True):
            other[column] = value
        rows = space.canonical(np.array(others))
        rows = rows[space.allowed(rows)]
        params = pricer.rows(rows).params
        if int(params.min()) >= int(pricer.rows(row[None]).params[0]):
            return space.from_row(row)
        row = rows[int(np.argmin(params))]


def chosen_recipe(steps: int, text_weight: float) -> Recipe:
    """The recipe of the embedded task, with the text objective (which asks every drawing without its caption too)."""
    plain = load_recipe("shapes", steps=steps)
    if text_weight == 0:
        return plain
    (stage,) = plain.stages
    text = Goal(name="text", objective=objective("text", weight=text_weight))
    return replace(plain, stages=(replace(stage, goals=(*stage.goals, text), null_share=0.0),))


def run(candidate: Candidate, recipe: Recipe, out: Path) -> dict[str, Any]:
    """One training; what a reader compares."""
    torch.set_num_threads(1)
    label = f"{out.name} {candidate.key}"

    def say(stage: str, done: float, total: float, note: str) -> None:
        if done % 100 == 0:
            print(f"{label}: {stage} {done:g}/{total:g} {note}", file=sys.stderr, flush=True)

    found = train_recipe(recipe, Subject(candidate=candidate, teacher="embedded"), out, report=say)
    assert found.scores is not None  # the embedded task checks its images
    return {
        "candidate": candidate.key,
        "choices": dict(candidate.choices),
        "copy_params": found.params,
        "held_out_loss": found.scores.held_out_loss,
        "seconds": found.seconds,
        "student": found.scores.student,
        "teacher": found.scores.teacher,
    }


def main() -> None:
    """Trains both and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--text-weight", type=float, default=0.0, help="above 0 adds the text objective")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args()
    chosen = candidate_of(options.subject)[1]
    recipe = chosen_recipe(options.steps, options.text_weight)
    jobs = {"front": chosen, "smallest": smallest(chosen.space)}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        futures = {n: pool.submit(run, c, recipe, options.runs / f"{n}-{c.key}") for n, c in jobs.items()}
        results = {name: future.result() for name, future in futures.items()}
    record = {
        **results,
        "steps": options.steps,
        "text_weight": options.text_weight,
        "batch": recipe.stages[0].train.batch,
        "provenance": provenance(command=" ".join(sys.argv), seed=0),
    }
    atomic_write(Path("reports/benchmarks/train_front.json"), json.dumps(record, indent=1) + "\n")
    for split in ("held-out", "all"):
        shares = {name: results[name]["student"][split]["correct"] for name in jobs}
        teacher = results["front"]["teacher"][split]["correct"]
        print(
            f"{split}: teacher {teacher:.1%}, front member {shares['front']:.1%}, smallest {shares['smallest']:.1%}"
            " all-correct"
        )


if __name__ == "__main__":
    main()
