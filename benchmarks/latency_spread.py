"""Measures how wrong fits of few networks are, on every target that has more: python benchmarks/latency_spread.py.

Writes latency_tables/spread.json, which a sheet with `borrow_spread = true` reads: a target with two to four networks
takes the spread of its predictions, and its ridge, from the targets that are not of its family. A family counts once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from nas import tables
from nas.device import DeviceSheet, list_targets
from nas.errors import NasError
from nas.latency import posed_by
from nas.latency.few import tried
from nas.latency.problem import FitSettings
from nas.latency.spread import FEW, ROOFLINE, borrowed, spread_path
from nas.paths import atomic_write


def witnesses() -> list[DeviceSheet]:
    """One sheet per family whose rows are fitted from its own roofline, with more than one network."""
    heads = [sheet for sheet in list_targets() if sheet.family is None and not FitSettings.of(sheet).prior]
    return [sheet for sheet in heads if _networks(sheet) > 1]


def _networks(sheet: DeviceSheet) -> int:
    try:
        return len(posed_by(tables.read(sheet.slug), tables.subjects(sheet.slug), sheet)[0].groups)
    except NasError as error:
        print(f"{sheet.slug} is left out: {error.message}")
        return 0


def show(found: dict[str, dict[str, dict[str, dict[str, float]]]], slugs: Sequence[str]) -> None:
    """Prints each target's own spread beside what the others would have told it."""
    for number in FEW:
        print(f"\n{number} networks fitted: sd of normalised log residuals, own and as told by the other targets")
        for slug in slugs:
            told = borrowed({ROOFLINE: found}, ROOFLINE, {slug}).get(number)
            own = found[slug].get(str(number))
            if told is None or own is None:
                continue
            mine = float(np.sqrt(own[f"{told.ridge:g}"]["square"]))
            print(f"{slug:34s} own {mine:6.1%}  told {told.sd:6.1%} by {len(told.targets)} (ridge {told.ridge:g})")


def main() -> None:
    """Tries every target and writes the file."""
    found = {}
    for sheet in witnesses():
        posed, _, _ = posed_by(tables.read(sheet.slug), tables.subjects(sheet.slug), sheet)
        found[sheet.slug] = tried(posed)
        print(f"{sheet.slug}: {len(posed.groups)} networks tried")
    show(found, sorted(found))
    path = spread_path()
    atomic_write(path, json.dumps({"priors": {ROOFLINE: found}}, indent=1) + "\n")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
