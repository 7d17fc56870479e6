"""Does untuned TVM rank networks and blocks as onnxruntime does, and does tuned TVM?

    python benchmarks/tvm_untuned.py [--networks 8] [--sessions 2]

Measures the subjects of benchmarks/tvm_subjects.py on TVM tuned, on TVM untuned (one session) and on onnxruntime, one
thread each. The TVM rows are those of the shipped tables, so that this command also makes them; onnxruntime's are kept
in the cache. Kendall's tau with bootstrap intervals over subjects. Can be killed and run again. Writes
reports/benchmarks/tvm_untuned.json; prints the figures last.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from tvm_subjects import subjects

from nas import tables
from nas.backends import onnxruntime, tvm
from nas.backends.tvm import compiling
from nas.device import find_target
from nas.measure import run_subjects
from nas.measure.subjects import Subject
from nas.paths import atomic_write, cache_dir
from nas.provenance import provenance

OUT = Path(__file__).resolve().parent.parent / "reports" / "benchmarks" / "tvm_untuned.json"
RESAMPLES = 2000
TRIES = 6  # sessions of a group that drifted are flagged and asked for again
RUNTIMES = ("cpu-onnxruntime", "cpu-tvm", "cpu-tvm-untuned")


def main() -> None:
    """Measures what is missing, compares, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=8)
    parser.add_argument("--sessions", type=int, default=2, help="of the tuned table")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    chosen = [replace(s, build=functools.cache(s.build)) for s in chosen_subjects(arguments.networks)]
    # A subject is lowered once for both TVM tables and compiled once for all sessions: that is most of the work.
    compiling.fuse = _once_per_module(compiling.fuse)  # type: ignore[attr-defined]
    for backend in (tvm, onnxruntime):
        backend.load = _once_per_module(backend.load)  # type: ignore[attr-defined]
    began = os.getloadavg()
    ms = {name: measured(name, chosen, arguments.sessions if name == "cpu-tvm" else 1) for name in RUNTIMES}
    report = {
        "conditions": {
            "what": "one thread, batch 1, float32; min_cpu of interleaved repeats; other processes on the same core",
            "load_average_before": began,
            "load_average_after": os.getloadavg(),
        },
        "agreement": agreement(chosen, ms),
        "subjects": [
            {"key": s.key, "kind": s.kind, "name": s.name, "gmac": s.macs / 1e9, **{n: ms[n][s.key] for n in RUNTIMES}}
            for s in chosen
        ],
        "provenance": provenance(),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(OUT, json.dumps(report, indent=1) + "\n")
    print(f"wrote {OUT}")
    for line in report["agreement"]:
        print(words(line))


def chosen_subjects(networks: int) -> list[Subject]:
    """The first networks and every block of them."""
    blocks, all_networks = subjects(networks)
    return [*blocks, *all_networks]


def measured(name: str, chosen: Sequence[Subject], sessions: int) -> dict[str, float]:
    """Every subject's ms on a target, measured where a session is missing."""
    sheet = find_target(name)
    folder = cache_dir("benchmarks", "tvm_untuned") if name == "cpu-onnxruntime" else None

    def say(message: str, done: int, total: int) -> None:
        logging.info("%s: %d of %d, %s", name, done, total, message)

    for _ in range(TRIES):
        if not run_subjects(chosen, sheet, sessions=sessions, progress=say, folder=folder).lacking:
            break
    return {found.subject: found.ms for found in tables.observations(tables.read(sheet.slug, folder))}


def agreement(chosen: Sequence[Subject], ms: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Tau against onnxruntime and the time relative to it, per runtime and kind of subject; MACs beside them."""
    found = []
    ms = {**ms, "MACs": {s.key: s.macs / 1e9 for s in chosen}}
    for runtime in (*RUNTIMES[1:], "MACs"):
        for kind in ("network", "block", "all"):
            keys = [s.key for s in chosen if kind in (s.kind, "all")]
            theirs, reference = (np.array([ms[name][key] for key in keys]) for name in (runtime, RUNTIMES[0]))
            tau, low, high = kendall(theirs, reference)
            found.append(
                {
                    "runtime": runtime,
                    "kind": kind,
                    "n": len(keys),
                    "kendall_tau": tau,
                    "tau_low_90": low,
                    "tau_high_90": high,
                    **({} if runtime == "MACs" else times(theirs / reference)),
                }
            )
    return found


def times(ratios: np.ndarray) -> dict[str, float]:
    """How many times onnxruntime's time: the geometric mean over subjects, the least and the most."""
    return {
        "times_onnxruntime": float(np.exp(np.mean(np.log(ratios)))),
        "times_low": float(ratios.min()),
        "times_high": float(ratios.max()),
    }


def kendall(one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """Kendall's tau with a 90 % bootstrap interval over subjects."""
    generator = np.random.default_rng(0)
    drawn = [generator.integers(len(one), size=len(one)) for _ in range(RESAMPLES)]
    taus = [stats.kendalltau(one[i], other[i]).statistic for i in drawn if len(set(i)) > 2]
    low, high = np.nanquantile(taus, [0.05, 0.95])
    return float(stats.kendalltau(one, other).statistic), float(low), float(high)


def words(line: Mapping[str, Any]) -> str:
    """One line of the agreement as it is printed."""
    text = (
        f"{line['runtime']:16} {line['kind']:8} n={line['n']:<3} tau against onnxruntime {line['kendall_tau']:.3f}"
        f" [{line['tau_low_90']:.3f}, {line['tau_high_90']:.3f}]"
    )
    if "times_onnxruntime" not in line:
        return text
    return f"{text}; {line['times_onnxruntime']:.1f} times its time ({line['times_low']:.1f}-{line['times_high']:.1f})"


def _once_per_module(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of (module, inputs, target, ...), called once per module (the same object) and target."""
    made: dict[tuple[int, str], Any] = {}

    def once(module: Any, inputs: Any, target: Any, *others: Any) -> Any:
        key = (id(module), str(target))
        if key not in made:
            made[key] = function(module, inputs, target, *others)
        return made[key]

    return once


if __name__ == "__main__":
    main()
