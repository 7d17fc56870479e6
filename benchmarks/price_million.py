"""A million candidates priced in one process: python benchmarks/price_million.py [--space S] [--target T] [--count N].

Starts from an empty trace cache, so the first tracing of the space's distinct blocks is timed too; then cost and, where
the target has a fitted predictor, latency of N distinct random candidates. Prints the seconds and the peak memory, and
writes reports/benchmarks/price_million.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from nas.device import find_target
from nas.latency import load_predictor
from nas.paths import atomic_write
from nas.pricing import Pricer
from nas.provenance import provenance
from nas.space import load_space

OUT = Path(__file__).resolve().parent.parent / "reports" / "benchmarks" / "price_million.json"


def peak_mib() -> float:
    """The most memory this process has held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Clock:
    """Wall and processor seconds of each stage, by name."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self._last = (time.perf_counter(), time.process_time())

    def stop(self, stage: str) -> None:
        """Charges the time since the last stop to `stage`."""
        now = (time.perf_counter(), time.process_time())
        self.wall[stage] = self.wall.get(stage, 0.0) + now[0] - self._last[0]
        self.cpu[stage] = self.cpu.get(stage, 0.0) + now[1] - self._last[1]
        self._last = now


def run(space_name: str, target: str, count: int, seed: int) -> dict[str, Any]:
    """The figures of one run."""
    space, sheet, predictor = load_space(space_name), find_target(target), load_predictor(target)
    clock = Clock()
    pricer = Pricer(space, sheet.target.precision)
    clock.stop("start")
    pricer.prepare()
    clock.stop("trace all distinct blocks, empty cache")
    Pricer(space, sheet.target.precision).prepare()
    clock.stop("the same, blocks in memory")
    rows = space.sample(count, seed)
    clock.stop("draw candidates")
    macs, params, ms = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64), np.empty(len(rows))
    done = 0
    for prices in pricer.chunks(rows):
        here = slice(done, done := done + len(prices.macs))
        macs[here], params[here] = prices.macs, prices.params
        clock.stop("cost")
        ms[here] = predictor.predict(prices.features)[0]
        clock.stop("latency")
    summaries = {
        name: {"min": float(v.min()), "median": float(np.median(v)), "max": float(v.max())}
        for name, v in (("params_million", params / 1e6), ("gmacs", macs / 1e9), ("step_ms", ms))
    }
    return {
        "space": space.name,
        "target": sheet.slug,
        "candidates": len(rows),
        "wall_s": {stage: round(s, 3) for stage, s in clock.wall.items()},
        "cpu_s": {stage: round(s, 3) for stage, s in clock.cpu.items()},
        "cost_and_latency_wall_s": round(clock.wall["cost"] + clock.wall["latency"], 3),
        "cost_and_latency_cpu_s": round(clock.cpu["cost"] + clock.cpu["latency"], 3),
        "peak_memory_mib": round(peak_mib()),
        "spread": summaries,
        "provenance": provenance(seed=seed),
    }


def main() -> None:
    """Runs, writes the file, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="snapgen_unet")
    parser.add_argument("--target", default="iphone")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as empty:
        os.environ["NAS_CACHE"] = empty
        found = run(options.space, options.target, options.count, options.seed)
    atomic_write(options.out, json.dumps(found, indent=2) + "\n")
    for stage, seconds in found["wall_s"].items():
        print(f"{stage:40s} {seconds:8.2f} s wall {found['cpu_s'][stage]:8.2f} s processor")
    for name, spread in found["spread"].items():
        print(f"{name:40s} {spread['min']:.4g} to {spread['max']:.4g}, median {spread['median']:.4g}")
    print(f"wrote {options.out}")
    wall, cpu = found["cost_and_latency_wall_s"], found["cost_and_latency_cpu_s"]
    print(
        f"{found['candidates']:,} candidates priced (cost and latency) in {wall:.1f} s wall, {cpu:.1f} s processor,"
        f" peak memory {found['peak_memory_mib']} MiB"
    )


if __name__ == "__main__":
    main()
