"""A million candidates priced on one core: python benchmarks/price_million.py [--spaces S ...] [--count N].

Each space runs in a process of its own, bound to one CPU with one thread, from an empty trace cache: the first tracing
of the space's distinct blocks is timed apart; then parameters, MACs, weight and peak activation bytes of N distinct
random candidates are priced, everything but the traces made anew; then, where the target has a fitted predictor, their
latency. Peak memory is read after that.

In the same process the same question is put to what counts one candidate at a time: torch's FlopCounterMode (each
candidate built and run on `meta`, at its own resolution) and fvcore (which cannot run on `meta`: weights without
memory, on the CPU, at a small latent, so its seconds are a lower bound). The ratio is their mean time per candidate
over ours, without and with the share of the first tracing. Writes reports/benchmarks/price_million.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from nas.device import find_target
from nas.paths import atomic_write
from nas.provenance import provenance
from nas.space import Candidate, SearchSpace, load_space

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "reports" / "benchmarks" / "price_million.json"
SPACES = ("sdxl_unet", "snapgen_unet")
LIMIT_S, LIMIT_MIB = 10.0, 4096
FVCORE_PX = 128
# What is priced: the name it is shown under, and the unit in it.
PRICED = {
    "params": ("params_million", 1e6),
    "macs": ("gmacs", 1e9),
    "weight_bytes": ("weight_mb", 1e6),
    "peak_activation_bytes": ("peak_activation_mb", 1e6),
}


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


def run(name: str, target: str, count: int, seed: int, others: tuple[int, int]) -> dict[str, Any]:
    """The figures of one space, measured in this process."""
    import torch

    from nas.latency import load_predictor
    from nas.pricing import Pricer
    from nas.pricing.slots import slots

    torch.set_num_threads(1)
    space, precision, predictor = load_space(name), find_target(target).target.precision, load_predictor(target)
    clock = Clock()
    blocks = len(slots(space)[1])
    clock.stop("list the distinct blocks")
    Pricer(space, precision).prepare()
    clock.stop("trace them, empty cache")
    rows = space.sample(count, seed)
    clock.stop("draw candidates")
    pricer = Pricer(space, precision)
    priced: dict[str, np.ndarray] = {key: np.empty(len(rows), np.int64) for key in PRICED}
    ms, done = np.empty(len(rows)), 0
    for prices in pricer.chunks(rows):
        here = slice(done, done := done + len(prices.macs))
        for key, values in priced.items():
            values[here] = getattr(prices, key)
        clock.stop("price")
        ms[here] = predictor.predict(prices.features)[0]
        clock.stop("latency")
    memory = peak_mib()
    few = [space.from_row(row) for row in rows[: max(others)]]
    ours = clock.wall["price"] / len(rows)
    whole = ours + (clock.wall["list the distinct blocks"] + clock.wall["trace them, empty cache"]) / len(rows)
    spread = {shown: priced[key] / unit for key, (shown, unit) in PRICED.items()}
    return {
        "space": name,
        "candidates": len(rows),
        "distinct_blocks": blocks,
        "wall_s": {stage: round(s, 3) for stage, s in clock.wall.items()},
        "cpu_s": {stage: round(s, 3) for stage, s in clock.cpu.items()},
        "price_s": round(clock.wall["price"], 3),
        "candidates_per_s": round(1 / ours),
        "peak_memory_mib": round(memory),
        "spread": {
            key: {"min": float(v.min()), "median": float(np.median(v)), "max": float(v.max())}
            for key, v in {**spread, "step_ms": ms}.items()
        },
        "one_at_a_time": {
            "FlopCounterMode": flop_counter(few[: others[0]], ours, whole),
            "fvcore": fvcore(few[: others[1]], ours, whole),
        },
    }


def flop_counter(candidates: list[Candidate], ours: float, whole: float) -> dict[str, Any]:
    """FlopCounterMode: each candidate's network made, built on `meta` and run there, at its own resolution."""
    from nas import families
    from nas.profile.counters import TORCH, count

    seconds = []
    for candidate in candidates:
        start = time.perf_counter()
        (figure,) = count(families.network(candidate), TORCH)
        seconds.append(time.perf_counter() - start)
        assert figure.macs is not None
    return _ratio(seconds, ours, whole, at=_latent(candidates[0].space))


def fvcore(candidates: list[Candidate], ours: float, whole: float) -> dict[str, Any]:
    """The same with fvcore at a small latent; one call warms it up."""
    from nas import families
    from nas.profile.counters import FVCORE, count

    small = candidates[0].space.at_resolution(FVCORE_PX)
    specs = [families.network(small.from_row(np.array(candidate.row))) for candidate in candidates]
    count(specs[0], FVCORE)
    seconds = []
    for spec in specs:
        start = time.perf_counter()
        count(spec, FVCORE)
        seconds.append(time.perf_counter() - start)
    return _ratio(seconds, ours, whole, at=_latent(small))


def _latent(space: SearchSpace) -> str:
    return f"{space.input.latent_height}x{space.input.latent_width}"


def _ratio(seconds: list[float], ours: float, whole: float, at: str) -> dict[str, Any]:
    mean = float(np.mean(seconds))
    return {
        "latent": at,
        "candidates": len(seconds),
        "mean_s": round(mean, 3),
        "min_s": round(min(seconds), 3),
        "max_s": round(max(seconds), 3),
        "times_ours": round(mean / ours),
        "times_ours_with_the_first_trace": round(mean / whole),
    }


def apart(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """`run` in a fresh process with one CPU, one thread and an empty trace cache."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, str(Path(__file__).resolve()), "--alone", name, "--target", options.target]
    command += ["--count", str(options.count), "--seed", str(options.seed)]
    command += ["--others", *map(str, options.others)]
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(
            command,
            env={**os.environ, **threads, "NAS_CACHE": empty},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Runs, writes the file, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", default=list(SPACES))
    parser.add_argument("--target", default="iphone", help="whose precision and latency predictor")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--others", type=int, nargs=2, default=(8, 3), help="candidates for FlopCounterMode, and for fvcore"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        others = (options.others[0], options.others[1])
        print(json.dumps(run(options.alone, options.target, options.count, options.seed, others)))
        return
    load = list(os.getloadavg())
    runs = [apart(name, options) for name in options.spaces]
    found = {
        "conditions": {
            "what": "one process per space, bound to one CPU where the system allows it, one thread, empty trace cache",
            "bound": hasattr(os, "sched_setaffinity"),
            "target": find_target(options.target).slug,
            "load_average_before": load,
            "load_average_after": list(os.getloadavg()),
        },
        "limit": {"price_s": LIMIT_S, "peak_memory_mib": LIMIT_MIB},
        "spaces": {found["space"]: found for found in runs},
        "provenance": provenance(seed=options.seed),
    }
    atomic_write(options.out, json.dumps(found, indent=2) + "\n")
    for one in runs:
        show(one)
    print(f"wrote {options.out}")
    for one in runs:
        torch_, other = one["one_at_a_time"]["FlopCounterMode"], one["one_at_a_time"]["fvcore"]
        print(
            f"{one['space']}: {one['candidates']:,} candidates priced in {one['price_s']:.1f} s on one core"
            f" ({one['candidates_per_s']:,} per second), peak memory {one['peak_memory_mib']} MiB;"
            f" {torch_['times_ours']:,} times as fast as FlopCounterMode, {other['times_ours']:,} times as fvcore"
        )


def show(one: dict[str, Any]) -> None:
    """Prints the stages and the spread of one space."""
    print(f"{one['space']}: {one['distinct_blocks']} distinct blocks")
    for stage, seconds in one["wall_s"].items():
        print(f"  {stage:40s} {seconds:8.2f} s wall {one['cpu_s'][stage]:8.2f} s processor")
    for name, spread in one["spread"].items():
        low, middle, high = (spread[key] for key in ("min", "median", "max"))
        print(f"  {name:40s} {low:.4g} to {high:.4g}, median {middle:.4g}")
    for name, other in one["one_at_a_time"].items():
        print(f"  {name} at {other['latent']}: {other['mean_s']} s per candidate, mean of {other['candidates']}")


if __name__ == "__main__":
    main()
