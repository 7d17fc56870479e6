"""Inherit, then recover: the candidate starts from the weights of one trained parent and is trained for a few steps.

As published small networks were made (BK-SDM, arXiv 2305.15798; KOALA, arXiv 2312.04005), for spaces whose candidates
are sub-networks of a parent. The parent is the space's largest candidate. Blocks of another kind than the parent's
inherit nothing, which counts against a candidate that has them: see `inherited_share`.
"""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any, Final

from nas.bench import Bench, Stop, learning_rate, one_thread
from nas.build import Network
from nas.checkpoint import load_network, save_network
from nas.distill import Checkpoints, train
from nas.inherit import Report, inherit
from nas.network import NetworkSpec
from nas.proxies import OnProgress, Score
from nas.proxies._shared import (
    CHECKPOINT_EVERY,
    largest,
    network_of,
    once_per_seed,
    shared_path,
    trained,
    training,
)
from nas.space import Candidate, SearchSpace

SUMMARY: Final = "a small copy that inherits from the trained largest one of its space, trained on for a few steps"
UNIT: Final = "dB"
DEFAULTS: Final[dict[str, Any]] = {"shared_steps": 200, "steps": 8, "lr": 6e-3}

_VERSION = 1  # raise it when the parents that this code trains change


def parent_path(space: SearchSpace, bench: Bench, seed: int) -> Path:
    """The file of a space's parent; another teacher, space or setting has another."""
    return shared_path("parents", space, bench, seed, _VERSION)


def prepare(space: SearchSpace, bench: Bench, on_progress: OnProgress | None = None) -> None:
    """Trains the small copy of the space's largest candidate, one per seed of the settings, unless it is there.

    Raises:
        NasError: no shared steps, or training diverged.
    """
    once_per_seed(
        bench,
        lambda seed: parent_path(space, bench, seed),
        lambda path, seed, told: _train(path, space, bench, seed, told),
        on_progress,
    )


def score(candidate: Candidate, bench: Bench, stop: Stop | None = None) -> Score:
    """Inherits what the candidate can, trains it for the settings' steps and judges it on the held-out rows.

    Raises:
        Stopped: `stop` gave a reason; it is asked about the first seed.
        NasError: the candidate cannot be scaled down, or its training diverged.
    """
    prepare(candidate.space, bench)
    parents = {seed: _read(parent_path(candidate.space, bench, seed)) for seed in bench.settings.seeds}

    def start(network: Network, seed: int) -> None:
        state, _ = inherit(network.spec, parents[seed].spec, parents[seed].state_dict(), seed=seed)
        network.load_state_dict(state)

    return trained(candidate, bench, stop, start)


def inherited_share(candidate: Candidate, bench: Bench) -> float:
    """Which share of a small copy's parameters comes from the parent, in [0, 1]; trains the parent if need be."""
    prepare(candidate.space, bench)
    parent = _read(parent_path(candidate.space, bench, bench.settings.seeds[0]))
    report = _report(bench.spec(candidate), parent)
    return 1 - report.params("new") / sum(report.params(what) for what in ("copied", "sliced", "new"))


def _report(spec: NetworkSpec, parent: Network) -> Report:
    return inherit(spec, parent.spec, parent.state_dict())[1]


@functools.lru_cache(maxsize=4)
def _read(path: Path) -> Network:
    return load_network(path)


def _train(path: Path, space: SearchSpace, bench: Bench, seed: int, on_progress: OnProgress | None = None) -> None:
    """Trains a parent and writes its averaged weights; taken up where a killed run saved it last."""
    settings = training(bench)
    spec = bench.spec(largest(space, bench))
    folder = path.with_suffix(".partial")
    with one_thread():
        taught = train(
            bench.student(spec, seed),
            bench.data,
            settings.objectives,
            settings.schedule(learning_rate(spec, settings)),
            teacher=bench.asked,
            checkpoints=Checkpoints(folder=folder, every=CHECKPOINT_EVERY, identity=path.stem),
            on_progress=None if on_progress is None else lambda way: on_progress(way[-1].step, way[-1].steps),
            report_every=1,
        ).average
    save_network(path, network_of(taught), {"space": space.name, "shared_steps": settings.steps, "seed": seed})
    shutil.rmtree(folder, ignore_errors=True)
