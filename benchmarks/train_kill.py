"""A training killed at random moments ends with the same bits as one left in peace.

    OMP_NUM_THREADS=1 python benchmarks/train_kill.py [--kills 10] [--recipe sid_lsg-tiny] [--steps 90]

Runs one `nas train` to its end; runs the same command again for another folder, sends SIGKILL to its whole process
group at random moments all along the run, resuming after each; then compares every stage's network byte by byte and
its losses line by line. Prints the verdict last and writes reports/benchmarks/train_kill.json. The recipe has two
stages, the second with a network that learns beside the student, so that everything a checkpoint holds is in play; it
is shortened, because the benchmark is about what is saved, not about quality.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nas.checkpoint.files import read_file
from nas.paths import atomic_write
from nas.provenance import provenance


def start(options: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    """One training in its own process group."""
    changes = (f"batch={options.batch}", f"checkpoint_every={options.every}", "sampling.images=16", "sampling.steps=2")
    command = [sys.executable, "-m", "nas", "train", "--recipe", options.recipe, "--steps", str(options.steps)]
    command += [part for change in changes for part in ("--set", change)]
    command += ["--seed", str(options.seed), "--out", str(out)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def content_sha(path: Path) -> str:
    """Of a network's weights and record; the order of a safetensors header is its writer's hash map's."""
    about, weights = read_file(path)
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(weights):
        found.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def outcome(out: Path) -> dict[str, Any]:
    """Every network's hash, and every losses.csv without its times, which are a measurement."""
    networks = {str(path.relative_to(out)): content_sha(path) for path in sorted(out.rglob("network.safetensors"))}
    losses: dict[str, Any] = {}
    for path in sorted(out.rglob("losses.csv")):
        with path.open() as stream:
            losses[str(path.relative_to(out))] = [
                {key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(stream)
            ]
    return {"networks": networks, "losses": losses}


def whole_run(options: argparse.Namespace, out: Path) -> tuple[float, float]:
    """Runs undisturbed; returns the seconds until the first checkpoint, and in all."""
    began, first = time.monotonic(), 0.0
    process = start(options, out)
    while process.poll() is None:
        if not first and any(out.rglob("step-*.pt")):
            first = time.monotonic() - began
        time.sleep(0.05)
    if process.returncode != 0:
        raise SystemExit("the undisturbed training failed")
    return first, time.monotonic() - began


def saved(out: Path) -> tuple[int, str | None]:
    """The steps of all stages that the newest checkpoints hold, and the newest one."""
    newest = {path.parent: path for path in sorted(out.rglob("step-*.pt"))}
    steps = sum(int(path.stem.partition("-")[2]) for path in newest.values())
    last = max(newest.values(), key=lambda path: path.parts, default=None)
    return steps, None if last is None else str(last.relative_to(out))


def main() -> None:
    """Runs both trainings and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--recipe", default="sid_lsg-tiny")
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--every", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        first_s, whole_s = whole_run(options, root / "peace")
        print(f"undisturbed: {whole_s:.1f} s, the first checkpoint after {first_s:.1f} s", file=sys.stderr)
        # Random places in the work, in order; between them a random time, which hits loading, steps and writing alike.
        places = sorted(moments.randrange(options.steps - 6 * options.every) for _ in range(options.kills))
        pause_s = min(1.0, (whole_s - first_s) / options.steps * options.every)
        kills: list[dict[str, Any]] = []
        for place in places:
            process = start(options, root / "killed")
            began = time.monotonic()
            wait_s = moments.uniform(0.2, 1.0) * first_s if saved(root / "killed")[0] >= place else 0.0
            while (time.monotonic() - began < wait_s or saved(root / "killed")[0] < place) and process.poll() is None:
                time.sleep(0.02)
            time.sleep(moments.uniform(0, pause_s))
            if process.poll() is not None:
                raise SystemExit(f"the training ended (exit code {process.returncode}) before it was killed")
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            life_s = time.monotonic() - began
            kills.append({"after_s": round(life_s, 1), "newest_checkpoint": saved(root / "killed")[1]})
            print(f"killed after {life_s:.1f} s; newest checkpoint {kills[-1]['newest_checkpoint']}", file=sys.stderr)
        if start(options, root / "killed").wait() != 0:
            raise SystemExit("the resumed training failed")
        peace, killed = outcome(root / "peace"), outcome(root / "killed")
    same = peace == killed
    record = {
        "recipe": options.recipe,
        "steps": options.steps,
        "batch": options.batch,
        "checkpoint_every": options.every,
        "kills": kills,
        "undisturbed_s": round(whole_s, 1),
        "networks": peace["networks"],
        "networks_after_kills": killed["networks"],
        "losses_identical": peace["losses"] == killed["losses"],
        "identical": same,
        "provenance": provenance(command=" ".join(sys.argv), seed=options.seed),
    }
    atomic_write(Path("reports/benchmarks/train_kill.json"), json.dumps(record, indent=1) + "\n")
    print(
        f"{len(kills)} kills, {len(peace['networks'])} networks, {'bit-equal' if same else 'NOT EQUAL'} to an"
        " unbroken run"
    )
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
