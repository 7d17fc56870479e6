"""Writes the iPhone latency table from the published rows and fits it: python benchmarks/published_iphone.py.

The networks of latency_tables/published/networks.json are built on `meta` with diffusers (or from a space's reference)
and traced at the batch that was timed; latency_tables/published/iphone.csv has the rows, used or not, with sources.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from nas import tables
from nas.errors import NasError
from nas.families import network
from nas.latency import refit
from nas.op import Op, features
from nas.paths import data_dir
from nas.space import load_space
from nas.trace import module_trace, trace_block

SLUG = "iphone-16-pro-max--coreml--fp16"


def subject(key: str, record: dict[str, Any]) -> tables.Subject:
    """A published network, traced at the batch that was timed."""
    if "space" in record:
        ops, params = _from_space(record)
    else:
        ops, params = _from_diffusers(record)
    if params != record.get("published_params", params):
        raise NasError(f"{key} has {params} parameters where {record['published_params']} are published")
    return tables.Subject(
        key=key,
        kind="reference",
        name=record["name"],
        spec={k: v for k, v in record.items() if k not in ("name", "note")},
        features=tables.feature_map(features(ops)),
        macs=sum(op.macs for op in ops),
        params=params,
        note=record["note"],
    )


def _from_space(record: dict[str, Any]) -> tuple[tuple[Op, ...], int]:
    space = load_space(record["space"])
    spec = network(space.reference(record["reference"]))
    published = {r.name: r.params for r in space.references}[record["reference"]]
    ops = tuple(op for block in spec.blocks for op in trace_block(block, record["batch"]))
    return ops, int(published or 0)


def _from_diffusers(record: dict[str, Any]) -> tuple[tuple[Op, ...], int]:
    batch = record["batch"]
    with torch.device("meta"):
        module = getattr(diffusers, record["diffusers_class"])(**record["config"])
        latent = torch.empty(batch, *record["latent"])
        if record["diffusers_class"] == "AutoencoderKL":
            module, inputs = module.decoder, {"sample": latent}
        else:
            inputs = {
                "sample": latent,
                "timestep": torch.empty(batch),
                "encoder_hidden_states": torch.empty(batch, *record["text"]),
            }
        if "pooled" in record:
            added = {"text_embeds": torch.empty(batch, record["pooled"]), "time_ids": torch.empty(batch, 6)}
            inputs["added_cond_kwargs"] = added
    found = module_trace(module, inputs)
    return found.ops, found.params


def measurement(row: dict[str, str], known: set[str]) -> tables.Measurement:
    """One published row in the form of a table."""
    excluded = row["excluded_because"]
    if not excluded and row["network"] not in known:
        raise NasError(f"iphone.csv uses {row['network']!r}, which networks.json does not have")
    resolution = row["resolution_px"]
    return tables.Measurement(
        target=SLUG,
        subject=row["network"],
        subject_kind="component" if row["role"] else "reference",
        latency_ms=float(row["latency_ms"]),
        statistic="published",
        session=row["device"],
        batch=int(row["batch"] or 1),
        device=row["device"],
        chip=row["chip"],
        resolution_px=int(resolution),
        role=row["role"],
        source=f"{row['source']} ({row['quality']})",
        protocol=row["notes"] + ("" if row["batch"] else "; batch not stated"),
        environment=f"{row['runtime']}, {row['compute_unit']}, {row['precision']}",
        excluded_because=excluded,
    )


def main() -> None:
    """Rewrites subjects, rows and predictor."""
    published = Path(data_dir("latency_tables")) / "published"
    records = json.loads((published / "networks.json").read_text())
    traced = [subject(key, record) for key, record in records.items()]
    for one in traced:
        print(f"{one.name}: {one.params / 1e6:.1f} M parameters, {one.macs / 1e9:.1f} GMAC at its batch")
    tables.write_subjects(SLUG, traced)
    with (published / "iphone.csv").open(newline="") as stream:
        rows = [measurement(row, set(records)) for row in csv.DictReader(stream)]
    tables.write(SLUG, rows)
    predictor = refit(SLUG)
    snapgen = np.array([next(s.vector for s in traced if s.key == "snapgen-unet-1024")])
    print(json.dumps(dict(predictor.card), indent=1))
    for level in (0.8, 0.9):
        ms, low, high = (float(v[0]) for v in predictor.predict(snapgen, level))
        upper = float(predictor.upper(snapgen, level)[0])
        print(f"SnapGen UNet: {ms:.0f} ms, {level:.0%} interval {low:.0f} to {high:.0f}, upper bound {upper:.0f}")


if __name__ == "__main__":
    main()
