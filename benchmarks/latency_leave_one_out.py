"""Held-out predictions of latency tables: python benchmarks/latency_leave_one_out.py [TARGET ...] [--json PATH].

Every network is predicted by a complete fit (ridge, chip freedom and interval chosen anew) that did not see its fold,
and every chip of a pooled table with a trend by one that saw none of its rows. Rows that a table keeps without fitting
them, whose network is known, are held against the final predictor. Nothing here is read by the tool.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nas import tables
from nas.device import DeviceSheet, find_target
from nas.errors import NasError
from nas.latency import LatencyPredictor, fit, posed_by
from nas.latency import ratios as quotients
from nas.latency.calibration import HeldOut, held_out, held_out_chips
from nas.latency.card import summary
from nas.paths import atomic_write

TARGETS = ("iphone", "galaxy-s24", "a100", "rtx-4090", "rtx-3060-ti", "rtx-2080-ti", "m2-ultra", "cpu-onnxruntime")
_SHOWN = 40  # rows of a dense table are summed up, not listed


def show(title: str, rows: Sequence[HeldOut]) -> dict[str, Any]:
    """Prints rows with their intervals, and what share of them the intervals cover; returns the summary."""
    print(f"\n{title}")
    heads = f"{'network':58s} {'chip':9s} {'ms':>8s} {'predicted':>9s} {'error':>7s}"
    print(f"{heads}  80 % interval       90 % interval      upper 80 %  x: not covered")
    for row in rows if len(rows) <= _SHOWN else ():
        spans = [f"{row.intervals[level][0]:7.4g} to {row.intervals[level][1]:<7.4g}" for level in (0.8, 0.9)]
        out = "".join(" " if low <= row.ms <= high else "x" for low, high in row.intervals.values())
        prior = f"  never seen, priced by the prior: {', '.join(row.unseen)}" if row.unseen else ""
        print(
            f"{row.name[:58]:58s} {row.chip[:9]:9s} {row.ms:8.4g} {row.predicted:9.4g} {row.error:+7.1%}  {spans[0]}"
            f"  {spans[1]} {row.uppers[0.8]:8.4g} {out}{prior}"
        )
    found = summary(rows, title)
    rank = "" if found["kendall"] is None else f", Spearman {found['spearman']:.3f}, Kendall {found['kendall']:.3f}"
    print(f"MAPE {found['mape']:.1%}, within 5 % {found['within_5']:.0%}, within 10 % {found['within_10']:.0%}{rank}")
    for name, share in found["coverage"].items():
        print(f"  {name}: {share['measured']:.0%} of {share['rows']} rows covered, nominal {share['nominal']:.0%}")
    return found


def against_rows_not_fitted(sheet: DeviceSheet, predictor: LatencyPredictor) -> list[dict[str, Any]]:
    """Predictions of rows of the sheet's chip that are kept out of the fit, with why they are."""
    subjects, found = tables.subjects(sheet.slug), []
    for row in tables.read(sheet.slug):
        known = subjects.get(row.subject)
        if row.used or row.chip != sheet.chip or row.subject_kind == "component" or not (known and known.features):
            continue
        ms, low, high = (float(v[0]) for v in predictor.predict(known.vector[None], 0.8, unseen="prior"))
        found.append({"name": known.name, "ms": row.latency_ms, "predicted": ms, "interval_80": [low, high]})
        print(
            f"{known.name[:58]:58s} {row.latency_ms:8.4g} ms, predicted {ms:8.4g} ({ms / row.latency_ms - 1:+.0%}),"
            f" 80 % {low:.4g} to {high:.4g}{' ' if low <= row.latency_ms <= high else ' x'} {row.excluded_because[:60]}"
        )
    return found


def study(name: str) -> dict[str, Any]:
    """Everything held out of one target."""
    sheet = find_target(name)
    rows, subjects, ratios = tables.read(sheet.slug), tables.subjects(sheet.slug), quotients.read(sheet.slug)
    posed, _, _ = posed_by(rows, subjects, sheet, ratios=ratios)
    print(f"\n{sheet.slug}: {len(posed.groups)} networks, {int((posed.networks == '').sum())} blocks")
    answer: dict[str, Any] = {"target": sheet.slug, "networks": len(posed.groups)}
    started = time.process_time()
    predictor = fit(rows, subjects, sheet, ratios=ratios)
    answer["fit_s"] = round(time.process_time() - started, 1)
    print(f"fit with its card: {answer['fit_s']} s of one core; interval: {predictor.card['interval']['method']}")
    if sheet.family is None:
        answer["held_out"] = show("networks held out (by fold)", list(held_out(posed)))
        chips = list(held_out_chips(posed))
        if chips:
            title = "chips held out one at a time (the chip's speed is then the trend of its public figures)"
            answer["held_out_chips"] = show(title, chips)
    print("\nrows kept out of the fit, against the predictor")
    answer["not_fitted"] = against_rows_not_fitted(sheet, predictor)
    return answer


def main() -> None:
    """Prints what is held out of every target asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=TARGETS)
    parser.add_argument("--json", type=Path, help="also write what was found there")
    arguments = parser.parse_args()
    found = []
    for name in arguments.targets:
        try:
            found.append(study(name))
        except NasError as error:
            print(f"\n{name}: {error.message}")
    if arguments.json:
        print(f"\nwrote {atomic_write(arguments.json, json.dumps(found, indent=1) + chr(10))}")


if __name__ == "__main__":
    main()
