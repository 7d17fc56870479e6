"""Times that cannot be right: a wrong unit stands out against what a network's operators cost in the other rows.

Every row's time is divided by the roofline time of its operators. Those ratios lie within a few times of each other on
any one device, so a row nearer to 1000 times the common ratio than to the ratio itself was written in another unit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from nas.device import DeviceSheet
from nas.latency.problem import roofline
from nas.tables import Measurement, Subject

__all__ = ["FACTOR", "implausible"]

FACTOR = math.sqrt(1000.0)  # beyond it a time is nearer to another unit's than to its own


def implausible(
    rows: Sequence[Measurement],
    subjects: Mapping[str, Subject],
    sheet: DeviceSheet,
    known: Sequence[Measurement] = (),
) -> list[str]:
    """One sentence per row that must not be fitted as it is; none if all look right.

    Args:
        rows: to be judged, in ms. A time that is not finite and positive never gets here: `Measurement` refuses it.
        subjects: with features, by key; rows without features (pipeline parts) are only checked for duplicates.
        sheet: its roofline sets the scale where there are no more than two rows to compare.
        known: rows that are trusted already, such as the table's; they set the scale but are not judged.
    """
    return [*_repeated(rows), *_of_other_units(rows, subjects, sheet, known)]


def _repeated(rows: Sequence[Measurement]) -> list[str]:
    """Subjects that one session has twice: which of the two times is meant cannot be told."""
    counts = Counter((row.subject, row.device, row.chip, row.session) for row in rows)
    return [
        f"{subject!r} has {n} rows in session {session!r} on {device}; a repeat needs a session of its own"
        for (subject, device, _, session), n in counts.items()
        if n > 1
    ]


def _of_other_units(
    rows: Sequence[Measurement],
    subjects: Mapping[str, Subject],
    sheet: DeviceSheet,
    known: Sequence[Measurement],
) -> list[str]:
    prior = roofline(sheet)

    def log_ratio(row: Measurement) -> float | None:
        subject = subjects.get(row.subject)
        cost = float(subject.vector @ prior) if subject is not None else 0.0
        return math.log(row.latency_ms / cost) if cost > 0 else None

    judged = [(row, ratio) for row in rows if row.used and (ratio := log_ratio(row)) is not None]
    trusted = [ratio for row in known if row.used and (ratio := log_ratio(row)) is not None]
    if not judged:
        return []
    common = _middle(trusted) if trusted else _common([ratio for _, ratio in judged])
    limit = math.log(FACTOR)
    return [_sentence(row, subjects, ratio - common) for row, ratio in judged if abs(ratio - common) > limit]


def _common(ratios: Sequence[float]) -> float:
    """The middle of rows that nothing vouches for: all may share the wrong unit, which only the roofline can tell."""
    middle = _middle(ratios) if len(ratios) > 2 else 0.0
    return middle if abs(middle) <= math.log(FACTOR) else 0.0


def _middle(ratios: Sequence[float]) -> float:
    """The log ratio that most rows lie near; where they disagree evenly, the one nearer to the roofline."""
    found = np.array(ratios)
    distance = np.abs(found[:, None] - found).sum(axis=0)
    return float(min(found[distance <= distance.min() * (1 + 1e-9)], key=abs))


def _sentence(row: Measurement, subjects: Mapping[str, Subject], off: float) -> str:
    factor = math.exp(abs(off))
    ms = row.latency_ms * (1000.0 if off < 0 else 0.001)
    unit = "seconds" if off < 0 else "microseconds"
    # Off by far more or less than 1000 is no unit: it is then some other mistake.
    as_unit = f"; it would be {ms:.4g} ms if it was written in {unit}" if FACTOR < factor < 1000 * FACTOR else ""
    return (
        f"{subjects[row.subject].name!r} in {row.latency_ms:.4g} ms is {factor:.0f} times too"
        f" {'fast' if off < 0 else 'slow'} for its operators beside the other rows and the roofline of"
        f" {row.target}{as_unit}"
    )
