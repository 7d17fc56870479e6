"""Does the front of a real search stay the front when its networks are trained long?

    python benchmarks/front_stays.py STUDY [--steps 360] [--pairs 3] [--jobs 2]

Takes front members of a study (the fastest, the best, the rest evenly between) and for each one that it dominates: the
proxied candidate that is no faster and scored lower, nearest in latency. Each is trained long at proxy scale, on rows
and from initialisations that the search never saw, the same for all. A row per run in reports/proxy/front_stays.csv,
resumable; the figure is reports/proxy/front_stays.html. Prints, last, how many of the front members still beat theirs
and which of all are then on the front.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from proxy_truth import OUT, SAMPLES, SEEDS, TEACHER, digest_of, truth_settings

from nas import page, pareto
from nas.bench import Bench
from nas.fidelity import Table, long_run
from nas.page.plots import axis, layout
from nas.paths import atomic_write, find_study
from nas.provenance import provenance
from nas.record import candidate_of, read_study


def pairs(trials: pd.DataFrame, count: int) -> list[tuple[str, str]]:
    """Front members, each with a candidate that it dominates; members that dominate nothing are passed over."""
    good = trials[(trials["state"] == "proxied") & trials["feasible"]].sort_values("latency_ms").reset_index(drop=True)
    keep = pareto.non_dominated(np.column_stack([good["latency_ms"], -good["quality"]]))
    members, others = good[keep], good[~keep]
    found: list[tuple[str, str]] = []
    for _, member in members.iterrows():
        taken = {other for _, other in found}
        beaten = others[(others["latency_ms"] >= member["latency_ms"]) & (others["quality"] < member["quality"])]
        beaten = beaten[~beaten["key"].isin(taken)]
        if len(beaten):
            nearest = beaten.iloc[(beaten["latency_ms"] - member["latency_ms"]).to_numpy().argmin()]
            found.append((str(member["key"]), str(nearest["key"])))
    if len(found) <= count:
        return found
    return [found[i] for i in np.unique(np.linspace(0, len(found) - 1, count).round().astype(int))]


def compared(rows: pd.DataFrame, chosen: list[tuple[str, str]]) -> dict[str, Any]:
    """What the long runs say of each pair, and of the front."""
    long_db, text_db, latency = (_means(rows, name) for name in ("quality_db", "text_db", "latency_ms"))
    keys = list(long_db)
    front = pareto.non_dominated(np.array([[latency[key], -long_db[key]] for key in keys]))
    still = [key for key, keep in zip(keys, front, strict=True) if keep]
    members = [member for member, _ in chosen]
    return {
        "pairs": [
            {
                "front": member,
                "dominated": other,
                "latency_ms": [round(latency[member], 1), round(latency[other], 1)],
                "long_db": [round(long_db[member], 3), round(long_db[other], 3)],
                "long_text_db": [round(text_db[member], 3), round(text_db[other], 3)],
                "stays_ahead": bool(long_db[member] > long_db[other]),
            }
            for member, other in chosen
        ],
        "stay_ahead": sum(long_db[member] > long_db[other] for member, other in chosen),
        "of": len(chosen),
        "front_after": still,
        "front_members_still_on_it": sum(member in still for member in members),
        "dominated_now_on_it": sum(other in still for _, other in chosen),
    }


def _means(rows: pd.DataFrame, name: str) -> dict[str, float]:
    grouped = rows.assign(**{name: rows[name].astype(float)}).groupby("key", sort=False)[name].mean()
    return {str(key): float(value) for key, value in grouped.items()}


def figure(rows: pd.DataFrame, chosen: list[tuple[str, str]]) -> page.Figure:
    """Short score on the left, long training on the right, over the same latency; a line joins each pair."""
    sides = (("short_db", "x", "y"), ("quality_db", "x2", "y2"))
    traces: list[dict[str, Any]] = []
    values = {name: _means(rows, name) for name in ("short_db", "quality_db", "latency_ms")}
    for name, x, y in sides:
        for member, other in chosen:
            both = [member, other]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "x": [values["latency_ms"][key] for key in both],
                    "y": [values[name][key] for key in both],
                    "line": {"color": "@line", "dash": "dot"},
                    "hoverinfo": "skip",
                    "xaxis": x,
                    "yaxis": y,
                }
            )
        for which, color, symbol in ((0, "@accent", "circle"), (1, "@muted", "x")):
            keys = [pair[which] for pair in chosen]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "x": [values["latency_ms"][key] for key in keys],
                    "y": [values[name][key] for key in keys],
                    "text": keys,
                    "hovertemplate": "%{text}<br>%{x:.0f} ms<br>%{y:.2f} dB<extra></extra>",
                    "marker": {"color": color, "symbol": symbol, "size": 11},
                    "xaxis": x,
                    "yaxis": y,
                }
            )
    step = len(chosen)
    legend = [
        {"name": "front of the search", "color": "@accent", "shape": "dot", "traces": [step]},
        {"name": "dominated in the search", "color": "@muted", "shape": "dot", "traces": [step + 1]},
    ]
    return {
        "data": traces,
        "layout": layout(
            420,
            xaxis=axis("latency of one image (ms)", domain=[0.0, 0.44]),
            yaxis=axis("the search's score (dB)"),
            xaxis2=axis("latency of one image (ms)", domain=[0.56, 1.0], anchor="y2"),
            yaxis2=axis("after long training (dB)", anchor="x2"),
            meta={"legend": legend},
        ),
    }


def main(argv: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Trains what is missing, writes the figure and prints the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=find_study, help="a study's folder, or its name under reports/")
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    record = read_study(arguments.study)
    trials = pd.read_csv(arguments.study / "trials.csv", dtype={"key": str})
    chosen = pairs(trials, arguments.pairs)
    short = trials.drop_duplicates("key").set_index("key")
    bench = Bench(TEACHER, truth_settings(arguments.steps))
    bench.prepare()
    table = Table(arguments.out / "front_stays.csv", digest_of(bench), ("space_hash", "key", "seed"))
    wanted = [key for pair in chosen for key in pair]
    missing = [key for key in wanted if (record["space_hash"], key, SEEDS[0]) not in table]
    began = time.perf_counter()
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {
            pool.submit(long_run, candidate_of(f"{arguments.study}#{key}")[1], bench, SEEDS[0], SAMPLES): key
            for key in missing
        }
        for job in as_completed(jobs):
            key, found = jobs[job], job.result()
            known = {name: round(float(short.loc[key, name]), 4) for name in ("latency_ms", "quality", "text_quality")}
            table.add(
                {
                    "space": record["space"],
                    "space_hash": record["space_hash"],
                    "key": key,
                    "seed": SEEDS[0],
                    "steps": arguments.steps,
                    "latency_ms": known["latency_ms"],
                    "short_db": known["quality"],
                    "short_text_db": known["text_quality"],
                    **found,
                }
            )
            say(f"{key}: {found['quality_db']:.2f} dB after {time.perf_counter() - began:.0f} s")
    rows = pd.DataFrame([row for row in table if row["key"] in wanted and row["space_hash"] == record["space_hash"]])
    found = compared(rows, chosen)
    made = provenance(seed=SEEDS[0], identity={"study": arguments.study.name, "digest": table.digest})
    atomic_write(
        arguments.out / "front_stays.json",
        json.dumps({"study": arguments.study.name, "steps": arguments.steps, **found, "provenance": made}, indent=1)
        + "\n",
    )
    verdict = (
        f"{found['stay_ahead']} of {found['of']} front members still beat the candidate that they dominated in the"
        f" search after {arguments.steps} steps; {found['front_members_still_on_it']} of {found['of']} are on the front"
        f" of all {2 * found['of']}, and {found['dominated_now_on_it']} that were dominated joined it"
    )
    body = page.figure("figure-front-stays", figure(rows, chosen), "the search's score and long training over latency")
    body += page.table(
        ["network", "latency (ms)", "search (dB)", "long (dB)"],
        [
            [
                page.Cell(text=row["key"], code=True),
                page.Cell(text=f"{float(row['latency_ms']):.0f}", sort=float(row["latency_ms"])),
                page.Cell(text=f"{float(row['short_db']):.2f}", sort=float(row["short_db"])),
                page.Cell(text=f"{float(row['quality_db']):.2f}", sort=float(row["quality_db"])),
            ]
            for _, row in rows.sort_values("latency_ms", key=lambda c: c.astype(float)).iterrows()
        ],
    )
    page.write_page(
        arguments.out / "front_stays.html",
        title="Does the front stay the front?",
        lead=page.paragraph(page.escape(f"{verdict}. Study {arguments.study.name}; one run each.")),
        sections=[page.Section(slug="pairs", title="Front members and what they dominate", body=body)],
        made_by=f"benchmarks/front_stays.py {arguments.study} --steps {arguments.steps}",
    )
    say(verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main())
