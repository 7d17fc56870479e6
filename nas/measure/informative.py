"""Which few networks tell most about a target, when another target's predictor is to be adapted to it.

A source's costs are right in kind and wrong in proportion, so what must be seen is how fast the target does what
networks spend their time on: networks are chosen that others are near to, in where the source spends its time. Networks
far from all others (a tiny decoder, say) tell about themselves only: beginning with those, five measurements predicted
OpenVINO far worse than five that are near to many (docs/log.md, `python benchmarks/latency_transfer.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nas import tables
from nas.device import DeviceSheet
from nas.errors import NasError
from nas.latency import load_predictor
from nas.measure.choosing import limits_of
from nas.measure.subjects import Subject, rebuilt
from nas.op import FEATURES, KINDS

_OF_KIND = np.array([[name.partition(".")[0] == kind for kind in KINDS] for name in FEATURES], dtype=float)


def adapting_subjects(
    target: DeviceSheet, source: DeviceSheet, count: int, folder: str | Path | None = None
) -> tuple[Subject, ...]:
    """The `count` networks of the source's table that tell most about the target; what it has already comes first.

    Raises:
        NasError: the source has no predictor, or too few networks that can be built and are within the target's limits.
    """
    if source.slug == target.slug:
        raise NasError(f"{target.slug} cannot be adapted from itself", hint="nas devices")
    costs = load_predictor(source.slug, folder).coefficients
    limits = limits_of(target)
    pixels = {row.subject: row.resolution_px for row in tables.read(source.slug, folder)}
    had = {row.subject for row in tables.read(target.slug, folder) if row.used}
    pool = {
        key: subject
        for key, subject in tables.subjects(source.slug, folder).items()
        if subject.features
        and subject.macs / 1e9 <= limits.most_network_gmac
        and subject.params / 1e6 <= limits.most_network_mparams
        and ("blocks" in subject.spec or (subject.kind == "reference" and {"space", "reference"} <= set(subject.spec)))
    }
    if len(pool) < count:
        raise NasError(
            f"the table of {source.slug} has {len(pool)} networks that can be built and are within the limits of"
            f" {target.slug} ({limits.most_network_gmac:g} GMAC, {limits.most_network_mparams:g} M parameters);"
            f" {count} are asked for",
            hint="adapt from a target that was measured densely, such as cpu-onnxruntime",
        )
    chosen = informative(pool, costs, count, [key for key in pool if key in had])
    found = [rebuilt(pool[key], pixels.get(key), target.target.batch) for key in chosen]
    return tuple(subject for subject in found if subject is not None)


def informative(
    pool: Mapping[str, tables.Subject], costs: np.ndarray, count: int, had: Sequence[str] = ()
) -> tuple[str, ...]:
    """Keys of `count` networks of `pool`, near to all in their shares of time by kind of operator and in their size.

    Args:
        pool: networks with features, by key.
        costs: [F] ms per unit of each feature, of the source.
        count: how many.
        had: keys that are taken first.

    Returns:
        First those of `had`; then always the network that brings the networks of the pool nearest to a chosen one, by
        the sum of their distances (greedy k-medoids).
    """
    first = [key for key in pool if key in set(had)][:count]
    keys = [*first, *(key for key in sorted(pool) if key not in set(first))]
    vectors = np.array([pool[key].vector for key in keys])
    by_kind = (vectors * costs) @ _OF_KIND  # [n, kinds] in ms
    total = by_kind.sum(axis=1, keepdims=True)
    size = np.log(total)
    # Shares of time go from 0 to 1; size is put on the scale of one, so that neither decides alone.
    points = np.hstack([by_kind / total, (size - size.min()) / max(float(np.ptp(size)), 1e-9)])
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    chosen = list(range(len(first)))
    nearest = apart[:, chosen].min(axis=1, initial=np.inf)
    while len(chosen) < min(count, len(keys)):
        left = np.minimum(nearest[:, None], apart).sum(axis=0)  # [n] what remains after each choice
        left[chosen] = np.inf
        chosen.append(int(np.argmin(left)))
        nearest = np.minimum(nearest, apart[:, chosen[-1]])
    return tuple(keys[i] for i in chosen)
