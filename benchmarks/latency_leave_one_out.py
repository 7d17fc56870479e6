"""Held-out predictions of a latency table: python benchmarks/latency_leave_one_out.py [TARGET].

Every network is predicted by a complete fit (ridge, chip freedom and interval chosen anew) that did not see its fold,
and every chip of a pooled table by one that saw none of its rows. Nothing here is read by the tool.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import numpy as np

from nas import tables
from nas.device import find_target
from nas.latency import load_predictor
from nas.latency.calibration import HeldOut, held_out, held_out_chips, summary
from nas.latency.problem import problem


def show(title: str, rows: Sequence[HeldOut]) -> None:
    """Prints rows with their intervals, and what share of them the intervals cover."""
    print(f"\n{title}")
    heads = f"{'network':58s} {'chip':9s} {'ms':>8s} {'predicted':>9s} {'error':>7s}"
    print(f"{heads}  80 % interval       90 % interval      upper 80 %  x: not covered")
    for row in rows:
        spans = [f"{row.intervals[level][0]:7.4g} to {row.intervals[level][1]:<7.4g}" for level in (0.8, 0.9)]
        out = "".join(" " if low <= row.ms <= high else "x" for low, high in row.intervals.values())
        prior = f"  never seen, priced by the prior: {', '.join(row.unseen)}" if row.unseen else ""
        print(
            f"{row.name[:58]:58s} {row.chip[:9]:9s} {row.ms:8.4g} {row.predicted:9.4g} {row.error:+7.1%}  {spans[0]}"
            f"  {spans[1]} {row.uppers[0.8]:8.4g} {out}{prior}"
        )
    found = summary(rows, title)
    print(
        f"MAPE {found['mape']:.1%}, within 5 % {found['within_5']:.0%}, within 10 % {found['within_10']:.0%},"
        f" Spearman {found['spearman']:.3f}, Kendall {found['kendall']:.3f}"
    )
    for name, share in found["coverage"].items():
        print(f"  {name}: {share['measured']:.0%} of {share['rows']} rows covered, nominal {share['nominal']:.0%}")


def in_fit(slug: str, keys: Iterable[str]) -> None:
    """Prints the predictions of fitted networks by the final predictor, which has seen them."""
    predictor, subjects = load_predictor(slug), tables.subjects(slug)
    print("\nwith every row in the fit, at the target itself")
    for key in keys:
        x = subjects[key].vector[None]
        spans = []
        for level in (0.8, 0.9):
            ms, low, high = (float(v[0]) for v in predictor.predict(x, level))
            spans.append(f"{level:.0%} {low:.4g} to {high:.4g}, upper {float(predictor.upper(x, level)[0]):.4g}")
        print(f"{subjects[key].name[:58]:58s} {ms:8.4g} ms   {'   '.join(spans)}")


def main() -> None:
    """Prints both tables for one target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default="iphone")
    sheet = find_target(parser.parse_args().target)
    posed, _ = problem(tables.read(sheet.slug), tables.subjects(sheet.slug), sheet)
    print(f"{sheet.slug}: {len(posed.groups)} networks, {int((posed.networks == '').sum())} blocks")
    print(f"chip of each row: {', '.join(np.unique(posed.chips))}")
    show("networks held out (by fold)", list(held_out(posed)))
    chips = list(held_out_chips(posed))
    if chips:
        show("chips held out one at a time (the chip's speed is then the trend of its public figures)", chips)
    if len(posed.groups) <= 10:
        in_fit(sheet.slug, posed.groups)


if __name__ == "__main__":
    main()
