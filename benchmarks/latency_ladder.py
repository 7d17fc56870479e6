"""SnapGen's design ladder on an iPhone, predicted and published: python benchmarks/latency_ladder.py [--json PATH].

The ladder was published as ratios on an iPhone 15 Pro, second-hand, and no such row is in the fit. Each step's ratio is
predicted with its interval by a fit with and by one without SnapGen's own UNet, the only network in the table with
depthwise convolutions: without it they are priced by the roofline.
The articles do not say of what "2.4x faster" is said. Both readings are printed: the whole network, and the residual
blocks whose convolutions were exchanged ("convolutions alone").
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from nas import tables
from nas.device import find_target
from nas.families import network
from nas.latency import LatencyPredictor, posed_by
from nas.latency import ratios as quotients
from nas.latency.calibration import calibrated, chosen
from nas.op import features
from nas.paths import atomic_write
from nas.space import load_space
from nas.trace import block_trace

TARGET = "iphone-15-pro"
STEPS = ("thin-short-sdxl", "ladder-1", "ladder-2a", "ladder-2b", "ladder-3", "ladder-4", "ladder-5", "ladder-6")
SNAPGEN = "snapgen-unet-1024"
PUBLISHED_FASTER = 2.4  # separable convolutions with a middle twice as wide, against dense ones


def fits() -> dict[str, LatencyPredictor]:
    """The target's fit without any ratio row, and the same without SnapGen's UNet."""
    sheet = find_target(TARGET)
    posed, _, _ = posed_by(tables.read(sheet.slug), tables.subjects(sheet.slug), sheet)
    everything = np.ones(len(posed.names), dtype=bool)
    without = posed.networks != SNAPGEN
    masks = {"with SnapGen's UNet": everything, "without SnapGen's UNet": without}
    return {name: calibrated(chosen(posed, keep), keep).at(posed.target_effects) for name, keep in masks.items()}


def ladder(predictor: LatencyPredictor) -> list[dict[str, Any]]:
    """Predicted and published ratios, step by step and for every pair that was published."""
    slug = find_target(TARGET).slug
    subjects = tables.subjects(slug)
    published = {(row.subject, row.relative_to): row.ratio for row in quotients.read(slug)}
    keys = [f"snapgen-{step}" for step in STEPS]
    pairs = dict.fromkeys([*zip(keys[1:], keys, strict=False), *published])
    found = []
    for over, under in pairs:
        above, below = subjects[over], subjects[under]
        record: dict[str, Any] = {"step": over, "against": under, "published": published.get((over, under))}
        record["macs"] = above.macs / below.macs
        for level in (0.8, 0.9):
            spans = predictor.ratio(above.vector[None], below.vector[None], level, unseen="prior")
            record["ratio"], *span = (float(v[0]) for v in spans)
            record[f"interval_{level:g}"] = span
        record["ms"] = float(predictor.predict(above.vector[None], unseen="prior")[0][0])
        found.append(record)
    return found


def convolutions(reference: str) -> tuple[np.ndarray, int]:
    """[F] features and MACs of the residual blocks of a step."""
    space = load_space("snapgen_unet")
    width = space.find_reference(reference).text_width
    spec = network((space.with_text_width(width) if width else space).reference(reference))
    traces = [block_trace(block) for block in spec.blocks if block.kind in ("resnet", "separable")]
    macs = sum(op.macs for trace in traces for op in trace.ops)
    return np.sum([features(trace.ops) for trace in traces], axis=0), macs


def alone(predictor: LatencyPredictor) -> dict[str, Any]:
    """Step 2b against step 1 in their residual blocks alone."""
    (above, macs_above), (below, macs_below) = convolutions("ladder-2b"), convolutions("ladder-1")
    record: dict[str, Any] = {"step": "snapgen-ladder-2b", "against": "snapgen-its blocks alone"}
    record |= {"published": 1 / PUBLISHED_FASTER, "macs": macs_above / macs_below}
    for level in (0.8, 0.9):
        spans = predictor.ratio(above[None], below[None], level, unseen="prior")
        record["ratio"], *span = (float(v[0]) for v in spans)
        record[f"interval_{level:g}"] = span
    return record | {"ms": float(predictor.contributions(above[None])[0])}


def show(rows: list[dict[str, Any]]) -> None:
    """Prints one fit's ladder."""
    heads = f"{'step':18s} {'against':24s} {'MACs':>6s} {'ratio':>6s}"
    print(f"{heads} {'80 % interval':>15s} {'90 %':>15s} {'published':>9s}   predicted")
    for row in rows:
        ranges = [f"{low:.2f} to {high:.2f}" for low, high in (row["interval_0.8"], row["interval_0.9"])]
        said = "" if row["published"] is None else f"{row['published']:.2f}"
        print(
            f"{row['step'][8:]:18s} {row['against'][8:]:24s} {row['macs']:6.2f} {row['ratio']:6.2f} {ranges[0]:>15s}"
            f" {ranges[1]:>15s} {said:>9s}   {row['ms']:.0f} ms"
        )


def main() -> None:
    """Prints the ladder under both fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write what was found there")
    arguments = parser.parse_args()
    answer = {}
    for name, predictor in fits().items():
        print(f"\n{TARGET}, {name} in the fit")
        answer[name] = [*ladder(predictor), alone(predictor)]
        show(answer[name])
    if arguments.json:
        print(f"\nwrote {atomic_write(arguments.json, json.dumps(answer, indent=1) + chr(10))}")


if __name__ == "__main__":
    main()
