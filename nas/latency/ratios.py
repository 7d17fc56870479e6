"""Published quotients of two networks' latencies, `latency_tables/<slug>.ratios.csv`: proportions without a scale.

A design ladder often says only how much faster each step made a network. Such a row holds the key of the faster or
slower network, the key of the one it is compared with, latency over latency, and how uncertain the quotient is.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from nas import tables
from nas.errors import NasError
from nas.latency.regression import Ratios
from nas.op import FEATURES
from nas.paths import atomic_write
from nas.tables import Subject


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One published quotient.

    Attributes:
        subject, relative_to: keys of the two networks, whose features the table's subjects hold.
        ratio: latency of `subject` over that of `relative_to`.
        sd: standard deviation of its logarithm (0.05 = 5 %), with the rounding of what was printed in it.
        chip: where both were timed.
        excluded_because: why it is kept but not fitted, or "".
    """

    subject: str
    relative_to: str
    ratio: float
    sd: float
    chip: str
    source: str
    quality: str
    excluded_because: str = ""

    def __post_init__(self) -> None:
        for name in ("ratio", "sd"):
            if not 0 < getattr(self, name) < math.inf:
                raise NasError(f"{name} of {self.subject!r} must be positive and finite, got {getattr(self, name)}")
        if self.subject == self.relative_to:
            raise NasError(f"the ratio of {self.subject!r} to itself says nothing")


COLUMNS = tuple(f.name for f in fields(Ratio))


def read(slug: str, folder: str | Path | None = None) -> tuple[Ratio, ...]:
    """Every ratio of a target's table and of its family's, excluded ones too.

    Raises:
        NasError: a row is corrupt; the message has file and line.
    """
    names = [slug, *filter(None, [tables.family(slug, folder)])]
    paths = [tables.table_path(name, ".ratios.csv", folder) for name in names]
    return tuple(ratio for path in paths if path.is_file() for ratio in _rows(path))


def _rows(path: Path) -> Iterable[Ratio]:
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise NasError(f"{path}:1: the columns must be {', '.join(COLUMNS)}")
        for cells in reader:
            try:
                values: dict[str, Any] = {**cells, "ratio": float(cells["ratio"]), "sd": float(cells["sd"])}
                yield Ratio(**values)
            except (TypeError, ValueError, NasError) as error:
                raise NasError(f"{path}:{reader.line_num}: {error}") from error


def write(slug: str, rows: Iterable[Ratio], folder: str | Path | None = None) -> Path:
    """Replaces a target's ratios whole."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(astuple(row) for row in rows)
    return atomic_write(tables.table_path(slug, ".ratios.csv", folder), stream.getvalue())


def fitted(rows: Sequence[Ratio], subjects: Mapping[str, Subject], row_sd: float) -> tuple[Ratios, np.ndarray]:
    """The ratios that a fit may read, as arrays, and [m, 2] the keys of the networks that each compares.

    Args:
        rows: the ratios, used or not.
        subjects: with features, by key.
        row_sd: a row's uncertainty, against which a ratio's own decides its weight.

    Raises:
        NasError: a network of a ratio has no features.
    """
    used = [row for row in rows if not row.excluded_because]
    for key in (key for row in used for key in (row.subject, row.relative_to)):
        if key not in subjects or not subjects[key].features:
            raise NasError(f"a ratio of {key!r} is to be fitted but the table has no features of it")
    shape = (len(used), len(FEATURES))
    found = Ratios(
        over=np.array([subjects[row.subject].vector for row in used]).reshape(shape),
        under=np.array([subjects[row.relative_to].vector for row in used]).reshape(shape),
        log_ratio=np.log([row.ratio for row in used]),
        weights=np.array([(row_sd / row.sd) ** 2 for row in used]),
    )
    pairs = np.array([(row.subject, row.relative_to) for row in used], dtype=object).reshape(len(used), 2)
    return found, pairs
