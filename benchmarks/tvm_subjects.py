"""The networks and blocks of the TVM tables, which share their kernels, and the tuning of those kernels.

python benchmarks/tvm_subjects.py [--trials 8]: tunes every distinct kernel once and prints how many there are.

Tuning a kernel takes seconds to minutes, so the candidates differ in depth, attention and kind of convolution, not in
width: sixteen networks and their blocks come down to some seventy kernels.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from nas import families
from nas.device import find_target
from nas.exporters.tvm import records
from nas.exporters.tvm.lowering import fuse
from nas.exporters.tvm.machine import host, identity, make_target
from nas.exporters.tvm.tuning import Effort, tune
from nas.measure.subjects import Subject, block_subject, network_subject
from nas.network import BlockSpec, Scale
from nas.paths import data_dir
from nas.space import load_space

NETWORKS = 16
LATENT_SIDE = 16
WIDTH_DIVISOR = 4
FIXED = {
    "width_0": 128,
    "width_1": 256,
    "width_2": 512,
    "attention": "mha",
    "qk_norm": "none",
    "positions": "none",
    "ffn_ratio": 2,
    "conv_1": "full",
    "up_depth_0": 0,
}
VARIED = {
    "resnets_0": (1, 2),
    "resnets_1": (1, 2),
    "resnets_2": (1, 2),
    "conv_0": ("full", "separable-1"),
    "conv_2": ("full", "separable-1"),
    "depth_0": (0, 1),
    "depth_1": (0, 1, 2),
    "depth_2": (1, 2, 4),
    "self_attention_1": (False, True),
    "self_attention_2": (False, True),
}


def subjects(count: int = NETWORKS) -> tuple[tuple[Subject, ...], tuple[Subject, ...]]:
    """The distinct blocks of the first `count` networks, and these networks."""
    space = load_space("snapgen_unet")
    px = LATENT_SIDE * space.input.pixels_per_latent
    scale = Scale(
        width_divisor=WIDTH_DIVISOR,
        head_width=int(space.fixed["head_width"]) // WIDTH_DIVISOR,
        norm_groups=16,
        latent_channels=space.input.latent_channels,
        height=LATENT_SIDE,
        width=LATENT_SIDE,
        text_tokens=space.input.text_tokens or 0,
        text_width=(space.input.text_width or 0) // WIDTH_DIVISOR,
    )
    generator = np.random.default_rng(0)
    networks: dict[str, Subject] = {}
    blocks: dict[str, BlockSpec] = {}
    while len(networks) < count:
        drawn = {name: values[generator.integers(len(values))] for name, values in VARIED.items()}
        network = families.scaled(space.candidate(**{**FIXED, **drawn}), scale)
        networks.setdefault(network.key, network_subject(network, space.name, px, 1))
        for block in network.blocks:
            blocks.setdefault(block.key, block)
    return tuple(block_subject(block, space.name, px, 1) for block in blocks.values()), tuple(networks.values())


def kernels(found: tuple[Subject, ...], threads: int = 1) -> dict[str, object]:
    """The distinct kernels worth tuning of some subjects, by "place in the list: name"."""
    target = make_target(None, threads)
    seen: set[str] = set()
    distinct: dict[str, object] = {}
    for place, subject in enumerate(found):
        torch.manual_seed(0)
        for name, task in fuse(*subject.build(1), target).tasks.items():
            key = records.kernel_hash(task)
            if key not in seen:
                seen.add(key)
                distinct[f"{place}:{name}"] = task
    return distinct


def main() -> None:
    """Tunes what has no record yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="also those that have a record")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    sheet = find_target("cpu-tvm")
    path = Path(data_dir("latency_tables")) / f"{sheet.slug}.records.jsonl"
    began = time.perf_counter()
    blocks, networks = subjects()
    tasks = kernels(blocks)
    table = host(sheet.target.threads)
    machine = identity(make_target(table, sheet.target.threads))
    todo = tasks if arguments.again else records.database(tasks, records.read(path, machine))[1]
    logging.info("%d networks, %d blocks, %d kernels, %d to tune", len(networks), len(blocks), len(tasks), len(todo))
    tune(todo, path, target=table, machine=machine, effort=Effort(trials=arguments.trials, seed=arguments.seed))
    found = records.read(path, machine)
    left = len(records.database(tasks, found)[1])
    # The place in the list told equal names apart; a record is found by its kernel's hash.
    plain = {key: replace(record, name=record.name.rpartition(":")[2]) for key, record in found.items()}
    records.write(path, plain, machine)
    print(
        f"{len(tasks) - left} of {len(tasks)} kernels tuned, {len(found)} records, {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
