"""`nas measure` killed at random moments ends with the same rows as one left in peace.

    python benchmarks/measure_kill.py [--kills 10] [--most-rows 5] [--longest 3]

Measures a dozen tiny subjects on onnxruntime to the end; measures the same subjects again into another folder and sends
SIGKILL to the whole process group, starting the same command again after each: as soon as a random number of new rows
is there, so that a fast machine and a slow one are both killed inside their sessions; where that number is zero, at a
random time of the start. Then every subject must have as many sessions as in the run left in peace, no session may hold
a subject twice, and no file may be half written.
The anchors are measured with every group, so a run that is started anew has more rows of them, each of its own session;
that they have no fewer is checked. Prints the verdict last and writes reports/benchmarks/measure_kill.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from nas import tables
from nas.measure.session import began
from nas.paths import atomic_write
from nas.provenance import processor, provenance

SLUG = "cpu--onnxruntime--fp32"
SPACE = """
family = "unet"
summary = "tiny networks"
sources = ["made for this benchmark"]
[input]
latent_channels = 4
latent_height = 16
latent_width = 16
pixels_per_latent = 8
text_tokens = 6
text_width = 32
[fixed]
stages = 2
downscale = 2
head_width = 64
norm_groups = 32
resnets_1 = 1
conv_1 = "separable-2"
self_attention_0 = false
self_attention_1 = true
depth_0 = 0
attention = "mqa"
qk_norm = "none"
ffn_ratio = 2
[choices]
width_0 = [64, 128]
width_1 = [128, 192]
resnets_0 = [1, 2]
conv_0 = ["full", "separable-2"]
depth_1 = [0, 1]
"""
# Ten times slower anchors are not flagged: this is about rows that are lost or doubled, not about a noisy machine.
SHEET = """
device = "cpu"
chip = {chip}
runtime = "onnxruntime"
precision = "fp32"
aliases = ["tiny"]
backend = "onnxruntime"
shared = true
roofline = {{ ms_per_gmac = 25.0, ms_per_gb = 125.0, ms_per_op = 0.005 }}
[protocol]
separation_s = 0.0
group = 2
drift = 10.0
components = false
most_block_gmac = 0.05
least_network_gmac = 0.0
most_network_gmac = 0.3
"""


def folder_of(root: Path, name: str) -> Path:
    """Data of its own for a run: a sheet and a space."""
    made = root / name / "latency_tables"
    made.mkdir(parents=True)
    (made / f"{SLUG}.toml").write_text(SHEET.format(chip=json.dumps(processor())))
    (root / name / "tiny.toml").write_text(SPACE)
    return root / name


def start(data: Path, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """One run in its own process group."""
    command = ["nas", "measure", "--target", "tiny", "--space", str(data / "tiny.toml"), "--repeats", "2"]
    command += ["--blocks", str(options.blocks), "--networks", str(options.networks), "--sessions", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        start_new_session=True,
        env={**os.environ, "NAS_DATA": str(data), "NAS_CACHE": str(data.parent / "cache")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def killed_run(data: Path, options: argparse.Namespace) -> list[int]:
    """Starts the command until it ends by itself; returns how many rows there were at each kill."""
    kills: list[int] = []
    generator = random.Random(options.seed)
    while len(kills) < options.kills:
        wanted, life_s = generator.randint(0, options.most_rows), generator.uniform(0.0, options.longest)
        had, began_s = lines_of(data), time.monotonic()
        process = start(data, options)
        while process.poll() is None:
            if lines_of(data) >= had + wanted if wanted else time.monotonic() - began_s >= life_s:
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        if process.wait() == 0:
            return kills
        if process.returncode != -signal.SIGKILL:
            raise SystemExit("a resumed run failed")
        kills.append(len(tables.read(SLUG, data / "latency_tables")))  # refuses half a row
        tables.subjects(SLUG, data / "latency_tables")
        print(f"killed with {kills[-1]} rows", file=sys.stderr)
    if start(data, options).wait() != 0:
        raise SystemExit("the last run failed")
    return kills


def lines_of(data: Path) -> int:
    """How many lines the table has, its header too."""
    path = data / "latency_tables" / f"{SLUG}.csv"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def sessions_of(data: Path) -> tuple[dict[str, int], int]:
    """Subject -> in how many sessions it was measured; and how many rows repeat another's subject and session."""
    rows = tables.read(SLUG, data / "latency_tables")
    held: dict[str, set[str]] = {}
    for row in rows:
        held.setdefault(row.subject, set()).add(began(row.session))
    twice = sum(count - 1 for count in Counter((row.subject, row.session) for row in rows).values())
    return {subject: len(found) for subject, found in held.items()}, twice


def compared(peace: Path, killed: Path) -> dict[str, object]:
    """What must be equal, and whether it is."""
    (left, _), (resumed, twice) = sessions_of(peace), sessions_of(killed)
    rows = tables.read(SLUG, peace / "latency_tables")
    groups = {row.session for row in rows}
    anchors = {s for s in left if {row.session for row in rows if row.subject == s} == groups}
    same = all(resumed.get(s, 0) == n or (s in anchors and resumed.get(s, 0) >= n) for s, n in left.items())
    leftovers = [path.name for path in (killed / "latency_tables").iterdir() if path.name.startswith(".")]
    return {
        "subjects": len(left),
        "anchors": len(anchors),
        "subjects_after_kills": len(resumed),
        "sessions_each": sorted(set(left.values())),
        "twice": twice,
        "temporary_files_left": len(leftovers),
        "identical": bool(same and set(left) == set(resumed) and not twice),
    }


def main() -> None:
    """Runs both and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--most-rows", type=int, default=5, help="a run is killed after 0 to so many new rows")
    parser.add_argument("--longest", type=float, default=3.0, help="seconds of a run killed before its first row")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--networks", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks/measure_kill.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        peace, killed = folder_of(Path(temporary), "peace"), folder_of(Path(temporary), "killed")
        began_s = time.monotonic()
        if start(peace, options).wait() != 0:
            raise SystemExit("the run left in peace failed")
        whole_s = time.monotonic() - began_s
        kills = killed_run(killed, options)
        found = compared(peace, killed)
    result = {
        "rows_at_kills": kills,
        "undisturbed_s": round(whole_s, 1),
        **found,
        "provenance": provenance(command=" ".join(sys.argv), seed=options.seed),
    }
    atomic_write(options.out, json.dumps(result, indent=1) + "\n")
    print(
        f"{len(kills)} kills: {found['subjects_after_kills']} of {found['subjects']} subjects with their sessions,"
        f" {found['twice']} rows twice, {'the same rows' if found['identical'] else 'DIFFERENT rows'}"
    )
    raise SystemExit(0 if found["identical"] and len(kills) >= options.kills else 1)


if __name__ == "__main__":
    main()
