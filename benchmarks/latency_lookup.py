"""Times every block of some held-out networks, and the networks: python benchmarks/latency_lookup.py [TARGET].

What a look-up table would add up. The networks are the first of those that benchmarks/latency_predictors.py holds out;
rows go to reports/benchmarks/lookup/, by the same protocol and in one session, and the same command resumes.
"""

from __future__ import annotations

import argparse
import datetime
from dataclasses import replace

import numpy as np
import torch
from latency_predictors import HELD_OUT, REPORTS

from nas import measure, registry, tables
from nas.device import find_target
from nas.latency.problem import problem
from nas.measure.session import Session, began, pick_anchors
from nas.measure.subjects import Subject, block_subject, network_subject
from nas.network import NetworkSpec
from nas.paths import atomic_write


def held_out_networks(slug: str, count: int) -> list[NetworkSpec]:
    """The first held-out networks of the table, in the order in which they are drawn."""
    sheet = find_target(slug)
    posed, seen = problem(tables.read(slug), tables.subjects(slug), sheet)
    # The anchors, measured with every group, have far more.
    most = int(np.median([len(o.session_ms) for o in seen if o.kind == "network"]))
    repeated = {o.subject for o in seen if o.kind == "network" and len(o.session_ms) >= most}
    networks = np.flatnonzero(posed.networks != "")
    order = [i for i in np.random.default_rng(0).permutation(networks) if posed.networks[i] in repeated]
    subjects = tables.subjects(slug)
    return [NetworkSpec.from_json(subjects[str(posed.networks[i])].spec) for i in order[:HELD_OUT][:count]]


def distinct(networks: list[NetworkSpec], batch: int) -> tuple[Subject, ...]:
    """The networks and all their distinct blocks."""
    blocks = {block.key: block for network in networks for block in network.blocks}
    space = "held-out"
    return (
        *(network_subject(network, space, None, batch) for network in networks),
        *(block_subject(block, space, None, batch) for block in blocks.values()),
    )


def main() -> None:
    """Measures what is not measured yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", default="cpu-onnxruntime")
    parser.add_argument("--networks", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sheet = find_target(arguments.target)
    subjects = distinct(held_out_networks(sheet.slug, arguments.networks), sheet.target.batch)
    folder = REPORTS / "lookup"
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / f"{sheet.slug}.toml", sheet.path.read_text())
    protocol, _ = measure.settings(sheet)
    done = {row.subject for row in tables.read(sheet.slug, folder) if row.used}
    left = [s for s in subjects if s.key not in done]
    print(f"{len(subjects)} subjects, {len(left)} to measure", flush=True)
    if not left:
        return
    session = Session(
        name=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        sheet=sheet,
        backend=registry.load("nas.backends", str(sheet.backend)),
        protocol=replace(protocol, group=24),
        anchors=pick_anchors([s for s in subjects if s.kind == "network"]),
        seed=0,
    )
    for rows, message, count in session.measure(left):
        tables.append(sheet.slug, rows, folder)
        print(f"{count} of {len(left)}: {message}", flush=True)
    print(f"{len({began(r.session) for r in tables.read(sheet.slug, folder)})} sessions in {folder}")


if __name__ == "__main__":
    main()
