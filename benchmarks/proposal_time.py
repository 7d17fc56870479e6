"""How long one proposal of the sampler `front` takes, by the number of evaluations.

    python benchmarks/proposal_time.py [--repeats 5]

The candidates are those of `nas search --space snapgen_unet --budget 1.4s@iphone`: 100,000 priced ones and the
neighbours of the best. Evaluated are as many of them drawn at random as a line says, by a quality that is planted:
a random effect of every choice, and noise. Each time is the processor time of one `ask` of one thread, the candidates
already listed, as they are for all but the first proposal of a worker. Prints the medians last and writes
reports/search/proposal_time.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import optuna
from study_scaling import evaluator

from nas.paths import atomic_write
from nas.provenance import provenance
from nas.sampler import FrontSampler, Problem
from nas.study.propose import POOL, distributions

OUT = Path("reports/search/proposal_time.json")
EVALUATIONS = (20, 50, 100, 200)


def main() -> None:
    """Times proposals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    prices = evaluator()
    rows, latency_ms, features = prices.problem_pool(POOL, 0)
    problem = Problem(
        distributions=distributions(prices.space),
        rows=rows,
        cost=latency_ms,
        features=features,
        more=lambda some: prices.neighbours(some, 0),
        price=prices.features,
    )
    found = {}
    for count in EVALUATIONS:
        seconds = []
        for seed in range(options.repeats):
            study = evaluated(problem, count, seed)
            study.ask(problem.distributions)
            began = time.process_time()
            study.ask(problem.distributions)
            seconds.append(time.process_time() - began)
        found[str(count)] = {"median_s": round(float(np.median(seconds)), 3), "most_s": round(max(seconds), 3)}
        print(f"{count} evaluations: {found[str(count)]}", file=sys.stderr)
    whole = {
        "candidates": len(rows),
        "repeats": options.repeats,
        "seconds_by_evaluations": found,
        "provenance": provenance(command="benchmarks/proposal_time.py", seed=0),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(OUT, json.dumps(whole, indent=1) + "\n")
    print(
        f"one proposal among {len(rows):,} candidates, CPU s:",
        ", ".join(f"{each['median_s']} after {count} evaluations" for count, each in found.items()),
    )


def evaluated(problem: Problem, count: int, seed: int) -> optuna.Study:
    """A study that holds `count` evaluations."""
    generator = np.random.default_rng(seed)
    effects = [generator.normal(size=choice.size) for choice in problem.choices]
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=FrontSampler(problem, seed=seed))
    for place in generator.choice(len(problem.rows), count, replace=False):
        row = problem.rows[place]
        quality = sum(effect[index] for effect, index in zip(effects, row, strict=True)) + 0.3 * generator.normal()
        study.add_trial(
            optuna.trial.create_trial(
                params=problem.params(row),
                distributions=dict(problem.distributions),
                values=[float(problem.cost[place]), float(quality)],
            )
        )
    return study


if __name__ == "__main__":
    main()
