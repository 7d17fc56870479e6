"""Does the short proxy score rank candidates as a run ten times longer does?

    python benchmarks/proxy_rank.py [--space snapgen_unet] [--candidates 12] [--jobs 2]

Scores diverse candidates (the references and, by maximin distance, others) with the search's proxy settings, and once
more for ten times as many steps from other initialisations. Rank agreement, with bootstrap intervals over candidates,
stands beside that of parameters and MACs as predictors. Writes reports/benchmarks/proxy_rank.csv (a row per candidate,
taken up again after a kill) and proxy_rank.json (the card that `nas search` shows); prints the figures last.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from nas import quality
from nas.network import short_hash
from nas.paths import atomic_write
from nas.pricing import Pricer
from nas.provenance import provenance
from nas.quality import ProxySettings
from nas.space import Candidate, SearchSpace, load_space

OUT = Path(__file__).resolve().parent.parent / "reports" / "benchmarks"
LONGER = 10
LONG_SEEDS = (100,)  # none of the short run's, so that agreement is not shared initialisation
RESAMPLES = 2000
CONFIDENCE = 0.9
FIELDS = (
    "digest",
    "key",
    "choices",
    "params",
    "macs",
    "short_db",
    "short_sd",
    "short_seeds_db",
    "short_text_db",
    "short_s",
    "long_db",
    "long_text_db",
    "long_s",
)


def diverse(space: SearchSpace, count: int, seed: int) -> list[Candidate]:
    """The references first, then each time the sampled candidate farthest from those chosen (maximin)."""
    chosen = [space.reference(reference.name) for reference in space.references][:count]
    pool = space.sample(2000, seed)
    places = _places(space, pool)
    taken = _places(space, np.array([candidate.row for candidate in chosen]))
    distance = np.abs(places[:, None] - taken[None]).sum(-1).min(1)
    while len(chosen) < count:
        best = int(distance.argmax())
        chosen.append(space.from_row(pool[best]))
        distance = np.minimum(distance, np.abs(places - places[best]).sum(-1))
    return chosen


def _places(space: SearchSpace, rows: np.ndarray) -> np.ndarray:
    """Rows as points: an ordinal choice is one axis from 0 to 1, each value of another is an axis of height 1/2."""
    parts = []
    for column, choice in enumerate(space.choices):
        index = rows[:, column]
        if choice.ordinal:
            parts.append(index[:, None] / max(1, len(choice.values) - 1))
        else:
            parts.append(0.5 * (index[:, None] == np.arange(len(choice.values))))
    return np.concatenate(parts, axis=1)


def evaluate(candidate: Candidate, teacher: str, short: ProxySettings, long: ProxySettings) -> dict[str, Any]:
    """Both scores of one candidate, as a row."""
    first = quality.score(candidate, teacher, short)
    second = quality.score(candidate, teacher, long)
    return {
        "key": candidate.key,
        "choices": json.dumps(candidate.choices, sort_keys=True),
        "short_db": first.quality_db,
        "short_sd": first.quality_sd,
        "short_seeds_db": json.dumps(first.seeds_db),
        "short_text_db": first.text_db,
        "short_s": first.seconds,
        "long_db": second.quality_db,
        "long_text_db": second.text_db,
        "long_s": second.seconds,
    }


def agreement(score: np.ndarray, truth: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Kendall's tau-b and Spearman's rho of a score with the truth, tau with a bootstrap interval over candidates."""
    generator = np.random.default_rng(seed)
    resampled = []
    while len(resampled) < RESAMPLES:
        index = generator.integers(0, len(score), len(score))
        if len(np.unique(truth[index])) > 1 and len(np.unique(score[index])) > 1:
            resampled.append(stats.kendalltau(score[index], truth[index]).statistic)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {
        "kendall": round(float(stats.kendalltau(score, truth).statistic), 3),
        "kendall_low": round(float(low), 3),
        "kendall_high": round(float(high), 3),
        "spearman": round(float(stats.spearmanr(score, truth).statistic), 3),
    }


def card(rows: list[dict[str, Any]], space: SearchSpace, short: ProxySettings, teacher: str) -> dict[str, Any]:
    """What the rows show, in the form that a study's page prints."""

    def column(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows])

    truth = column("long_db")
    seeds = np.array([json.loads(row["short_seeds_db"]) for row in rows])
    predictors = {
        "proxy score (median of the seeds)": column("short_db"),
        "proxy score (first seed only)": seeds[:, 0],
        "parameters": column("params"),
        "MACs": column("macs"),
    }
    table = [{"predictor": name, **agreement(score, truth)} for name, score in predictors.items()]
    ours, best = table[0], max(table[2:], key=lambda row: row["kendall"])
    verdict = "ranks better than" if ours["kendall"] > best["kendall"] else "ranks no better than"
    steps = short.steps * LONGER
    return {
        "note": (
            f"{len(rows)} diverse candidates of {space.name}: the {short.steps}-step score (median of"
            f" {len(short.seeds)} seeds) against one {steps}-step run from another initialisation. Kendall tau"
            f" {ours['kendall']:.2f} (bootstrap {CONFIDENCE:.0%} interval {ours['kendall_low']:.2f} to"
            f" {ours['kendall_high']:.2f}); it {verdict} {best['predictor']} ({best['kendall']:.2f})."
        ),
        "agreement": table,
        "text_agreement": [
            {"predictor": "proxy text score", **agreement(column("short_text_db"), column("long_text_db"))}
        ],
        "candidates": len(rows),
        "between_candidates_sd_db": round(float(column("short_db").std(ddof=1)), 3),
        "between_seeds_sd_db": round(float(np.sqrt((seeds.var(axis=1, ddof=1)).mean())), 3),
        "long_between_candidates_sd_db": round(float(truth.std(ddof=1)), 3),
        "long_text_db_best": round(float(column("long_text_db").max()), 3),
        "short_seconds_median": round(float(np.median(column("short_s"))), 1),
        "long_seconds_median": round(float(np.median(column("long_s"))), 1),
        "long_steps": steps,
        "space": space.name,
        "teacher_digest": quality.teacher_hash(teacher),
        "proxy": json.loads(json.dumps(asdict(short))),
        "provenance": provenance(seed=0),
    }


class Rows:
    """The CSV: rows of this digest are kept, others are dropped."""

    def __init__(self, path: Path, digest: str) -> None:
        self.path, self.digest = path, digest
        self.rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            with path.open() as stream:
                self.rows = {row["key"]: row for row in csv.DictReader(stream) if row["digest"] == digest}

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row and writes the file."""
        self.rows[row["key"]] = {"digest": self.digest, **row}
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows.values())
        atomic_write(self.path, buffer.getvalue())


def measure(
    chosen: Iterable[Candidate], teacher: str, short: ProxySettings, long: ProxySettings, jobs: int
) -> Iterable[dict[str, Any]]:
    """Rows as they are finished."""
    quality.prepare(teacher, short)
    quality.prepare(teacher, long)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(evaluate, candidate, teacher, short, long) for candidate in chosen]
        for job in waiting:
            yield job.result()


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Measures what is missing, writes the card and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="snapgen_unet")
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--candidates", type=int, default=12)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    space, short = load_space(arguments.space), ProxySettings()
    long = replace(short, steps=LONGER * short.steps, seeds=LONG_SEEDS)
    identity = [space.hash, quality.teacher_hash(arguments.teacher), asdict(short), asdict(long)]
    kept = Rows(arguments.out / "proxy_rank.csv", short_hash(json.dumps(identity, sort_keys=True)))
    chosen = diverse(space, arguments.candidates, arguments.seed)
    costs = Pricer(space).rows(np.array([candidate.row for candidate in chosen]))
    size = {c.key: (int(costs.params[i]), int(costs.macs[i])) for i, c in enumerate(chosen)}
    missing = [candidate for candidate in chosen if candidate.key not in kept.rows]
    began = time.perf_counter()
    for row in measure(missing, arguments.teacher, short, long, arguments.jobs) if missing else ():
        params, macs = size[row["key"]]
        kept.add({**row, "params": params, "macs": macs})
        say(
            f"{len(kept.rows)}/{len(chosen)} {row['key']}: short {row['short_db']:.2f} dB in {row['short_s']:.0f} s,"
            f" long {row['long_db']:.2f} dB in {row['long_s']:.0f} s, {time.perf_counter() - began:.0f} s so far"
        )
    found = card([kept.rows[candidate.key] for candidate in chosen], space, short, arguments.teacher)
    atomic_write(arguments.out / "proxy_rank.json", json.dumps(found, indent=1) + "\n")
    for line in found["agreement"] + found["text_agreement"]:
        interval = f"[{line['kendall_low']:+.2f}, {line['kendall_high']:+.2f}]"
        say(f"{line['predictor']:<36} tau {line['kendall']:+.2f} {interval}  rho {line['spearman']:+.2f}")
    say(found["note"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
