"""Weight sharing: one super-network is trained with candidates drawn at random, and each candidate is a slice of it.

One-shot search (Guo et al. 2020, arXiv 1904.00420; Cai et al. 2020, arXiv 1908.09791). What takes long, such as
following the caption, is learnt once for all candidates; a score then costs a few steps of recovery, or none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from nas.bench import Bench, Stop
from nas.proxies import OnProgress, Score
from nas.proxies._oneshot import read, train
from nas.proxies._shared import once_per_seed, shared_path, trained
from nas.space import Candidate, SearchSpace

SUMMARY: Final = "a slice of a super-network that all candidates of the space share, trained on for a few steps"
UNIT: Final = "dB"
DEFAULTS: Final[dict[str, Any]] = {"shared_steps": 400, "steps": 6, "lr": 6e-3}

_VERSION = 1  # raise it when the super-networks that this code trains change


def store_path(space: SearchSpace, bench: Bench, seed: int) -> Path:
    """The file of a space's super-network; another teacher, space or setting has another."""
    return shared_path("supernets", space, bench, seed, _VERSION)


def prepare(space: SearchSpace, bench: Bench, on_progress: OnProgress | None = None) -> None:
    """Trains the space's super-network, one per seed of the settings, unless it is there.

    Raises:
        NasError: no shared steps, or training diverged.
    """
    once_per_seed(
        bench,
        lambda seed: store_path(space, bench, seed),
        lambda path, seed, told: train(path, space, bench, seed, told),
        on_progress,
    )


def score(candidate: Candidate, bench: Bench, stop: Stop | None = None) -> Score:
    """Takes the candidate's slices, trains them for the settings' steps and judges them on the held-out rows.

    Parameters that the super-network has nothing for start from the network's own random weights.

    Raises:
        Stopped: `stop` gave a reason; it is asked about the first seed.
        NasError: the candidate cannot be scaled down, or its training diverged.
    """
    prepare(candidate.space, bench)
    stores = {seed: read(store_path(candidate.space, bench, seed)) for seed in bench.settings.seeds}
    return trained(candidate, bench, stop, lambda network, seed: stores[seed].load(network))
