"""Eight workers on PostgreSQL against one, and what the study itself costs per trial, with a proxy that sleeps.

    python benchmarks/study_scaling.py [--workers 8] [--sleep 5] [--trials 20] [--sampler front]

The space, its prices and the sampler are those of `nas search --space snapgen_unet --budget 1.4s@iphone`; the storage
is a PostgreSQL server on loopback. Only the proxy is a stand-in: it sleeps and says a formula. One worker runs
`--trials` trials, then `--workers` workers run that many each, all in processes of this machine. The figures:

    overhead: of one worker, the median time from the end of a run to the beginning of its next, over the run's time.
    scaling: trials per second of all workers over those of one, from the first beginning to the last end.

`cpu_s` is the processor time that the study took per trial, all processes together: on a machine with fewer cores than
workers it limits the scaling, on a cluster it does not. Prints the figures last and writes
reports/search/study_scaling.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _postgresql
import numpy as np
from _sleeping import prepare, started

from nas import quality
from nas.device import Budget, find_target
from nas.evaluate import DeviceBudget, Evaluator, terms
from nas.evaluate.pool import Pool
from nas.latency import load_predictor
from nas.paths import atomic_write
from nas.provenance import provenance
from nas.space import load_space
from nas.study import Plan

OUT = Path("reports/search/study_scaling.json")


@dataclass(frozen=True, kw_only=True)
class Remembering(Evaluator):
    """Lists its pool once; the workers that are forked from here then need not, as workers of one machine each do."""

    @functools.cache  # noqa: B019 - one evaluator for the whole benchmark
    def problem_pool(self, n: int = 100_000, seed: int = 0) -> Pool:
        """As the evaluator's."""
        return super().problem_pool(n, seed)

    __hash__ = object.__hash__


def evaluator() -> Evaluator:
    """Of the README's search."""
    space, budget = load_space("snapgen_unet"), Budget.parse("1.4s@iphone")
    sheet = find_target(budget.device)
    predictor = load_predictor(sheet.slug)
    mine = DeviceBudget(sheet=sheet, predictor=predictor, terms=terms(space, sheet, budget, 0.8, predictor))
    found = Remembering(space=space, budgets=(mine,))
    found.pricer.prepare(lambda done, total: None)
    return found


def measured(given: Plan, workers: int, sleep_s: float) -> dict[str, Any]:
    """A whole study by some workers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "log"
        prepare(given, folder)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        first = started(given, folder, sleep_s, log, joins=False)
        while not log.exists():
            os.sched_yield()
        others = [started(given, folder, sleep_s, log, joins=True) for _ in range(workers - 1)]
        for each in (first, *others):
            each.join()
            if each.exitcode:
                raise SystemExit(f"a worker ended with {each.exitcode}")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        lines = [line.split() for line in log.read_text().splitlines() if not line.startswith("open")]
    begins = [float(at) for what, _, _, at in lines if what == "begin"]
    ends = [float(at) for what, _, _, at in lines if what == "end"]
    gaps = []
    for pid in {pid for _, _, pid, _ in lines}:
        mine = [float(at) for _, _, who, at in lines if who == pid]
        gaps += [begin - end for end, begin in zip(mine[1::2], mine[2::2], strict=False)]
    cpu_s = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return {
        "workers": workers,
        "trials": len(ends),
        "seconds": round(max(ends) - min(begins), 2),
        "trials_per_s": len(ends) / (max(ends) - min(begins)),
        "between_runs_s": round(float(np.mean(gaps)), 3),
        "between_runs_median_s": round(float(np.median(gaps)), 3),
        "cpu_s_per_trial": round(cpu_s / len(ends), 3),
    }


def main() -> None:
    """One worker, then several."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--sleep", type=float, default=5.0, help="seconds of one proxy run")
    parser.add_argument("--trials", type=int, default=20, help="per worker")
    parser.add_argument("--sampler", default="front")
    options = parser.parse_args()
    given = functools.partial(
        Plan,
        evaluator=evaluator(),
        teacher="embedded",
        proxy=quality.ProxySettings(),
        seed=0,
        jobs=1,
        sampler=options.sampler,
    )
    given.keywords["evaluator"].problem_pool(100_000, 0)
    results = []
    for workers in (1, options.workers):
        with _postgresql.server() as server:
            results.append(measured(given(trials=workers * options.trials, storage=server.url), workers, options.sleep))
        print(json.dumps(results[-1]), file=sys.stderr)
    one, many = results
    found = {
        "sleep_s": options.sleep,
        "sampler": options.sampler,
        "overhead": round(one["between_runs_median_s"] / options.sleep, 4),
        "scaling": round(many["trials_per_s"] / one["trials_per_s"], 2),
        "runs": results,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 1),
        "provenance": provenance(command=" ".join(sys.argv), seed=0),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(OUT, json.dumps(found, indent=1) + "\n")
    print(
        f"overhead {found['overhead']:.1%} of a {options.sleep:g} s proxy; {options.workers} workers"
        f" {found['scaling']:.2f} times as fast as one, on {found['cores']} cores with a load of {found['load']}"
    )


if __name__ == "__main__":
    main()
