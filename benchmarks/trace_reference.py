"""The cost of a large network from nothing: python benchmarks/trace_reference.py [--space S] [--reference R].

Each run is a process of its own that makes the network's blocks, builds it whole on `meta`, and traces every distinct
block; the cold run starts from an empty trace cache, the warm one is the next process on the same cache. Work is timed
inside the process; what a process takes before it, Python and its imports, stands apart. Writes
reports/benchmarks/trace_reference.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nas.paths import atomic_write
from nas.provenance import provenance

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "reports" / "benchmarks" / "trace_reference.json"
LIMIT_S = {"cold": 15.0, "warm": 1.0}

_WORK = """
import json, sys, time
start = time.perf_counter()
from nas import families
from nas.build import build
from nas.cost import network_peak_bytes
from nas.space import load_space
from nas.trace import block_trace
times = [time.perf_counter()]
spec = families.network(load_space(sys.argv[1]).reference(sys.argv[2]))
times.append(time.perf_counter())
network = build(spec, "meta")
times.append(time.perf_counter())
distinct = {block.signature: block_trace(block) for block in spec.blocks}
times.append(time.perf_counter())
traces = [distinct[block.signature] for block in spec.blocks]
print(json.dumps({
    "imports_s": times[0] - start,
    "blocks_s": times[1] - times[0],
    "build_on_meta_s": times[2] - times[1],
    "trace_s": times[3] - times[2],
    "work_s": times[3] - times[0],
    "blocks": len(spec.blocks),
    "distinct_blocks": len(distinct),
    "params": sum(trace.params for trace in traces),
    "macs": sum(trace.macs for trace in traces),
    "peak_activation_bytes": network_peak_bytes(spec.blocks, [trace.peak_bytes for trace in traces]),
}))
"""


def one(space: str, reference: str, cache: str) -> dict[str, Any]:
    """One process's times; "outside_work_s" is all of the process but its work."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _WORK, space, reference],
        env={**os.environ, **threads, "NAS_CACHE": cache},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    wall = time.perf_counter() - start
    found: dict[str, Any] = json.loads(done.stdout)
    return {**found, "outside_work_s": wall - found["work_s"]}


def main() -> None:
    """Runs, writes the file, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="sdxl_unet")
    parser.add_argument("--reference", default="sdxl-base")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of a cold and a warm process")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as cache:
            for name in runs:
                runs[name].append(one(options.space, options.reference, cache))
    figures = ("blocks", "distinct_blocks", "params", "macs", "peak_activation_bytes")
    network = {name: runs["cold"][0][name] for name in figures}
    if any({name: run[name] for name in figures} != network for rows in runs.values() for run in rows):
        raise SystemExit("the runs disagree about the network: a bug")
    median = {
        name: {key: round(statistics.median(run[key] for run in rows), 4) for key in rows[0] if key.endswith("_s")}
        for name, rows in runs.items()
    }
    found = {
        "space": options.space,
        "reference": options.reference,
        **network,
        "median_s": median,
        "worst_work_s": {name: round(max(run["work_s"] for run in rows), 4) for name, rows in runs.items()},
        "limit_s": LIMIT_S,
        "conditions": {
            "processes": "fresh, one thread each, one at a time",
            "repeats": options.repeats,
            "load_average": list(os.getloadavg()),
        },
        "provenance": provenance(),
    }
    atomic_write(options.out, json.dumps(found, indent=2) + "\n")
    for name, times in median.items():
        print(f"{name}: " + ", ".join(f"{key[:-2].replace('_', ' ')} {s:.3f} s" for key, s in times.items()))
    print(f"wrote {options.out}")
    cold, warm = median["cold"]["work_s"], median["warm"]["work_s"]
    print(
        f"{options.reference}: {network['distinct_blocks']} distinct blocks of {network['blocks']} built on meta and"
        f" traced in {cold:.2f} s cold (limit {LIMIT_S['cold']:.0f} s) and {warm:.2f} s warm"
        f" (limit {LIMIT_S['warm']:.0f} s), median of {options.repeats}"
    )


if __name__ == "__main__":
    main()
