"""A target from a few measurements and another target's predictor: python benchmarks/latency_transfer.py.

Half of the networks that both tables have are set aside at random (seed 0); they are in neither fit. From the other
half 3, 5 and 10 networks are taken: by the product's own choice (`nas measure --adapt-from`), and at random 20 times.
Beside the adapted fit: the source's predictions times one scale, a fit of the few networks alone, and MACs with a
constant.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from latency_predictors import REPORTS, averaged, linear, scores

from nas import tables
from nas.device import DeviceSheet, find_target
from nas.latency.calibration import chosen
from nas.latency.problem import Problem, problem
from nas.measure.informative import informative
from nas.paths import atomic_write
from nas.provenance import provenance

SIZES, DRAWS = (3, 5, 10), 20


def costs_of(posed: Problem, keep: np.ndarray) -> np.ndarray:
    """[F] ms per unit of each feature from the rows `keep` (mask [n])."""
    return chosen(posed, keep).solve(keep).at(posed.target_effects).costs


def network_rows(sheet: DeviceSheet) -> list[tables.Measurement]:
    """The rows of whole networks that a fit may read."""
    return [row for row in tables.read(sheet.slug) if row.subject_kind == "network" and row.used]


def compare(source: DeviceSheet, target: DeviceSheet, ending: str) -> dict[str, Any]:
    """MAPE of every method by how many networks were measured on the target; of spaces whose name ends so."""
    rows, subjects = network_rows(target), tables.subjects(target.slug)
    theirs = tables.read(source.slug)
    both = {r.subject for r in rows} & {r.subject for r in theirs if r.used}
    shared = sorted(key for key in both if str(subjects[key].spec["space"]).endswith(ending))
    rows = [row for row in rows if row.subject in shared]
    order = list(np.random.default_rng(0).permutation(shared))
    test, pool = set(order[: len(order) // 2]), order[len(order) // 2 :]
    source_posed, _ = problem(theirs, tables.subjects(source.slug), source)
    prior = costs_of(source_posed, ~np.isin(source_posed.networks, sorted(test)))
    alone, _ = problem(rows, subjects, target)
    adapted, _ = problem(rows, subjects, replace(target, fit={}), prior)
    held = np.isin(adapted.networks, sorted(test))
    x, ms = adapted.rows.features, adapted.rows.ms
    macs = np.array([[subjects[str(key)].macs / 1e9] for key in adapted.networks])
    rough = x @ prior

    def scaled(keep: np.ndarray) -> np.ndarray:
        ratio = rough[keep] / ms[keep]
        return rough[held] * float(ratio.sum() / (ratio**2).sum())

    methods: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "adapted from the source": lambda keep: x[held] @ costs_of(adapted, keep),
        "the source times one scale": scaled,
        "a fit of the few networks alone": lambda keep: x[held] @ costs_of(alone, keep),
        "MACs and a constant": lambda keep: linear(macs, ms, keep, held),
    }

    def by_method(picks: Sequence[Sequence[str]]) -> dict[str, dict[str, float]]:
        masks = [np.isin(adapted.networks, list(pick)) for pick in picks]
        return {name: averaged([scores(ms[held], method(mask)) for mask in masks]) for name, method in methods.items()}

    found: dict[str, Any] = {}
    for size in SIZES:
        picked = informative({key: subjects[key] for key in sorted(pool)}, prior, size)
        drawn = [
            [str(k) for k in np.random.default_rng(100 * size + i).permutation(sorted(pool))[:size]]
            for i in range(DRAWS)
        ]
        found[str(size)] = {"chosen": by_method([picked]), "random": by_method(drawn)}
        print(f"{target.alias}, spaces *{ending}, {size} networks", flush=True)
    floor = tables.noise_floor(o for o in tables.observations(rows) if o.subject in test)
    spaces = sorted({str(subjects[key].spec["space"]) for key in shared})
    about = {"source": source.slug, "target": target.slug, "spaces": spaces, "held_out": len(test)}
    return {**about, "methods": found, "noise": floor}


def show(found: dict[str, Any]) -> None:
    """Prints MAPE by method, chosen networks first, the mean of random draws in brackets."""
    print(f"\n{found['target']} from {found['source']}, {', '.join(found['spaces'])}")
    print(f"  MAPE on {found['held_out']} held-out networks, chosen (random): 3, 5 and 10 networks measured")
    for name in next(iter(found["methods"].values()))["chosen"]:
        cells = [
            f"{by['chosen'][name]['mape']:.1%} ({by['random'][name]['mape']:.1%})" for by in found["methods"].values()
        ]
        print(f"  {name:34s}" + "".join(f"{cell:>18s}" for cell in cells))
    print(f"  noise {json.dumps(found['noise'])}")


def main() -> None:
    """Prints and writes the comparison of every target given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=["cpu-openvino", "cpu-eager"])
    parser.add_argument("--source", default="cpu-onnxruntime")
    arguments = parser.parse_args()
    source = find_target(arguments.source)
    found = [compare(source, find_target(name), ending) for name in arguments.targets for ending in ("", "_unet")]
    command = f"python benchmarks/latency_transfer.py {' '.join(arguments.targets)} --source {arguments.source}"
    record = {"provenance": provenance(command=command), "sizes": SIZES, "targets": found}
    path = atomic_write(REPORTS / "latency_transfer.json", json.dumps(record, indent=1) + "\n")
    for one in found:
        show(one)
    print(f"wrote {path}")
    for one in found:
        mape = one["methods"]["5"]["chosen"]["adapted from the source"]["mape"]
        print(f"{one['target']}, {len(one['spaces'])} spaces: MAPE {mape:.1%} from 5 networks")


if __name__ == "__main__":
    main()
