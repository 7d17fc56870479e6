"""How many rows of small integers meet no exclusion, without listing them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

_LARGEST_TABLE = 4_000_000


def count_rows(sizes: Sequence[int], excluded: Sequence[Mapping[int, np.ndarray]]) -> int | None:
    """The number of rows that no exclusion meets, exactly.

    Each exclusion is a table of 0 and 1 over its few columns. The product of all tables is summed over one column after
    the other, the one with the fewest neighbours next, so the work grows with how the exclusions tie columns together
    and not with the number of rows.

    Args:
        sizes: how many values each column has, 0 .. size - 1.
        excluded: column -> bool [size] which of its values an exclusion is about; a row meets the exclusion where all
            of its columns do. An exclusion without columns is met by every row.

    Returns:
        The count, or None where a table would need more than four million entries.
    """
    number = np.int64 if math.prod(sizes) < 2**62 else object  # Python's own integers where 64 bits might not hold
    tables: list[tuple[tuple[int, ...], np.ndarray]] = []
    for exclusion in excluded:
        columns = tuple(sorted(exclusion))
        met = np.ones((), dtype=bool)
        for column in columns:
            met = np.logical_and.outer(met, exclusion[column])
        tables.append((columns, (~met).astype(number)))
    total = math.prod(int(table) for columns, table in tables if not columns)
    left = set(range(len(sizes)))
    while left:
        neighbours = {c: sorted({c}.union(*(own for own, _ in tables if c in own))) for c in left}
        column = min(left, key=lambda c: math.prod(sizes[k] for k in neighbours[c]))
        scope = neighbours[column]
        if math.prod(sizes[c] for c in scope) > _LARGEST_TABLE:
            return None
        product = np.ones([sizes[c] for c in scope], dtype=number)
        for own, table in tables:
            if column in own:
                product = product * table.reshape([sizes[c] if c in own else 1 for c in scope])
        tables = [(own, table) for own, table in tables if column not in own]
        rest = tuple(c for c in scope if c != column)
        summed = product.sum(axis=scope.index(column))
        if rest:
            tables.append((rest, np.asarray(summed, dtype=number)))
        else:
            total *= int(summed)
        left.remove(column)
    return total
