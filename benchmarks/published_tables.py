"""Writes the latency tables of devices that others measured, and fits them: python benchmarks/published_tables.py.

latency_tables/published/ has the rows, used or not, with their sources (rows.csv), published quotients without absolute
times (ratios.csv) and the networks that were timed (networks.json), each a reference of a space or a class of diffusers
and traced at the batch that was timed. A sheet latency_tables/<slug>.toml must exist for every target.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from nas import components, tables
from nas.device import DeviceSheet, list_targets
from nas.errors import NasError
from nas.families import network
from nas.latency import ratios as quotients
from nas.latency import refit
from nas.op import features
from nas.paths import data_dir
from nas.space import SearchSpace, load_space
from nas.trace import Trace, block_trace, module_trace

# Rows of these qualities are kept and not fitted, unless the target's sheet accepts the quality and says why:
# [protocol] accepts = ["chart-label"].
NOT_FITTED = {
    "chart-label": "a label read off a chart",
    "derived": "derived, not published",
    "docs-example": "an example in documentation",
    "marketing-claim": "an advertised bound",
    "memory": "from memory, not seen in a source",
    "memory-unverified": "from memory, not seen in a source",
    "rounded-claim": "rounded to whole seconds",
    "secondary": "secondary: not read in the primary source",
    "secondary-summary": "secondary: not read in the primary source",
    "user-report": "one user's report",
}


def subject(key: str, record: Mapping[str, Any]) -> tables.Subject:
    """A published network, traced at the batch that was timed."""
    vector, macs, params = _class(record) if "diffusers_class" in record else _reference(record)
    if params != record.get("published_params", params):
        raise NasError(f"{key} has {params} parameters where {record['published_params']} are published")
    return tables.Subject(
        key=key,
        kind="reference",
        name=record["name"],
        spec={k: v for k, v in record.items() if k not in ("name", "note")},
        features=tables.feature_map(vector),
        macs=macs,
        params=params,
        note=record["note"],
    )


def _reference(record: Mapping[str, Any]) -> tuple[np.ndarray, int, int]:
    space = load_space(record["space"]).at_resolution(record["resolution_px"])
    published = space.find_reference(record["reference"])
    if published.text_width:
        space = space.with_text_width(published.text_width)
    traces = [block_trace(block, record["batch"]) for block in network(space.reference(record["reference"])).blocks]
    params = sum(trace.params for trace in traces)
    if published.params not in (None, params):
        raise NasError(f"{record['name']} has {params} parameters where {published.params} are published")
    vector = sum((features(trace.ops) for trace in traces), np.zeros_like(features(())))
    macs = sum(op.macs for trace in traces for op in trace.ops)
    if "pipeline" in record:
        shared, shared_macs = _once(record["pipeline"], space)
        vector, macs = vector + shared, macs + shared_macs
    return vector, macs, params


def _once(pipeline: Mapping[str, Any], space: SearchSpace) -> tuple[np.ndarray, int]:
    """What an image pays for once, as the share of one step: text encoders (batched) and decoder."""
    encoders = [components.text_encoder(name).trace for name in pipeline["text_encoders"]]
    decoder = components.decoder(pipeline["decoder"], space).trace
    charged: list[tuple[Trace | None, int]] = [(trace, pipeline["text_batch"]) for trace in encoders]
    total, macs = np.zeros_like(features(())), 0
    for trace, times in (*charged, (decoder, pipeline["images"])):
        if trace is None:
            raise NasError(f"a part of {pipeline} has no operators")
        total = total + times * features(trace.ops)
        macs += times * sum(op.macs for op in trace.ops)
    return total / pipeline["steps"], macs // pipeline["steps"]


def _class(record: Mapping[str, Any]) -> tuple[np.ndarray, int, int]:
    batch = record["batch"]
    with torch.device("meta"):
        module = getattr(diffusers, record["diffusers_class"])(**record["config"])
        inputs = {
            "sample": torch.empty(batch, *record["latent"]),
            "timestep": torch.empty(batch),
            "encoder_hidden_states": torch.empty(batch, *record["text"]),
        }
        if "image" in record:
            inputs["controlnet_cond"] = torch.empty(batch, *record["image"])
    found = module_trace(module, inputs)
    return features(found.ops), sum(op.macs for op in found.ops), found.params


def measurement(row: Mapping[str, str], known: Mapping[str, Any], accepts: Sequence[str]) -> tables.Measurement:
    """One published row in the form of a table; `accepts` are the qualities that its target's sheet fits anyway."""
    doubt = "" if row["quality"] in accepts else NOT_FITTED.get(row["quality"], "")
    excluded = "; ".join(filter(None, [row["excluded_because"], doubt]))
    if not excluded and row["network"] not in known:
        raise NasError(f"rows.csv uses {row['network']!r}, which networks.json does not have")
    fixed = row["component"] == "text_encoder" or row["network"] not in known
    return tables.Measurement(
        target=row["target"],
        subject=row["network"],
        subject_kind="component" if fixed else "reference",
        latency_ms=float(row["latency_ms"]),
        statistic="published",
        session="; ".join(filter(None, [row["device"], row["release"], _job(row["notes"])])),
        batch=int(row["batch"] or 1),
        device=row["device"],
        chip=row["chip"],
        resolution_px=int(row["resolution_px"]) if row["resolution_px"] else None,
        role=row["role"],
        source=f"{row['source']} ({row['quality']})",
        protocol=row["notes"] + ("" if row["batch"] else "; batch not stated"),
        environment=", ".join(filter(None, [row["runtime"], row["release"], row["compute_unit"], row["precision"]])),
        measured_at=row["published"],
        excluded_because=excluded,
    )


def _job(notes: str) -> str:
    """The measuring job that a row names: two jobs of one network on one device are two sessions."""
    words = notes.split("job ")
    return f"job {words[1].split(';')[0].split(' ')[0]}" if len(words) > 1 else ""


def write_tables(published: Path) -> tuple[str, ...]:
    """Rewrites every published table's rows, subjects and ratios; returns their slugs."""
    records = json.loads((published / "networks.json").read_text())
    traced = {key: subject(key, record) for key, record in records.items()}
    for one in traced.values():
        print(f"{one.name}: {one.params / 1e6:.1f} M parameters, {one.macs / 1e9:.1f} GMAC")
    accepts = {sheet.slug: sheet.protocol.get("accepts", ()) for sheet in list_targets()}
    with (published / "rows.csv").open(newline="") as stream:
        rows = [measurement(row, records, accepts[row["target"]]) for row in csv.DictReader(stream)]
    with (published / "ratios.csv").open(newline="") as stream:
        ladder = [(row.pop("target"), row) for row in csv.DictReader(stream)]
    slugs = tuple(sorted({row.target for row in rows}))
    for slug in slugs:
        mine = [row for row in rows if row.target == slug]
        pairs = [_ratio(row) for target, row in ladder if target == slug]
        keys = {row.subject for row in mine} | {key for pair in pairs for key in (pair.subject, pair.relative_to)}
        # The whole ladder stays together, so that every step can be predicted beside the published ones.
        keys |= {key for key in records if pairs and key.startswith("snapgen-ladder")}
        tables.write(slug, mine)
        tables.table_path(slug, ".subjects.json").unlink(missing_ok=True)
        tables.write_subjects(slug, [one for key, one in traced.items() if key in keys])
        if pairs:
            quotients.write(slug, pairs)
    return slugs


def _ratio(row: Mapping[str, str]) -> quotients.Ratio:
    return quotients.Ratio(**{**row, "ratio": float(row["ratio"]), "sd": float(row["sd"])})


def show(sheets: Sequence[DeviceSheet]) -> None:
    """Fits the sheets and prints what their cards say; a target that cannot be fitted says why."""
    for sheet in sheets:
        try:
            card = refit(sheet.slug).card
        except NasError as error:
            print(f"\n{sheet.slug}: no predictor: {error.message}")
            continue
        held = card["held_out"]
        covered = ", ".join(f"{name}: {c['measured']:.0%}" for name, c in held["coverage"].items())
        print(
            f"\n{sheet.slug} ({', '.join(sheet.aliases)}): {card['rows']} rows of {card['networks']} networks,"
            f" {card['excluded']} excluded, newest {card['newest']}\n"
            f"  held out: MAPE {held['mape']:.1%}, within 10 % {held['within_10']:.0%}; covered {covered}\n"
            f"  interval: {card['interval']['method']}, one sd {card['interval']['sd']:.1%}; ridge {card['ridge']}"
        )


def main() -> None:
    """Rewrites tables, then fits every target that rests on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit-only", action="store_true", help="leave the tables as they are")
    arguments = parser.parse_args()
    published = Path(data_dir("latency_tables")) / "published"
    if arguments.fit_only:
        with (published / "rows.csv").open(newline="") as stream:
            slugs: tuple[str, ...] = tuple({row["target"] for row in csv.DictReader(stream)})
    else:
        slugs = write_tables(published)
    show([sheet for sheet in list_targets() if sheet.slug in slugs or sheet.family in slugs])


if __name__ == "__main__":
    main()
