"""Which subjects: those that the table already has, then diverse blocks at full size and diverse small networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nas import families, registry, tables
from nas.measure.subjects import Subject, block_subject, network_subject, rebuilt
from nas.network import BlockSpec, Scale
from nas.op import FEATURES
from nas.space import SearchSpace

# Full-size blocks are drawn at the space's own resolution and at these shares of it: small feature maps make weights
# and call overhead visible, large ones the activations.
_RESOLUTION_DIVISORS = (1, 2, 4)
_CANDIDATES_FOR_BLOCKS = 30
# Networks of (width divisor, side of the latent). A divisor keeps the number of heads, so head and text width shrink.
_NETWORK_SCALES = ((4, 32), (4, 16), (2, 16), (4, 64), (2, 32))
# For targets whose limits leave nothing at the scales above.
_SMALLEST_SCALES = ((4, 8),)
# Families without small copies are measured as they are, on small latents.
_FULL_WIDTH_SIDES = (8, 16, 4)


def known_subjects(
    spaces: Sequence[SearchSpace],
    recorded: Mapping[str, tables.Subject],
    pixels: Mapping[str, int | None],
    *,
    batch: int,
) -> tuple[Subject, ...]:
    """The blocks and networks of `spaces` that a table already has, traced again: a later session must repeat them.

    `pixels` tells each one's resolution where its rows do.
    """
    names = {space.name for space in spaces}
    wanted = [s for s in recorded.values() if s.kind in ("block", "network") and s.spec.get("space") in names]
    found = [rebuilt(subject, pixels.get(subject.key), batch) for subject in wanted]
    return tuple(subject for subject in found if subject is not None)


def sample_blocks(
    space: SearchSpace, count: int, *, seed: int = 0, batch: int = 1, most_gmac: float = 6.0
) -> tuple[Subject, ...]:
    """`count` distinct blocks of the space, chosen to cover every block kind, every choice value and a wide range.

    Fewer than `count` where the space has fewer. Blocks of more than `most_gmac` are left out: a minute of measuring
    buys more small ones.
    """
    chosen: dict[str, Subject] = {}
    for turn, divisor in enumerate(_RESOLUTION_DIVISORS if count else ()):
        smaller = space.at_resolution(space.resolution_px // divisor)
        share = (count - len(chosen)) // (len(_RESOLUTION_DIVISORS) - turn)
        pool: dict[str, Subject] = {}
        tags: dict[str, set[tuple[str, Any]]] = {}
        for spec, choices in _blocks(smaller, seed):
            if spec.key not in pool and spec.key not in chosen:
                pool[spec.key] = block_subject(spec, space.name, smaller.resolution_px, batch)
                tags[spec.key] = {
                    ("kind", spec.kind),
                    *((f"{spec.kind}.{name}", value) for name, value in _forms(spec)),
                }
            if spec.key in pool:
                tags[spec.key] |= choices
        keys = [key for key, subject in pool.items() if subject.macs / 1e9 <= most_gmac]
        vectors = np.array([pool[key].features for key in keys]).reshape(len(keys), len(FEATURES))
        picked = diverse(log_scaled(vectors), [tags[key] for key in keys], share, seed)
        chosen.update((keys[i], pool[keys[i]]) for i in picked)
    return tuple(chosen.values())


def sample_networks(
    space: SearchSpace,
    count: int,
    *,
    seed: int = 0,
    batch: int = 1,
    least_gmac: float = 0.3,
    most_gmac: float = 12.0,
    most_mparams: float = 64.0,
) -> tuple[Subject, ...]:
    """`count` small networks: the space's references and diverse candidates, with widths and latent scaled down.

    References come first. Each is tried at several scales, beginning with another one each time, until it has between
    `least_gmac` and `most_gmac` and at most `most_mparams` million parameters; one that never has is passed over.
    """
    if not count:
        return ()
    references = [space.reference(reference.name) for reference in space.references]
    published = np.array([c.row for c in references], dtype=np.int64).reshape(-1, len(space.choices))
    rows = np.concatenate([published, space.sample(8 * count, seed)])
    sizes = np.array([max(len(choice.values) - 1, 1) for choice in space.choices])
    tags = [set(enumerate(row.tolist())) for row in rows]
    order = diverse(rows / sizes, tags, 3 * count, seed, first=len(references))
    chosen: dict[str, Subject] = {}
    for position, index in enumerate(order):
        if len(chosen) == count:
            break
        for subject in _sized(space, rows[index], position, batch):
            size = subject.macs / 1e9
            if least_gmac <= size <= most_gmac and subject.params <= most_mparams * 1e6 and subject.key not in chosen:
                chosen[subject.key] = subject
                break
    return tuple(chosen.values())


def _sized(space: SearchSpace, row: np.ndarray, turn: int, batch: int) -> Iterator[Subject]:
    """A candidate at one scale after another, beginning with the `turn`-th."""
    small = getattr(registry.load("nas.families", space.family), "NO_PROXY", None) is None
    scales = _NETWORK_SCALES if small else tuple((1, side) for side in _FULL_WIDTH_SIDES)
    start = turn % len(scales)
    for divisor, side in (*scales[start:], *scales[:start], *(_SMALLEST_SCALES if small else ())):
        px = side * space.input.pixels_per_latent
        if small:
            network = families.scaled(space.from_row(row), _scale(space, divisor, side))
        else:
            network = families.network(space.at_resolution(px).from_row(row))
        yield network_subject(network, space.name, px, batch)


def _blocks(space: SearchSpace, seed: int) -> Iterator[tuple[BlockSpec, set[tuple[str, Any]]]]:
    """Every block of some candidates, with the choice values that it was built under."""
    positions = families.positions(space)
    for row in space.sample(_CANDIDATES_FOR_BLOCKS, seed):
        values = space.from_row(row).values
        for position in positions:
            used = {name: values[name] for name in position.depends}
            for spec in position.blocks(used):
                yield spec, set(used.items())


def _forms(spec: BlockSpec) -> tuple[tuple[str, Any], ...]:
    """The settings of a block that change which operators it has, not how large they are."""
    return tuple((name, value) for name, value in spec.settings if isinstance(value, bool | str))


def _scale(space: SearchSpace, divisor: int, side: int) -> Scale:
    return Scale(
        width_divisor=divisor,
        head_width=int(space.fixed["head_width"]) // divisor,
        norm_groups=min(int(space.fixed["norm_groups"]), 64 // divisor),
        latent_channels=space.input.latent_channels,
        height=side,
        width=side,
        text_tokens=space.input.text_tokens or 0,
        text_width=(space.input.text_width or 0) // divisor,
    )


def log_scaled(vectors: np.ndarray) -> np.ndarray:
    """Features [n, F] on a scale on which a factor of two counts alike everywhere and zero stays apart."""
    present = np.where(vectors > 0, vectors, np.nan)
    if not len(vectors):
        return vectors
    low = np.nan_to_num(np.nanmin(np.where(np.isnan(present), np.inf, present), axis=0), posinf=1.0)
    logs = np.log1p(vectors / low)
    spread = logs.std(axis=0)
    return logs / np.where(spread > 0, spread, 1.0)


def diverse(points: np.ndarray, tags: Sequence[set[Any]], count: int, seed: int, first: int = 0) -> list[int]:
    """Indices of `count` diverse points.

    The `first` ones; then, until all tags are covered, those that bring most new tags, the farthest among equals; then
    always the point farthest from those chosen (maximin).
    """
    if not len(points):
        return []
    chosen = list(range(first)) or [int(np.random.default_rng(seed).integers(len(points)))]
    uncovered = set().union(*tags).difference(*(tags[i] for i in chosen))
    distance = np.min([np.linalg.norm(points - points[i], axis=1) for i in chosen], axis=0)
    while len(chosen) < min(count, len(points)):
        distance[chosen] = -1.0
        news = np.array([len(tag & uncovered) for tag in tags]) if uncovered else np.zeros(len(points))
        best = int(np.lexsort((distance, news))[-1])
        chosen.append(best)
        uncovered -= tags[best]
        distance = np.minimum(distance, np.linalg.norm(points - points[best], axis=1))
    return chosen
