"""Hypervolume per evaluation: the sampler `front` against Optuna's, where the exact front is known.

    python benchmarks/sampler_front.py [--samplers front tpe ...] [--problems zdt1 ...] [--seeds 20] [--report]

Every problem of benchmarks/_sampler_problems.py is searched by every sampler from every seed. A run ends after 100
evaluations (Optuna's Gaussian process after 50 unless asked on: it takes seconds a proposal). A candidate proposed
again is told its value once more and is no evaluation; after five such in a row one that was not tried is drawn at
random, so that no sampler is stuck. What is kept is the hypervolume of the evaluated candidates' true values, without
the noise that the samplers saw, as a share of the exact front's, under the reference point (greatest cost, least
quality) of the problem.

A row per run in reports/search/sampler_front.csv; the same command goes on where it was killed. Writes
sampler_front.json (means, and paired differences to the best of Optuna's samplers, with 95 % bootstrap intervals over
seeds) and sampler_front.png beside it, and prints the comparison at 50 evaluations last. `--report` only writes these.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from _sampler_problems import CASES, Case
from _sampler_report import report

from nas import pareto, sampler
from nas.fidelity import Table
from nas.network import short_hash

OUT = Path(__file__).resolve().parent.parent / "reports" / "search"
MARKS = (10, 15, 20, 25, 30, 40, 50, 60, 80, 100)
SAMPLERS = ("random", "nsga2", "tpe", "front", "gp", "tpe-univariate")
_REPEATS = 5


def made(name: str, seed: int, case: Case) -> optuna.samplers.BaseSampler:
    """A sampler for a run."""
    if name == "tpe-univariate":
        return optuna.samplers.TPESampler(seed=seed)
    return sampler.make(name, seed=seed, problem=case.problem)


def evaluated(case: Case, name: str, seed: int, count: int) -> Iterator[int]:
    """Searches: the places in `case.problem.rows` of the candidates evaluated, in their order, `count` of them."""
    noise = case.noise_sd * np.random.default_rng([seed, 1]).normal(size=len(case.quality))
    draw = np.random.default_rng([seed, 2])
    problem = case.problem
    study = optuna.create_study(directions=["minimize", "maximize"], sampler=made(name, seed, case))
    known: set[int] = set()
    repeats = 0
    while len(known) < count:
        if repeats == _REPEATS:
            place = int(draw.choice(np.setdiff1d(np.arange(len(problem.rows)), list(known))))
            study.enqueue_trial(problem.params(problem.rows[place]))
        trial = study.ask(dict(problem.distributions))
        row = problem.row(trial.params)
        assert row is not None
        place = problem.find(case.canonical(row[None])[0])
        assert place is not None, "every combination of the choices is a candidate"
        study.tell(trial, [float(problem.cost[place]), float(case.quality[place] + noise[place])])
        repeats = repeats + 1 if place in known else 0
        if place not in known:
            known.add(place)
            yield place


def reference(case: Case) -> tuple[float, float]:
    """The worst cost and the worst quality, as objectives to be minimised."""
    return float(case.problem.cost.max()), -float(case.quality.min())


def exact(case: Case) -> float:
    """The hypervolume of the exact front."""
    order = np.lexsort([-case.quality, case.problem.cost])
    best = np.maximum.accumulate(case.quality[order])
    rising = order[np.concatenate([[True], best[1:] > best[:-1]])]
    return pareto.hypervolume(np.column_stack([case.problem.cost, -case.quality])[rising], reference(case))


def run(case: Case, name: str, seed: int, count: int) -> dict[str, Any]:
    """One row: the share of the exact hypervolume at each of `MARKS`."""
    began = time.perf_counter()
    places = list(evaluated(case, name, seed, count))
    seconds = time.perf_counter() - began
    points, whole = np.column_stack([case.problem.cost, -case.quality])[places], exact(case)
    shares = {
        f"share_{mark}": round(pareto.hypervolume(points[:mark], reference(case)) / whole, 6)
        for mark in MARKS
        if mark <= count
    }
    return {"evaluations": count, "seconds": round(seconds, 1), **shares}


def digest(case: Case) -> str:
    """Changes with the problem's numbers."""
    content = [case.problem.rows.sum(axis=0).tolist(), case.problem.cost.sum(), case.quality.sum(), case.noise_sd]
    return short_hash(json.dumps([round(float(x), 6) if np.isscalar(x) else x for x in content]))


def main() -> None:
    """Runs what is missing, then reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=SAMPLERS)
    parser.add_argument("--problems", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--gp-evaluations", type=int, default=50)
    parser.add_argument("--out", type=Path, default=OUT / "sampler_front.csv")
    parser.add_argument("--report", action="store_true", help="only write what the rows say")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    if not arguments.report:
        search(arguments)
    cases = {name: CASES[name]() for name in arguments.problems}
    report(arguments.out, cases, {name: digest(case) for name, case in cases.items()}, list(MARKS))


def search(arguments: argparse.Namespace) -> None:
    """Adds the missing rows: all of one sampler before the next, and of each seed all problems."""
    table = Table(arguments.out, "1", ("problem", "problem_digest", "sampler", "seed", "evaluations"))
    cases = {name: CASES[name]() for name in arguments.problems}
    digests = {name: digest(case) for name, case in cases.items()}
    for name in arguments.samplers:
        count = arguments.gp_evaluations if name == "gp" else arguments.evaluations
        for seed in range(arguments.seeds):
            for problem, case in cases.items():
                key = (problem, digests[problem], name, seed, count)
                if key not in table:
                    found = run(case, name, seed, count)
                    table.add(dict(zip(table.keys, key, strict=True)) | found)
                    print(f"{name} {problem} seed {seed}: {found[f'share_{min(count, 50)}']:.4f} at 50", flush=True)


if __name__ == "__main__":
    main()
