"""How well a latency is predicted from how many measurements: python benchmarks/latency_predictors.py [TARGET].

From a target's table, 100 networks are set aside at random (seed 0) and never fitted; their truth is the median of
their sessions. What is left is what is fitted: 50 blocks drawn at random and N networks, over several draws. Beside
the fit of this package: MACs alone, parameters and MACs, gradient boosting on the configurations, the raw sum of the
blocks' own times (benchmarks/latency_lookup.py measures them), and how far a network's sessions lie from each other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls
from scipy.stats import kendalltau
from sklearn.ensemble import HistGradientBoostingRegressor

from nas import tables
from nas.device import DeviceSheet, find_target
from nas.latency.calibration import chosen
from nas.latency.problem import Problem, problem
from nas.paths import atomic_write
from nas.provenance import provenance

REPORTS = Path(__file__).resolve().parent.parent / "reports" / "benchmarks"
BLOCKS, SIZES, HELD_OUT = 50, (5, 10, 20, 40, 80), 100


def scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Errors of predictions [n] of the truth [n], as fractions."""
    errors = np.abs(predicted / truth - 1)
    return {
        "mape": float(errors.mean()),
        "within_5": float((errors <= 0.05).mean()),
        "within_10": float((errors <= 0.10).mean()),
        "largest": float(errors.max()),
        "kendall": float(kendalltau(truth, predicted).statistic),
    }


def averaged(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over draws, and the worst draw's MAPE."""
    mean = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
    return {**mean, "worst_mape": max(one["mape"] for one in found), "draws": len(found)}


def joint(posed: Problem, keep: np.ndarray, test: np.ndarray) -> np.ndarray:
    """This package's predictions of the rows `test` from the rows `keep` (masks [n])."""
    shrunk = chosen(posed, keep)
    return shrunk.solve(keep).at(posed.target_effects).ms(posed.rows.features[test])


def linear(columns: np.ndarray, ms: np.ndarray, keep: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Non-negative least squares of the relative error on `columns` [n, k] and a constant."""
    x = np.hstack([columns, np.ones((len(columns), 1))])
    found, _ = nnls(x[keep] / ms[keep, None], np.ones(int(keep.sum())))
    return x[test] @ found


def by_space(truth: np.ndarray, predicted: np.ndarray, whole: Sequence[tables.Subject]) -> dict[str, Any]:
    """Scores of all networks, of each space's, and of the three spaces of UNets together."""
    names = np.array([s.spec["space"] for s in whole])
    unets = np.array([name.endswith("_unet") for name in names])
    parts = {"all": np.ones(len(names), bool), "UNets": unets, **{name: names == name for name in sorted(set(names))}}
    return {part: {**scores(truth[mask], predicted[mask]), "networks": int(mask.sum())} for part, mask in parts.items()}


def configurations(subjects: Sequence[tables.Subject]) -> np.ndarray:
    """What a network's blocks are set to: per kind of block their number, and the mean and sum of each setting."""
    rows = []
    for subject in subjects:
        row: dict[str, float] = {f"input.{k}": float(v) for k, v in subject.spec["input"].items()}
        for block in subject.spec["blocks"]:
            kind = block["kind"]
            row[f"{kind}.count"] = row.get(f"{kind}.count", 0.0) + 1
            numbers = {k: float(v) for k, v in block["settings"].items() if isinstance(v, bool | int | float)}
            for i, side in enumerate(block["inputs"].get("x", ())):
                numbers[f"x{i}"] = float(side)
            for name, value in numbers.items():
                row[f"{kind}.{name}"] = row.get(f"{kind}.{name}", 0.0) + value
        rows.append(row)
    names = sorted(set().union(*rows))
    return np.array([[row.get(name, 0.0) for name in names] for row in rows])


def boosted(x: np.ndarray, ms: np.ndarray, keep: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    """Gradient boosting of log ms on configurations."""
    model = HistGradientBoostingRegressor(min_samples_leaf=3, learning_rate=0.05, max_iter=300, random_state=seed)
    return np.exp(model.fit(x[keep], np.log(ms[keep])).predict(x[test]))


def noise(observations: Sequence[tables.Observation], names: set[str]) -> dict[str, float]:
    """How far a network's sessions lie from the truth, and one session of a network from another."""
    repeated = [o for o in observations if o.subject in names and len(o.session_ms) > 1]
    truth = np.concatenate([[o.ms] * len(o.session_ms) for o in repeated])
    single = np.concatenate([o.session_ms for o in repeated])
    first, second = (np.array([o.session_ms[i] for o in repeated]) for i in (0, 1))
    return {
        "one_session_against_truth": float(np.abs(single / truth - 1).mean()),
        "one_session_against_another": float(np.abs(first / second - 1).mean()),
        "kendall_between_sessions": float(kendalltau(first, second).statistic),
        "networks": len(repeated),
        "sessions": float(np.median([len(o.session_ms) for o in repeated])),
    }


def looked_up(path: Path, slug: str, test: Sequence[str], subjects: Mapping[str, tables.Subject]) -> dict[str, Any]:
    """The raw sum of the blocks' own times, over the held-out networks all of whose blocks were timed."""
    if not path.is_file():
        return {"missing": "python benchmarks/latency_lookup.py"}
    times = {o.subject: o.ms for o in tables.observations(tables.read(slug, path.parent)) if o.kind == "block"}
    sums, truth = [], []
    network_ms = {o.subject: o.ms for o in tables.observations(tables.read(slug, path.parent)) if o.kind == "network"}
    from nas.network import NetworkSpec

    for key in test:
        blocks = [b.key for b in NetworkSpec.from_json(subjects[key].spec).blocks]
        if key in network_ms and all(b in times for b in blocks):
            sums.append(sum(times[b] for b in blocks))
            truth.append(network_ms[key])
    if not truth:
        return {"missing": "no held-out network has all of its blocks timed"}
    found, ratio = scores(np.array(truth), np.array(sums)), np.array(sums) / np.array(truth)
    return {**found, "networks": len(truth), "blocks": len(times), "sum_over_whole": float(np.median(ratio))}


def study(sheet: DeviceSheet, draws: int) -> dict[str, Any]:
    """All figures of one target."""
    rows, subjects = tables.read(sheet.slug), tables.subjects(sheet.slug)
    posed, observations = problem(rows, subjects, sheet)
    networks = np.flatnonzero(posed.networks != "")
    # The anchors, measured with every group, have far more.
    most = int(np.median([len(o.session_ms) for o in observations if o.kind == "network"]))
    repeated = {o.subject for o in observations if o.kind == "network" and len(o.session_ms) >= most}
    order = [i for i in np.random.default_rng(0).permutation(networks) if posed.networks[i] in repeated]
    test = np.isin(np.arange(len(posed.names)), order[:HELD_OUT])
    pool, blocks = np.setdiff1d(networks, np.flatnonzero(test)), np.flatnonzero(posed.networks == "")
    truth, ms = posed.rows.ms[test], posed.rows.ms
    whole = [subjects[str(key)] for key in posed.networks[networks]]
    size = np.zeros((len(ms), 2))
    size[networks] = [(s.macs / 1e9, s.params / 1e6) for s in whole]
    settings = configurations(whole)
    config = np.zeros((len(ms), settings.shape[1]))
    config[networks] = settings
    found: dict[str, Any] = {}
    for count in SIZES:
        by_method: dict[str, list[dict[str, float]]] = {}
        for draw in range(draws):
            generator = np.random.default_rng(1000 * count + draw)
            chosen_networks = np.isin(np.arange(len(ms)), generator.permutation(pool)[:count])
            with_blocks = chosen_networks | np.isin(np.arange(len(ms)), generator.permutation(blocks)[:BLOCKS])
            predictions = {
                f"fit on {BLOCKS} blocks and N networks": joint(posed, with_blocks, test),
                "fit on N networks": joint(posed, chosen_networks, test) if count >= 10 else None,
                "MACs, linear": linear(size[:, :1], ms, chosen_networks, test),
                "parameters and MACs, linear": linear(size, ms, chosen_networks, test),
                "gradient boosting on configurations": boosted(config, ms, chosen_networks, test, draw),
            }
            for method, predicted in predictions.items():
                if predicted is not None:
                    by_method.setdefault(method, []).append(scores(truth, predicted))
            print(f"N = {count}, draw {draw + 1} of {draws}", flush=True)
        for method, results in by_method.items():
            found.setdefault(method, {})[str(count)] = averaged(results)
    keys = [str(key) for key in posed.networks[test]]
    everything = joint(posed, ~test, test)
    lookup = REPORTS / "lookup" / f"{sheet.slug}.csv"
    return {
        "target": sheet.slug,
        "held_out": {"networks": int(test.sum()), "sessions": most, "ms": [float(truth.min()), float(truth.max())]},
        "pool": {"networks": len(pool), "blocks": len(blocks)},
        "methods": found,
        "everything else fitted, by space": by_space(truth, everything, [subjects[key] for key in keys]),
        "raw sum of blocks": looked_up(lookup, sheet.slug, keys, subjects),
        "noise": noise(observations, set(keys)),
    }


def show(found: Mapping[str, Any]) -> None:
    """Prints a table: MAPE, and within 5 % and Kendall tau, by method and N."""
    held = found["held_out"]
    print(f"\n{found['target']}: {held['networks']} held-out networks, {held['sessions']} sessions")
    print(f"{'MAPE / within 5 % / Kendall':40s}" + "".join(f"{f'N = {n}':>22s}" for n in SIZES))
    for method, by_size in found["methods"].items():
        cells = [by_size.get(str(n)) for n in SIZES]
        texts = ["" if c is None else f"{c['mape']:.2%} / {c['within_5']:.0%} / {c['kendall']:.3f}" for c in cells]
        print(f"{method:40s}" + "".join(f"{text:>22s}" for text in texts))
    for part, one in found["everything else fitted, by space"].items():
        print(
            f"  all rows fitted, {part:14s} {one['networks']:4d} networks: MAPE {one['mape']:.2%}, within 5 %"
            f" {one['within_5']:.0%}, Kendall {one['kendall']:.3f}"
        )
    print(f"raw sum of blocks: {json.dumps(found['raw sum of blocks'])}")
    print(f"noise: {json.dumps(found['noise'])}")


def main() -> None:
    """Prints and writes the figures of one target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default="cpu-onnxruntime")
    parser.add_argument("--draws", type=int, default=8)
    arguments = parser.parse_args()
    sheet = find_target(arguments.target)
    found = study(sheet, arguments.draws)
    command = f"python benchmarks/latency_predictors.py {sheet.alias} --draws {arguments.draws}"
    record = {"provenance": provenance(command=command, inputs_sha=tables.inputs_sha(sheet.slug)), **found}
    path = atomic_write(REPORTS / f"latency_predictors_{sheet.slug}.json", json.dumps(record, indent=1) + "\n")
    show(found)
    best = found["methods"][f"fit on {BLOCKS} blocks and N networks"]["80"]
    print(f"wrote {path}")
    print(f"MAPE {best['mape']:.2%}, within 5 % {best['within_5']:.1%}, Kendall tau {best['kendall']:.3f}")


if __name__ == "__main__":
    main()
