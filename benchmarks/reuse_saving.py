"""What a second search, for another device, saves by the proxy scores of the first.

    python benchmarks/reuse_saving.py [--trials 24] [--jobs 2] [--proxy distill] [--first 1.4s@iphone] [--second ...]

Four real searches of one space with one proxy: `first` for one device; then for another device `without` kept scores,
`repriced` with the scores of the first and no proxy run at all, and `with` the scores of the first and as many runs as
`without` has. Scores are kept in a cache of the benchmark's own. Killed, the command goes on where it was; `wall_s`
is of the search itself over all its sessions, `command_s` of the whole command where it was not killed.

Fronts are compared by hypervolume against (second budget, 0 dB). Writes reports/search/reuse_saving.json; prints the
figure last.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from nas.paths import atomic_write
from nas.provenance import provenance
from nas.proxies import settings_of
from nas.search import SearchResult, SearchSettings, run_search

OUT = Path(__file__).resolve().parent.parent / "reports" / "search"


def main(argv: list[str] | None = None) -> int:
    """Runs the four searches and compares them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="snapgen_unet")
    parser.add_argument("--first", default="1.4s@iphone")
    parser.add_argument("--second", default="400ms/step@iphone-13")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--proxy", default="distill")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "nas_reuse_saving")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    os.environ["NAS_CACHE"] = str(arguments.work / "cache")
    base = SearchSettings(
        space=arguments.space,
        budgets=(arguments.second,),
        trials=arguments.trials,
        jobs=arguments.jobs,
        proxy=settings_of(arguments.proxy),
    )
    asked = {
        "first": replace(base, budgets=(arguments.first,)),
        "without": replace(base, reuse=False),
        "repriced": replace(base, trials=0),
        "with": base,
    }
    found, command_s = {}, {}
    for name, settings in asked.items():
        print(f"{name}: {settings.budgets[0]}, {settings.trials} proxy runs", flush=True)
        began = time.monotonic()
        found[name] = run_search(replace(settings, out=arguments.work / name))
        command_s[name] = _seconds(arguments.work / name, time.monotonic() - began)
    result = {
        "space": arguments.space,
        "proxy": arguments.proxy,
        "budgets": {"first": arguments.first, "second": arguments.second},
        "trials": arguments.trials,
        "jobs": arguments.jobs,
        "searches": {name: {"command_s": command_s[name], **figures(each)} for name, each in found.items()},
        "until_equal": until_equal(found["with"], found["without"]),
        "scored_in_both": agreement(found["first"], found["without"]),
        "provenance": provenance(command=" ".join(sys.argv)),
    }
    atomic_write(arguments.out / "reuse_saving.json", json.dumps(result, indent=1) + "\n")
    print(words(result))
    return 0


def _seconds(folder: Path, seconds: float) -> float:
    """Seconds of a whole search, pricing and files too: of its first complete run, not of a look at a finished one."""
    note = folder / "command_seconds.json"
    if not note.is_file():
        atomic_write(note, json.dumps(round(seconds, 1)))
    return float(json.loads(note.read_text()))


def trials_of(found: SearchResult) -> pd.DataFrame:
    """trials.csv."""
    return pd.read_csv(found.folder / "trials.csv", dtype={"key": str}, keep_default_na=False, na_values=[""])


def _ran(frame: pd.DataFrame) -> pd.Series:
    """Which trials a proxy run of their own study was spent on."""
    return (frame["source"] != "reused") & frame["state"].isin(["proxied", "stopped"])


def figures(found: SearchResult) -> dict[str, Any]:
    """Seconds, runs and the front's hypervolume of one search."""
    frame, values = trials_of(found), found.record["hypervolume"]["values"]
    own = frame[_ran(frame)]
    return {
        "wall_s": found.record["wall_s"],
        "proxy_runs": len(own),
        "proxy_s": round(float(own["seconds"].sum()), 1),
        "reused": found.record["reuse"],
        "front": len(found.front),
        "hypervolume": values[-1] if values else 0.0,
        "hypervolume_unit": found.record["hypervolume"]["unit"],
    }


def until_equal(found: SearchResult, other: SearchResult) -> dict[str, Any]:
    """How many proxy runs of its own, and seconds, a search needs to have the other's final hypervolume.

    None where it does not get there.
    """
    goal = other.record["hypervolume"]["values"][-1]
    frame = trials_of(found)
    scored = frame[frame["state"] == "proxied"].reset_index(drop=True)
    values = found.record["hypervolume"]["values"]
    place = next((i for i, value in enumerate(values) if value >= goal), None)
    if place is None:
        return {"proxy_runs": None, "proxy_s": None}
    last = int(scored["number"][place])
    spent = frame[(frame["number"] <= last) & _ran(frame)]
    return {"proxy_runs": len(spent), "proxy_s": round(float(spent["seconds"].sum()), 1)}


def agreement(one: SearchResult, two: SearchResult) -> dict[str, Any]:
    """How far two searches that both scored a candidate differ about it: nought, if a score may be reused."""
    first, second = (trials_of(each) for each in (one, two))
    pairs = [frame[frame["state"] == "proxied"].set_index("key")["quality"] for frame in (first, second)]
    both = pd.concat(pairs, axis=1, join="inner")
    gap = (both.iloc[:, 0] - both.iloc[:, 1]).abs().max() if len(both) else None
    return {"candidates": len(both), "largest_difference": None if gap is None else float(gap)}


def words(result: dict[str, Any]) -> str:
    """The figure in a sentence."""
    searches, equal = result["searches"], result["until_equal"]
    without, repriced, both = (searches[name] for name in ("without", "repriced", "with"))
    unit = without["hypervolume_unit"]
    reached = (
        "does not reach that of the search without them"
        if equal["proxy_runs"] is None
        else f"has that of the search without them after {equal['proxy_runs']} of its own runs ({equal['proxy_s']:g} s)"
    )
    return (
        f"a search for {result['budgets']['second']} without kept scores takes {without['command_s']:g} s"
        f" ({without['proxy_runs']} proxy runs, {without['proxy_s']:g} s): hypervolume {without['hypervolume']:.4g}"
        f" {unit}; with the {repriced['reused']['used']} of the search for {result['budgets']['first']} and no run it"
        f" takes {repriced['command_s']:g} s: {repriced['hypervolume']:.4g}; with them and {both['proxy_runs']} runs it"
        f" takes {both['command_s']:g} s (proxies {both['proxy_s']:g} s): {both['hypervolume']:.4g}, and it {reached}"
    )


if __name__ == "__main__":
    sys.exit(main())
