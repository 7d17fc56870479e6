"""A search killed at random moments ends with the same trials as one left in peace.

    python benchmarks/kill_resume.py [--kills 5] [--trials 12] [--shortest 4] [--longest 20]

Runs one search to its end; runs the same search again in another folder and sends SIGKILL to its whole process group at
random times, resuming after each; then compares the two studies trial by trial. With one job a study's trials follow
from its settings alone; with several they depend on which run ends first (see benchmarks/study_faults.py for those).
Prints the verdict last and writes reports/benchmarks/kill_resume.json. The proxy is shortened: this is about the study,
not about quality.
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
from pathlib import Path

import pandas as pd

from nas.paths import atomic_write
from nas.provenance import provenance

SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from nas.quality import ProxySettings
from nas.search import SearchSettings, run_search
proxy = replace(ProxySettings(), steps=10, seeds=(0,))
if __name__ == "__main__":
    run_search(SearchSettings(space="snapgen_unet", budgets=(sys.argv[3],), trials=int(sys.argv[2]), seed=7, jobs=1,
                              out=Path(sys.argv[1]), proxy=proxy, reuse=False))
"""


def start(script: Path, folder: Path, trials: int, budget: str) -> subprocess.Popen[bytes]:
    """One search in its own process group."""
    return subprocess.Popen([sys.executable, str(script), str(folder), str(trials), budget], start_new_session=True)


def trials_of(folder: Path) -> pd.DataFrame:
    """The study's trials, by number."""
    frame = pd.read_csv(folder / "trials.csv", keep_default_na=False)
    # Seconds are a measurement, not an outcome.
    return frame.drop(columns=["seconds"]).sort_values("number").reset_index(drop=True)


def main() -> None:
    """Runs both searches and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--shortest", type=float, default=4.0, help="seconds that a run may live, at least")
    parser.add_argument("--longest", type=float, default=20.0, help="and at most")
    parser.add_argument("--budget", default="1.4s@iphone")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        script = root / "one_search.py"
        script.write_text(SCRIPT)
        began = time.monotonic()
        if start(script, root / "peace", options.trials, options.budget).wait() != 0:
            raise SystemExit("the undisturbed search failed")
        whole_s = time.monotonic() - began
        kills = []
        while True:
            process = start(script, root / "killed", options.trials, options.budget)
            # From the first imports to well into the trials.
            life_s = random.uniform(options.shortest, options.longest)
            try:
                code = process.wait(timeout=life_s if len(kills) < options.kills else None)
                if code != 0:
                    raise SystemExit(f"the resumed search failed with exit code {code}")
                break
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills.append(round(life_s, 1))
                print(f"killed after {life_s:.1f} s", file=sys.stderr)
        peace, killed = trials_of(root / "peace"), trials_of(root / "killed")
    same = peace.equals(killed)
    result = {
        "kills": kills,
        "undisturbed_s": round(whole_s, 1),
        "trials": len(peace),
        "proxied": int((peace["state"] == "proxied").sum()),
        "trials_after_kills": len(killed),
        "doubled": int(killed["number"].duplicated().sum()),
        "identical": bool(same),
        "provenance": provenance(command=" ".join(sys.argv), seed=options.seed),
    }
    atomic_write(Path("reports/benchmarks/kill_resume.json"), json.dumps(result, indent=1) + "\n")
    if not same:
        merged = peace.merge(killed, on="number", how="outer", suffixes=("_peace", "_killed"))
        print(merged[["number", "key_peace", "key_killed"]].to_string(), file=sys.stderr)
    print(
        f"{len(kills)} kills, {len(peace)} trials undisturbed, {len(killed)} after kills,"
        f" {'identical' if same else 'DIFFERENT'}"
    )
    raise SystemExit(0 if same and len(kills) >= options.kills else 1)


if __name__ == "__main__":
    main()
