"""Times the networks of this folder on this machine and fills rows.csv.

    python measure_kit.py [--sessions 2] [--repeats 7] [--wait 120]

Needs numpy and onnxruntime (.onnx files) or coremltools (.mlpackage files), and nothing else. A run that was stopped
goes on where it was. How it times: a warm-up until calls take equally long; then rounds over a few networks in random
order, one of them (the smallest, called the anchor) in every group and session, so that slow and fast times of the
machine can be told apart; every sample is kept, and the latency is their median.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 1
GROUP = 4
HERE = Path(__file__).resolve().parent
ROWS = HERE / "rows.csv"
Run = Callable[[], object]


def say(text: str) -> None:
    """One line of progress."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def now() -> str:
    """This moment, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")  # noqa: UP017


def load_onnx(path: Path, options: argparse.Namespace) -> tuple[Run, str]:
    """An .onnx file bound to random inputs, and what really runs it."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    session = onnxruntime.InferenceSession(str(path), settings, providers=[options.provider])
    used = session.get_providers()
    if used[0] != options.provider:
        sys.exit(f"onnxruntime fell back from {options.provider} to {', '.join(used)}: nothing was timed")
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
    inputs = {i.name: values(i.name, i.shape).astype(kinds[i.type]) for i in session.get_inputs()}
    described = f"onnxruntime {onnxruntime.__version__}, {', '.join(used)}, threads {options.threads}"
    return lambda: session.run(None, inputs), described


def load_coreml(path: Path, options: argparse.Namespace) -> tuple[Run, str]:
    """An .mlpackage bound to random inputs, and what it was opened with."""
    import coremltools

    units = getattr(coremltools.ComputeUnit, options.units)
    model = coremltools.models.MLModel(str(path), compute_units=units)
    held = {i.name: i.type.multiArrayType for i in model.get_spec().description.input}
    # 65552 is ArrayFeatureType.FLOAT16 of Core ML's format.
    kinds = {name: np.float16 if array.dataType == 65552 else np.float32 for name, array in held.items()}
    inputs = {name: values(name, list(array.shape)).astype(kinds[name]) for name, array in held.items()}
    described = f"coremltools {coremltools.__version__}, {options.units}, macOS {platform.mac_ver()[0]}"
    return lambda: model.predict(inputs), described


def values(name: str, shape: list[int]) -> Any:
    """Random numbers of that shape; a timestep in the middle."""
    return np.full(shape, 500.0) if name == "timestep" else np.random.default_rng(0).standard_normal(shape)


def timed_ms(run: Run, calls: int) -> float:
    """Mean of some calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) * 1e3 / calls


def warm_up(run: Run) -> float:
    """Runs until two calls in a row are within 5 % of the fastest; its time."""
    best, steady = math.inf, 0
    for _ in range(8):
        took = timed_ms(run, 1)
        steady = steady + 1 if abs(took - best) <= 0.05 * min(took, best) else 0
        best = min(best, took)
        if steady == 2:
            break
    return best


def time_group(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Samples of every network, interleaved."""
    calls = {key: max(1, math.ceil(4.0 / max(warm_up(run), 1e-3))) for key, run in runs.items()}
    samples: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key in random.sample(list(runs), len(runs)):
            samples[key].append(timed_ms(runs[key], calls[key]))
    return samples


def read_rows() -> tuple[list[str], list[dict[str, str]]]:
    """The columns and rows of rows.csv."""
    with ROWS.open(newline="") as stream:
        reader = csv.DictReader(stream)
        return list(reader.fieldnames or []), list(reader)


def write_rows(columns: list[str], rows: list[dict[str, str]]) -> None:
    """Replaces rows.csv whole, so that a stop at any moment leaves the old file or the new one."""
    temporary = ROWS.with_suffix(".writing")
    with temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, ROWS)


def sessions_of(rows: list[dict[str, str]], key: str) -> set[str]:
    """The sessions that a network has been timed in."""
    return {row["session"].partition("/")[0] for row in rows if row["subject"] == key and row["latency_ms"]}


def wait_for(rows: list[dict[str, str]], wait_s: float) -> None:
    """Sleeps until the last session is long enough ago: what disturbed it must not reach the next."""
    ended = [datetime.datetime.fromisoformat(row["measured_at"]) for row in rows if row["measured_at"]]
    if ended:
        since = datetime.datetime.now(datetime.timezone.utc) - max(ended)  # noqa: UP017
        left = wait_s - since.total_seconds()
        if left > 0:
            say(f"waiting {left:.0f} s to keep the sessions apart")
            time.sleep(left)


def started(rows: list[dict[str, str]]) -> str:
    """The name of a new session: the present second, once it is a second that no other session began in."""
    while any(row["session"].partition("/")[0] == now() for row in rows):
        time.sleep(0.05)
    return now()


def size_of(path: Path) -> int:
    """Bytes of a file or folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def main() -> None:
    """Measures what rows.csv still lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--wait", type=float, default=120.0, help="least seconds between two sessions")
    parser.add_argument("--provider", default="CPUExecutionProvider", help="of onnxruntime")
    parser.add_argument("--threads", type=int, default=THREADS, help="of onnxruntime")
    parser.add_argument("--units", default="CPU_AND_NE", help="of Core ML: CPU_AND_NE, CPU_AND_GPU, CPU_ONLY or ALL")
    options = parser.parse_args()
    columns, rows = read_rows()
    networks = {row["subject"]: row for row in rows}
    anchor = min(networks, key=lambda key: size_of(HERE / networks[key]["file"]))
    for number in range(options.sessions):
        todo = [key for key in networks if len(sessions_of(rows, key)) <= number]
        if not todo:
            continue
        wait_for(rows, options.wait)
        began, others = started(rows), [key for key in todo if key != anchor]
        random.shuffle(others)
        groups = [others[i : i + GROUP] for i in range(0, max(len(others), 1), GROUP)]
        for turn, group in enumerate(groups, start=1):
            loaded = {key: load(HERE / networks[key]["file"], options) for key in (anchor, *group)}
            samples = time_group({key: run for key, (run, _) in loaded.items()}, options.repeats)
            for key, found in samples.items():
                rows = [row for row in rows if row["subject"] != key or row["latency_ms"]]
                filled = {
                    "session": f"{began}/{turn:02d}",
                    "latency_ms": f"{statistics.median(found):.6g}",
                    "samples_ms": " ".join(f"{sample:.6g}" for sample in found),
                    "environment": loaded[key][1],
                    "measured_at": now(),
                }
                rows.append({**networks[key], **filled})
            write_rows(columns, rows)
            say(f"session {number + 1} of {options.sessions}, group {turn} of {len(groups)}: {len(rows)} rows")
    say(f"done: {ROWS}")


def load(path: Path, options: argparse.Namespace) -> tuple[Run, str]:
    """A file by its ending."""
    return (load_coreml if path.suffix == ".mlpackage" else load_onnx)(path, options)


if __name__ == "__main__":
    main()
