"""Tables of measurements that grow row by row and are taken up again: one CSV, rewritten whole and atomically."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nas.paths import atomic_write

Row = TypeVar("Row", bound=Mapping[str, Any])


def most_frequent(rows: Sequence[Row]) -> list[Row]:
    """The rows of each space's most frequent digest: a table begun again with other settings keeps the first ones."""
    counts = Counter((row["space"], row["digest"]) for row in rows)
    most: dict[str, str] = {}
    for (space, digest), _ in counts.most_common():
        most.setdefault(space, digest)
    return [row for row in rows if row["digest"] == most[row["space"]]]


class Table:
    """Rows by their key columns; rows of another digest are kept apart and not shown.

    Args:
        path: of the CSV.
        digest: of everything that decides a row besides its key.
        keys: columns that tell rows apart.
    """

    def __init__(self, path: Path, digest: str, keys: tuple[str, ...]) -> None:
        self.path, self.digest, self.keys = path, digest, keys
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {}
        self._others: list[dict[str, Any]] = []
        if path.is_file():
            with path.open(newline="") as stream:
                for row in csv.DictReader(stream):
                    if row["digest"] == digest:
                        self.rows[self._key(row)] = row
                    else:
                        self._others.append(row)

    def _key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self.keys)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return tuple(map(str, key)) in self.rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows.values())

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Keeps a row and writes the file."""
        full = {"digest": self.digest, **row}
        self.rows[self._key(full)] = full
        rows = [*self._others, *self.rows.values()]
        fields = list(dict.fromkeys(name for each in rows for name in each))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fields, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(self.path, buffer.getvalue())
