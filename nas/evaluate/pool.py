"""The candidates that a sampler may choose from: priced, within every constraint, with what a surrogate may read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nas.evaluate.constraints import Constraint, DeviceBudget
from nas.op import FEATURES, KINDS, MULTIPLYING
from nas.pricing import Pricer, Prices, changed
from nas.space import SearchSpace

# Rows [n, choices], predicted milliseconds [n], features [n, f].
Pool = tuple[np.ndarray, np.ndarray, np.ndarray]

_PROBE = 20_000
_MOST_DRAWN = 3  # times as many rows are drawn as are wanted, before the pool is grown from those that fit
_LISTED = 4_000_000  # combinations that can be gone through for the candidates among them
_GROWN_FROM = 512  # rows whose neighbours are looked at in one go,
_GOES = 16  # and how often
_PARTS = {
    kind: np.array([name in (f"{kind}.bytes", f"{kind}.read", f"{kind}.written") for name in FEATURES])
    for kind in KINDS
}
_MACS = {kind: np.array([name in (f"{kind}.macs", f"{kind}.few_macs") for name in FEATURES]) for kind in MULTIPLYING}


def within(constraints: Sequence[Constraint], prices: Prices) -> np.ndarray:
    """[n] True where every constraint is met."""
    good = np.ones(len(prices.params), dtype=bool)
    for constraint in constraints:
        good &= constraint.values(prices) <= constraint.most
    return good


def readable(prices: Prices) -> np.ndarray:
    """What a surrogate of quality may read besides the choices: of the network alone, whatever the device.

    Returns:
        float64 [n, f]: log2 of parameters, MACs, bytes moved and peak activation bytes; then for each kind of operator
        log2(1 + megabytes moved) and, where it multiplies, log2(1 + mega-MACs).
    """
    moved = {kind: 1e3 * prices.features[:, part].sum(axis=1) for kind, part in _PARTS.items()}
    macs = [1e3 * prices.features[:, part].sum(axis=1) for part in _MACS.values()]
    whole = [prices.params, prices.macs, 1e6 * sum(moved.values()), prices.peak_activation_bytes]
    columns = [np.log2(np.maximum(each, 1.0)) for each in whole]
    columns += [np.log2(1.0 + each) for each in (*moved.values(), *macs)]
    return np.stack(columns, axis=1)


def drawn(
    pricer: Pricer, axis: DeviceBudget, constraints: Sequence[Constraint], n: int, seed: int, start: np.ndarray
) -> Pool:
    """At most `n` candidates within every constraint: all of them where the space is small enough to be listed.

    Of a larger space rows are drawn uniformly until `n` of them fit. Where few fit, the rest are neighbours of those,
    and of their neighbours: such a pool leans towards where the search started to look.

    Args:
        pricer: of the space.
        axis: whose predicted milliseconds are given.
        constraints: all of them.
        n: how many are wanted; a space of up to twice as many candidates is listed whole.
        seed: of the drawing.
        start: a row [choices] that fits, to grow from where no drawn one does.
    """
    space = pricer.space
    if space.size <= 2 * n or (space.size <= _LISTED and space.count is not None and space.count <= 2 * n):
        return kept(pricer, axis, constraints, space.sample(space.size, seed))
    probe = space.sample(min(_PROBE, n), seed)
    fitting = kept(pricer, axis, constraints, probe)
    if len(fitting[0]):
        wanted = int(min(1.1 * n * len(probe) / len(fitting[0]), _MOST_DRAWN * n))
        found = kept(pricer, axis, constraints, space.sample(max(wanted, n), seed))
    else:
        found = kept(pricer, axis, constraints, np.asarray(start)[None])
    grown = _grown(pricer, axis, constraints, found, n, seed) if len(found[0]) < n else found
    return grown[0][:n], grown[1][:n], grown[2][:n]


def neighbours(
    pricer: Pricer, axis: DeviceBudget, constraints: Sequence[Constraint], rows: np.ndarray, seed: int
) -> Pool:
    """The candidates within every constraint that differ from one of `rows` [n, choices] in one choice or in two.

    All single changes, and as many double ones drawn with `seed`; none of `rows` itself.
    """
    space = pricer.space
    once = changed(space, np.asarray(rows))
    twice = _one_more(space, once, np.random.default_rng(seed))
    return kept(pricer, axis, constraints, _new(np.concatenate([once, twice]), np.asarray(rows)))


def kept(pricer: Pricer, axis: DeviceBudget, constraints: Sequence[Constraint], rows: np.ndarray) -> Pool:
    """Those of `rows` that are within every constraint, in their order."""
    parts: list[Pool] = []
    at = 0
    for prices in pricer.chunks(rows):
        here = rows[at : at + len(prices.params)]
        at += len(here)
        good = within(constraints, prices)
        prices = prices.of(good)
        parts.append((here[good], axis.expected_ms(prices), readable(prices)))
    chosen, ms, features = zip(*parts, strict=True)
    return np.concatenate(chosen), np.concatenate(ms), np.concatenate(features)


def _grown(
    pricer: Pricer, axis: DeviceBudget, constraints: Sequence[Constraint], found: Pool, n: int, seed: int
) -> Pool:
    """`found` and neighbours of it, breadth first, until there are `n`, no new one fits, or it takes too long."""
    edge, step = found[0], 0
    while len(found[0]) < n and len(edge) and step < _GOES:
        new, ms, features = neighbours(pricer, axis, constraints, edge[:_GROWN_FROM], seed + step)
        fresh = _unlike(new, found[0])
        found = (
            np.concatenate([found[0], new[fresh]]),
            np.concatenate([found[1], ms[fresh]]),
            np.concatenate([found[2], features[fresh]]),
        )
        edge, step = np.concatenate([edge[_GROWN_FROM:], new[fresh]]), step + 1
    return found


def _one_more(space: SearchSpace, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Each row with one more choice set at random: the allowed ones, canonical."""
    sizes = np.array([len(choice.values) for choice in space.choices])
    column = generator.integers(len(sizes), size=len(rows))
    again = rows.copy()
    again[np.arange(len(rows)), column] = generator.integers(sizes[column])
    again = space.canonical(again)
    return again[space.allowed(again)]


def _new(rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The distinct ones of `rows` that are not in `known`, each at its first place."""
    _, first = np.unique(_numbers(rows), return_index=True)
    distinct = rows[np.sort(first)]
    return distinct[_unlike(distinct, known)]


def _unlike(rows: np.ndarray, known: np.ndarray) -> np.ndarray:
    """[n] True where a row is none of `known`."""
    return ~np.isin(_numbers(rows), _numbers(known))


def _numbers(rows: np.ndarray) -> np.ndarray:
    """int64 [n]: one number per row; rows that differ have different ones, but for one chance in 2^63."""
    factors = np.random.default_rng(0).integers(1, 2**62, size=rows.shape[1], dtype=np.int64) * 2 + 1
    return np.asarray(rows, dtype=np.int64) @ factors
