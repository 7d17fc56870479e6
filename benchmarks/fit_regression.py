"""Fits the proxy `regression` to candidates that were trained long.

    python benchmarks/fit_regression.py [--truth TRUTH.csv] [--space snapgen_unet ...] [--jobs 2]

Every space of the table with enough candidates gets a fit of its own; seeds of one candidate are averaged; of a space's
rows, those of its most frequent settings are taken. The features of each candidate are kept in
reports/proxy/features.csv as they come (killed, the command goes on where it was). Writes
nas/data/proxies/regression.json and prints what the fits explain, left out.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from scipy.stats import kendalltau

from nas.bench import Bench
from nas.errors import NasError
from nas.fidelity import Table, most_frequent
from nas.network import short_hash
from nas.paths import atomic_write
from nas.proxies import settings_of
from nas.proxies.regression import FEATURES, FILE, TARGETS, belongs, check_explains, features, fit
from nas.space import Candidate, SearchSpace, load_space

OUT = Path(__file__).resolve().parent.parent / "reports" / "proxy"
TEACHER = "embedded"  # whose long runs benchmarks/proxy_truth.py has


def truth_of(rows: Sequence[Mapping[str, str]], space: SearchSpace) -> dict[str, dict[str, Any]]:
    """A space's candidates by key, with their choices and the mean of each target over seeds."""
    found: dict[str, dict[str, Any]] = {}
    rows = [row for row in rows if (row["space"], row["space_hash"]) == (space.name, space.hash)]
    for key in dict.fromkeys(row["key"] for row in rows):
        own = [row for row in rows if row["key"] == key]
        means = {target: statistics.fmean(float(row[target]) for row in own) for target in TARGETS}
        found[key] = {"key": key, "choices": json.loads(own[0]["choices"]), "digest": own[0]["digest"], **means}
    return found


def with_features(
    candidates: list[Candidate], bench: Bench, path: Path, jobs: int, say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Each candidate's features by its key; what the table has is not worked out again."""
    table = Table(path, short_hash(json.dumps([belongs(bench), FEATURES])), ("space", "space_hash", "key"))
    missing = [each for each in candidates if (each.space.name, each.space.hash, each.key) not in table]
    bench.prepare()
    for done, (own, found) in enumerate(_worked_out(missing, bench, jobs), start=1):
        table.add({"space": own.space.name, "space_hash": own.space.hash, "key": own.key, **found})
        say(f"{done}/{len(missing)} features of {own}")
    spaces = {(each.space.name, each.space.hash) for each in candidates}
    rows = [row for row in table if (row["space"], row["space_hash"]) in spaces]
    return {row["key"]: {name: float(row[name]) for name in FEATURES} for row in rows}


def _worked_out(missing: list[Candidate], bench: Bench, jobs: int) -> Iterator[tuple[Candidate, dict[str, float]]]:
    """The features of candidates, as they come."""
    if jobs == 1:
        yield from ((each, features(each, bench)) for each in missing)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(features, each, bench): each for each in missing}
        yield from ((running[job], job.result()) for job in as_completed(running))


def fitted(space: SearchSpace, truth: dict[str, dict[str, Any]], known: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One space's fit."""
    rows = [{**row, **known[key]} for key, row in truth.items()]
    return {"space": space.name, "space_hash": space.hash, "truth": rows[0]["digest"], **fit(rows)}


def summary(found: dict[str, Any], truth: dict[str, dict[str, Any]]) -> str:
    """How the predictions that left each candidate out agree with its long run."""
    parts = []
    for name, target in found["targets"].items():
        left_out = target["left_out"]
        tau = kendalltau([left_out[key] for key in truth], [row[name] for row in truth.values()]).statistic
        parts.append(
            f"{name} Kendall {tau:.2f}, {target['explained']:.0%} explained, spread {target['residual_sd']:.3f} dB"
        )
    return f"{found['space']}: {found['rows']} candidates, left out one by one: {'; '.join(parts)}"


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Fits every space that the table has enough of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path, default=OUT / "truth.csv")
    parser.add_argument("--teacher", default=TEACHER)
    parser.add_argument("--space", action="append")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--features", type=Path, default=OUT / "features.csv")
    parser.add_argument("--out", type=Path, default=FILE)
    arguments = parser.parse_args(argv)
    bench = Bench(arguments.teacher, settings_of("regression"))
    with arguments.truth.open(newline="") as stream:
        rows = most_frequent(list(csv.DictReader(stream)))
    names = arguments.space or list(dict.fromkeys(row["space"] for row in rows))
    fits = []
    for space in map(load_space, names):
        truth = truth_of(rows, space)
        candidates = [space.candidate(**row["choices"]) for row in truth.values()]
        known = with_features(candidates, bench, arguments.features, arguments.jobs, say)
        try:
            found = fitted(space, truth, known)
            say(summary(found, truth))
            check_explains(found)
        except NasError as error:
            say(f"{space.name}: no fit: {error.message}")
            continue
        fits.append({**belongs(bench), **found})
    atomic_write(arguments.out, json.dumps({"fits": fits}, indent=1) + "\n")
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
