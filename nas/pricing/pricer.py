"""Prices of many candidates by table look-up.

A position of a network depends on a few choices only (see `nas.network.Position`). All combinations of those choices
are enumerated once and each distinct block among them is traced once; after that a candidate's price is a sum of
table rows, and a million candidates are numpy gathers.

Summed features of one candidate may differ in the last digit between a short and a long list (the order of the sum);
whole numbers never do. A skip may be taken by one block only, which holds for every UNet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from nas import families
from nas.cost import Cost, bytes_per_element, cost
from nas.network import BlockSpec
from nas.op import FEATURES, features
from nas.pricing.slots import NONE, Index, Slot, grouped, slots
from nas.space import Candidate, SearchSpace
from nas.trace import block_trace

Progress = Callable[[int, int], None]

_CHUNK = 32_768  # rows priced at once: bounds memory to about 100 MB
_FEW = 4_096  # up to so many rows, only the blocks that occur in them are traced
_TRACED = 4  # bytes per element in a trace
_PARAMS, _MACS, _PEAK = range(3)


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What n candidates cost; element i is candidate i.

    Attributes:
        features: float64 [n, F] as of `nas.op.FEATURES` (bytes at float32, whatever the precision).
        params, macs, weight_bytes, peak_activation_bytes: int64 [n] as of `nas.cost.Cost`.
    """

    features: np.ndarray
    params: np.ndarray
    macs: np.ndarray
    weight_bytes: np.ndarray
    peak_activation_bytes: np.ndarray

    def of(self, some: np.ndarray) -> Prices:
        """Those of some candidates, by a mask [n] or by their places."""
        return Prices(**{f.name: getattr(self, f.name)[some] for f in fields(self)})

    def cost(self, i: int) -> Cost:
        """The cost of one candidate."""
        return Cost(
            params=int(self.params[i]),
            macs=int(self.macs[i]),
            weight_bytes=int(self.weight_bytes[i]),
            peak_activation_bytes=int(self.peak_activation_bytes[i]),
        )


@dataclass(frozen=True, kw_only=True)
class PricedBlock:
    """One block of a candidate, what it costs by itself, and its features [F]."""

    spec: BlockSpec
    cost: Cost
    features: np.ndarray


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Sums over the blocks of several slots, for each combination: features [count, F], params and MACs [count, 2]."""

    index: Index
    features: np.ndarray
    totals: np.ndarray


class Pricer:
    """Prices candidates of one space.

    Args:
        space: whose candidates.
        precision: what weights and activations are held in (`nas.cost.BYTES_PER_ELEMENT`).

    Raises:
        UsageError: unknown precision.
    """

    def __init__(self, space: SearchSpace, precision: str = "fp32") -> None:
        self.space = space
        self.precision = precision
        self._weight_bytes, self._activation_bytes = bytes_per_element(precision)

    def prepare(self, progress: Progress | None = None) -> None:
        """Traces every block of the space: about half a minute the first time, later from the cache in seconds.

        Args:
            progress: called with (blocks done, blocks in all) after each.
        """
        self._trace(np.arange(len(self._specs)), progress)

    def rows(self, rows: np.ndarray) -> Prices:
        """The prices of rows [n, choices] of the space, canonical as `SearchSpace.sample` gives them."""
        parts = list(self.chunks(rows))
        if len(parts) == 1:
            return parts[0]
        return Prices(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Prices)})

    def chunks(self, rows: np.ndarray, size: int = _CHUNK) -> Iterator[Prices]:
        """The same in pieces of at most `size` rows (at least one piece), to spare the memory of a long list."""
        rows = np.asarray(rows)
        if len(rows) > _FEW:
            self.prepare()
        for start in range(0, max(len(rows), 1), size):
            yield self._price(rows[start : start + size], whole_tables=len(rows) > _FEW)

    def candidate(self, candidate: Candidate) -> Cost:
        """The cost of one candidate."""
        return self.rows(np.asarray(candidate.row)[None]).cost(0)

    def blocks(self, candidate: Candidate) -> list[PricedBlock]:
        """The candidate's blocks in execution order; params, MACs and features add up to the candidate's."""
        priced = []
        for spec in families.network(candidate).blocks:
            trace = block_trace(spec)
            own = cost(trace.ops, trace.peak_bytes, self.precision)
            priced.append(PricedBlock(spec=spec, cost=own, features=features(trace.ops)))
        return priced

    # Structure, and one line of numbers per distinct block

    @cached_property
    def _structure(self) -> tuple[tuple[Slot, ...], tuple[BlockSpec, ...]]:
        return slots(self.space)

    @property
    def _slots(self) -> tuple[Slot, ...]:
        return self._structure[0]

    @property
    def _specs(self) -> tuple[BlockSpec, ...]:
        return self._structure[1]

    # The last line of both stands for "no block": index NONE finds it.
    @cached_property
    def _block_features(self) -> np.ndarray:
        return np.zeros((len(self._specs) + 1, len(FEATURES)))

    @cached_property
    def _block_totals(self) -> np.ndarray:
        return np.zeros((len(self._specs) + 1, 3), dtype=np.int64)

    @cached_property
    def _traced(self) -> np.ndarray:
        return np.zeros(len(self._specs), dtype=bool)

    def _trace(self, blocks: np.ndarray, progress: Progress | None = None) -> None:
        for done, i in enumerate(blocks, start=1):
            if not self._traced[i]:
                trace = block_trace(self._specs[i])
                self._block_features[i] = features(trace.ops)
                self._block_totals[i] = (trace.params, trace.macs, trace.peak_bytes)
                self._traced[i] = True
            if progress is not None:
                progress(done, len(blocks))

    @cached_property
    def _tables(self) -> tuple[_Table, ...]:
        tables = []
        for index, members in grouped([slot.index for slot in self._slots]):
            blocks = self._blocks_at(self._entries(index.rows(len(self.space.choices))), members)
            tables.append(
                _Table(
                    index=index,
                    features=_total(self._block_features, blocks),
                    totals=_total(self._block_totals[:, :_PEAK], blocks),
                )
            )
        return tuple(tables)

    # Prices

    def _entries(self, rows: np.ndarray) -> dict[Index, np.ndarray]:
        """The combination [n] that each row has under every index in use; slots share them."""
        rows = np.asfortranarray(rows)  # read by column
        return {index: index.of(rows) for index in {slot.index for slot in self._slots}}

    def _blocks_at(self, entries: dict[Index, np.ndarray], members: Sequence[int]) -> np.ndarray:
        """Distinct-block indices [members, n] of some slots."""
        return np.stack([self._slots[i].block[entries[self._slots[i].index]] for i in members])

    def _price(self, rows: np.ndarray, *, whole_tables: bool) -> Prices:
        rows = rows.reshape(len(rows), len(self.space.choices))
        entries = self._entries(rows)
        blocks = self._blocks_at(entries, range(len(self._slots)))
        if whole_tables:
            summed, totals = np.zeros((len(rows), len(FEATURES))), np.zeros((len(rows), 2), dtype=np.int64)
            for table in self._tables:
                summed += table.features[entries[table.index]]
                totals += table.totals[entries[table.index]]
        else:
            used = np.unique(blocks)
            self._trace(used[used != NONE])
            summed, totals = _total(self._block_features, blocks), _total(self._block_totals[:, :_PEAK], blocks)
        peak = self._peak(entries, self._block_totals[:, _PEAK][blocks])
        return Prices(
            features=summed,
            params=totals[:, _PARAMS],
            macs=totals[:, _MACS],
            weight_bytes=totals[:, _PARAMS] * self._weight_bytes,
            peak_activation_bytes=peak // _TRACED * self._activation_bytes,
        )

    def _peak(self, entries: dict[Index, np.ndarray], own: np.ndarray) -> np.ndarray:
        """`nas.cost.network_peak_bytes` of each row, from the peaks [slots, n] of its blocks alone: int64 [n]."""
        count, n = own.shape
        on_path = np.stack([slot.on_path[entries[slot.index]] for slot in self._slots])
        # The next block on the path takes a slot's output as x, and counts it; it is held from the one after that.
        reader = np.empty((count, n), dtype=np.int16)
        following = np.full(n, count, dtype=np.int16)
        for s in reversed(range(count)):
            reader[s] = following
            following[on_path[s]] = s
        change = np.zeros((count + 2, n), dtype=np.int64)
        for s, slot in enumerate(self._slots):
            if slot.skipped.any():
                source, size = slot.source[entries[slot.index]], slot.skipped[entries[slot.index]]
                start = reader[source, np.arange(n)] + 1
                kept = np.flatnonzero((source != NONE) & (start < s))
                change[start[kept], kept] += size[kept]
                change[s, kept] -= size[kept]
        held = np.cumsum(change, axis=0)[:count]
        return np.where(on_path, own + held, own).max(axis=0, initial=0)


def _total(table: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Sums the lines of `table` that each column of `blocks` [slots, n] names: [n, columns]."""
    total = np.zeros((blocks.shape[1], table.shape[1]), dtype=table.dtype)
    for line in blocks:
        total += table[line]
    return total
