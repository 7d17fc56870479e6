"""The truth that proxies are tested on: candidates trained long from the embedded teacher, at proxy scale.

    python benchmarks/proxy_truth.py [--jobs 2] [--steps 120] [--part snapgen_unet --part sd_unet --part sdxl_unet]

48 candidates of snapgen_unet, 16 of sd_unet and 8 of sdxl_unet, each from equally full bands of predicted iPhone
latency, references first; one run each, and a second from another initialisation for every third. A row per run goes to
reports/proxy/truth.csv as soon as it is there (killed, the command goes on where it was): cost, latency, held-out
loss, what the checker says of samples, and the learning curve. Prints what was measured last.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from nas.bench import Bench, ProxySettings
from nas.device import find_target
from nas.fidelity import Samples, Table, long_run, pool_of, settings_key, spread_out
from nas.latency import load_predictor
from nas.network import short_hash
from nas.pricing import Pricer
from nas.space import Candidate, SearchSpace, load_space

OUT = Path(__file__).resolve().parent.parent / "reports" / "proxy"
PARTS = {"snapgen_unet": 48, "sd_unet": 16, "sdxl_unet": 8}
# At 6e-3 the widest shapes of Stable Diffusion collapse half-way (docs/log.md); SnapGen's have normed queries or fewer
# channels, and none did.
LR = {"snapgen_unet": 6e-3, "sd_unet": 3e-3, "sdxl_unet": 3e-3}
DEVICES = ("iphone", "cpu")
TEACHER = "embedded"
SEEDS = (100, 101)  # no proxy's, so that agreement is not shared initialisation
EVERY_THIRD = 3
SAMPLES = Samples()
KEYS = ("space", "key", "seed")


def truth_settings(steps: int, space: str = "snapgen_unet") -> ProxySettings:
    """The long run: the proxies' recipe on rows that no proxy sees."""
    return ProxySettings(steps=steps, batch=16, lr=LR[space], text_weight=2.0, data_seed=1)


def digest_of(bench: Bench) -> str:
    """What the rows of one table share."""
    return short_hash(settings_key(bench, SAMPLES))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A candidate to be trained, and what is known of it before."""

    candidate: Candidate
    known: dict[str, Any]

    def row(self, seed: int) -> dict[str, Any]:
        """The columns that need no training."""
        space = self.candidate.space
        return {"space": space.name, "space_hash": space.hash, "key": self.candidate.key, "seed": seed, **self.known}


def entries(space: SearchSpace, count: int, seed: int = 0) -> list[Entry]:
    """The candidates of one space, with what they cost."""
    pricer = Pricer(space)
    pool = pool_of(space, seed)
    predictors = {name: load_predictor(find_target(name).slug) for name in DEVICES}
    latency = predictors[DEVICES[0]].predict(pricer.rows(pool).features)[0]
    chosen = spread_out(space, count, seed, latency, pool)
    prices = pricer.rows(np.array([candidate.row for candidate in chosen]))
    ms = {name: each.predict(prices.features)[0] for name, each in predictors.items()}
    return [
        Entry(
            candidate=candidate,
            known={
                "choices": json.dumps(candidate.choices, sort_keys=True),
                "params": int(prices.params[i]),
                "macs": int(prices.macs[i]),
                **{f"{name}_step_ms": round(float(ms[name][i]), 2) for name in DEVICES},
            },
        )
        for i, candidate in enumerate(chosen)
    ]


def wanted(parts: Iterable[str]) -> list[tuple[Entry, int]]:
    """Every run of the table: all first seeds, then the second ones."""
    found = {name: entries(load_space(name), PARTS[name]) for name in parts}
    first = [(entry, SEEDS[0]) for rows in found.values() for entry in rows]
    return first + [(entry, SEEDS[1]) for rows in found.values() for entry in rows[::EVERY_THIRD]]


def train_part(name: str, steps: int, jobs: int, out: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Trains what is missing of one space; all of its rows."""
    bench = Bench(TEACHER, truth_settings(steps, name))
    table = Table(out, digest_of(bench), KEYS)
    runs = wanted([name])
    missing = [(entry, seed) for entry, seed in runs if (name, entry.candidate.key, seed) not in table]
    bench.prepare()
    began = time.perf_counter()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(long_run, e.candidate, bench, seed, SAMPLES): (e, seed) for e, seed in missing}
        for job in as_completed(waiting):
            entry, seed = waiting[job]
            found = job.result()
            table.add({**entry.row(seed), "steps": steps, **found})
            rows = [row for row in table if row["space"] == name]
            say(
                f"{len(rows)}/{len(runs)} {name} {entry.candidate.key} seed {seed}: {found['quality_db']:.2f} dB,"
                f" text {found['text_db']:.2f} dB, colour {found['colour']:.0%}, {found['cpu_s']:.0f} CPU s;"
                f" {time.perf_counter() - began:.0f} s so far"
            )
    return [row for row in table if row["space"] == name]


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Trains what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--part", action="append", choices=sorted(PARTS))
    parser.add_argument("--out", type=Path, default=OUT / "truth.csv")
    arguments = parser.parse_args(argv)
    parts = arguments.part or list(PARTS)
    found = {name: train_part(name, arguments.steps, arguments.jobs, arguments.out, say) for name in parts}
    for name, rows in found.items():
        quality = np.array([float(row["quality_db"]) for row in rows])
        text = np.array([float(row["text_db"]) for row in rows])
        say(
            f"{name}: {len(rows)} runs of {arguments.steps} steps, {quality.min():.2f} to {quality.max():.2f} dB,"
            f" text {text.min():.2f} to {text.max():.2f} dB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
