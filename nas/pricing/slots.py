"""Which block stands where, for every combination of the choices that its place depends on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nas import families
from nas.cost import skip_bytes, takes_x
from nas.errors import NasError
from nas.network import BlockSpec, Position
from nas.space import SearchSpace

NONE = -1


@dataclass(frozen=True, kw_only=True)
class Index:
    """Numbers the combinations of a few choices: the mixed-radix number of their value indices.

    Attributes:
        columns: the choices' columns in a row.
        sizes: how many values each has.
    """

    columns: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of combinations."""
        return int(np.prod(self.sizes, dtype=np.int64))

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Combination [n] of each row [n, choices]."""
        entry = np.zeros(len(rows), dtype=np.int64)
        for column, size in zip(self.columns, self.sizes, strict=True):
            entry = entry * size + rows[:, column]
        return entry

    def rows(self, choices: int) -> np.ndarray:
        """One row [count, choices] per combination, 0 in every other column."""
        rows = np.zeros((self.count, choices), dtype=np.int64)
        if self.columns:
            rows[:, self.columns] = np.stack(np.unravel_index(np.arange(self.count), self.sizes), axis=1)
        return rows


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place that holds at most one block.

    Attributes:
        index: the combinations it depends on; every array below has one element for each.
        block: int32, which of the space's distinct blocks stands there, or `NONE`.
        on_path: bool, whether a block that takes x stands there.
        source: int16, the slot whose output the block takes as skip, or `NONE`.
        skipped: int64, bytes of that output at float32.
    """

    index: Index
    block: np.ndarray
    on_path: np.ndarray
    source: np.ndarray
    skipped: np.ndarray


def slots(space: SearchSpace) -> tuple[tuple[Slot, ...], tuple[BlockSpec, ...]]:
    """The slots of a space in execution order, and its distinct blocks (one spec per signature).

    Raises:
        NasError: a block's place in the order depends on choices that its position does not, or a skip comes from
            nowhere: the family breaks the contract of `nas.network.Position`.
    """
    distinct: dict[object, int] = {}
    specs: list[BlockSpec] = []
    slot_of: dict[str, set[int]] = {}
    found: list[Slot] = []
    for position in families.positions(space):
        index = _index(space, position)
        combinations = [position.blocks(values) for values in _combinations(space, position)]
        for k in range(max(map(len, combinations), default=0)):
            column = [blocks[k] if k < len(blocks) else None for blocks in combinations]
            for spec in filter(None, column):
                if spec.signature not in distinct:
                    distinct[spec.signature] = len(specs)
                    specs.append(spec)
                slot_of.setdefault(spec.name, set()).add(len(found))
            found.append(_slot(index, column, distinct, slot_of))
    return tuple(found), tuple(specs)


def _index(space: SearchSpace, position: Position) -> Index:
    columns = tuple(space.column[name] for name in position.depends)
    return Index(columns=columns, sizes=tuple(len(space.choices[c].values) for c in columns))


def _combinations(space: SearchSpace, position: Position) -> list[dict[str, bool | int | float | str]]:
    values = itertools.product(*(space.choice(name).values for name in position.depends))
    return [dict(zip(position.depends, combination, strict=True)) for combination in values]


def _slot(
    index: Index, column: Sequence[BlockSpec | None], distinct: dict[object, int], slot_of: dict[str, set[int]]
) -> Slot:
    def source(spec: BlockSpec | None) -> int:
        if spec is None or spec.skip is None:
            return NONE
        places = slot_of.get(spec.skip, set())
        if len(places) != 1:
            wrong = "stands in more than one place" if places else "no earlier position makes"
            raise NasError(f"block {spec.name!r} skips from {spec.skip!r}, which {wrong}")
        return next(iter(places))

    return Slot(
        index=index,
        block=np.array([NONE if s is None else distinct[s.signature] for s in column], dtype=np.int32),
        on_path=np.array([s is not None and takes_x(s) for s in column], dtype=bool),
        source=np.array([source(s) for s in column], dtype=np.int16),
        skipped=np.array([0 if s is None else skip_bytes(s) for s in column], dtype=np.int64),
    )


def grouped(indices: Sequence[Index]) -> list[tuple[Index, list[int]]]:
    """Slots that can share one summed table: those whose choices are among the choices of the largest of them."""
    groups: list[tuple[Index, list[int]]] = []
    for i in sorted(range(len(indices)), key=lambda i: -indices[i].count):
        home = next((slots for index, slots in groups if set(indices[i].columns) <= set(index.columns)), None)
        if home is None:
            groups.append((indices[i], [i]))
        else:
            home.append(i)
    return groups
