"""Eight workers on one study, 40 of them killed at random: every trial is run once, none is lost, the front is right.

    python benchmarks/study_faults.py [--workers 8] [--kills 40] [--trials 400]

For a study in PostgreSQL (a server of its own on loopback) and for one in a journal file, starts eight processes, one
of which is the search itself; sends SIGKILL to one of them at random moments and starts it again, until there were as
many kills as asked for and the study has its trials. Then compares what the storage holds with what it must be.
The proxy is a stand-in that sleeps 0.3 s on average and says a formula of the candidate; everything else is the engine
as it is. A run that was killed midway is begun again by another worker, so begun runs are more than finished ones; what
must hold is that each candidate has one outcome, that there are exactly as many as asked for, and that no proposal was
forgotten. Prints the figures last and writes reports/search/study_faults.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import _postgresql
import numpy as np
from _sleeping import latency_ms, plan, prepare, started, value
from optuna.trial import TrialState

from nas import pareto
from nas.paths import atomic_write
from nas.provenance import provenance
from nas.record import front
from nas.study import Plan, Study
from nas.study.facts import LOST, WITHDRAWN

MEAN_S = 0.3
SPREAD = 0.9
OUT = Path("reports/search/study_faults.json")


def opened(log: Path) -> set[int]:
    """Processes that have the study open, or had."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {int(line.split()[2]) for line in lines if line.startswith("open")}


def hunted(given: Plan, folder: Path, workers: int, kills: int, generator: random.Random) -> dict[str, Any]:
    """The study with workers that are killed and started again; what was done to it."""
    log = folder / "log"
    prepare(given, folder)
    began = time.monotonic()
    first = started(given, folder, MEAN_S, log, SPREAD, joins=False)
    while first.pid not in opened(log):
        time.sleep(0.05)
    alive = [first, *(started(given, folder, MEAN_S, log, SPREAD, joins=True) for _ in range(workers - 1))]
    killed, search_killed = 0, 0
    due = time.monotonic() + 1.0
    while any(each.is_alive() for each in alive):
        for place, each in enumerate(alive):
            if not each.is_alive() and each.exitcode not in (0, -signal.SIGKILL):
                raise SystemExit(f"worker {place} ended with {each.exitcode}")
        victims = [i for i, each in enumerate(alive) if each.is_alive() and each.pid in opened(log)]
        if killed < kills and victims and time.monotonic() > due:
            place = generator.choice(victims)
            os.kill(alive[place].pid or 0, signal.SIGKILL)
            alive[place].join()
            killed, search_killed = killed + 1, search_killed + (place == 0)
            alive[place] = started(given, folder, MEAN_S, log, SPREAD, joins=place != 0)
            due = time.monotonic() + generator.uniform(0.05, 0.8)
        time.sleep(0.01)
    lines = Counter(line.split()[0] for line in log.read_text().splitlines())
    return {
        "kills": killed,
        "kills_of_the_search_itself": search_killed,
        "seconds": round(time.monotonic() - began, 1),
        "runs_begun": lines["begin"],
        "runs_finished": lines["end"],
    }


def judged(given: Plan, folder: Path) -> dict[str, Any]:
    """What the storage holds, against what it must be."""
    with Study(given, folder, name="sleeping", joins=True) as study:
        snapshot, trials = study.snapshot(), study.trials()
        states = Counter(trial.state.name for trial in study.study.get_trials(deepcopy=False))
        running = [t.number for t in study.study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING]
    told = [fact for fact in snapshot.facts if fact.state == "proxied"]
    claimed = {fact.row for fact in snapshot.facts if fact.state == LOST}
    rows = Counter(fact.row for fact in told)
    held = {fact.row for fact in told}
    points = np.array([[latency_ms(row), -value(row)] for row in sorted(held) if latency_ms(row) <= 90.0])
    exact = sorted(tuple(point) for point in points[pareto.non_dominated(points)].tolist())
    found = sorted((e.latency_ms, -float(e.quality or 0.0)) for e in front(trials))
    return {
        "trials": len(told),
        "asked_for": given.trials,
        "done_twice": sum(count - 1 for count in rows.values()),
        "claimed_and_forgotten": len(claimed - held),
        "still_running": len(running),
        "lost_and_given_back": sum(fact.state == LOST for fact in snapshot.facts),
        "withdrawn": sum(fact.state == WITHDRAWN for fact in snapshot.facts),
        "wrong_scores": sum(fact.outcome.score.value != value(fact.row) for fact in told),  # type: ignore[union-attr]
        "front": len(found),
        "front_identical": found == exact,
        "states": dict(states),
    }


def good(found: dict[str, Any]) -> bool:
    """Whether nothing is missing and nothing is double."""
    zero = ("done_twice", "claimed_and_forgotten", "still_running", "wrong_scores")
    return found["trials"] == found["asked_for"] and found["front_identical"] and not any(found[name] for name in zero)


def main() -> None:
    """Both storages, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    results: dict[str, Any] = {}
    with _postgresql.server() as server:
        for name, url in (("postgresql", server.url), ("journal", None)):
            with tempfile.TemporaryDirectory() as folder:
                given = plan(options.trials, url, sampler=options.sampler)
                done = hunted(given, Path(folder), options.workers, options.kills, generator)
                results[name] = {**done, **judged(given, Path(folder))}
            print(f"{name}: {json.dumps(results[name])}", file=sys.stderr)
    stamp = provenance(command=" ".join(sys.argv), seed=options.seed)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(OUT, json.dumps({"workers": options.workers, **results, "provenance": stamp}, indent=1) + "\n")
    for name, found in results.items():
        print(
            f"{name}: {found['kills']} kills, {found['trials']} of {found['asked_for']} trials,"
            f" {found['done_twice']} done twice, {found['claimed_and_forgotten']} lost, front of {found['front']}"
            f" {'identical' if found['front_identical'] else 'DIFFERENT'}"
        )
    enough = all(good(found) and found["kills"] >= options.kills for found in results.values())
    raise SystemExit(0 if enough else 1)


if __name__ == "__main__":
    main()
