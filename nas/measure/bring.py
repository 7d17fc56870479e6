"""Measurements that a person brings: a CSV of times, checked whole before a row of it enters a table.

The format is documented in docs/measurements.md. Two columns are enough: what was timed, and how long a call took.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nas import tables
from nas.device import DeviceSheet
from nas.errors import NasError, UsageError, unknown
from nas.latency.plausible import implausible
from nas.measure.guard import writing
from nas.measure.kit import TEMPLATE
from nas.measure.naming import Named, Names

# Columns that are read, beside those of a kit that only say what a file is.
COLUMNS = (*TEMPLATE, "resolution_px", "source", "protocol")
_SESSION = "brought"


@dataclass(frozen=True, kw_only=True)
class Brought:
    """What an import did.

    Attributes:
        path: the table.
        rows: how many were added; known: how many it had already.
        empty: how many have no time yet.
        networks: how many different networks and blocks the added rows are of.
    """

    path: Path
    rows: int
    known: int
    empty: int
    networks: int


@dataclass(frozen=True, kw_only=True)
class _Line:
    number: int
    row: tables.Measurement
    named: Named


def bring(path: Path, sheet: DeviceSheet, folder: str | Path | None = None) -> Brought:
    """Adds the rows of a CSV to a target's table: all of them, or none.

    A row that the table has already is passed over, so the same file may be brought again.

    Raises:
        UsageError: a column or a subject is unknown.
        NasError: the file cannot be read; or a line is of another batch, precision or chip, has a time that is no
            positive number of milliseconds or cannot be right for its network, or says again what another line or the
            table says otherwise. The message has file and line.
    """
    with writing(sheet.slug, folder):
        cells = _cells(path)
        names = Names(sheet, path.parent, folder)
        timed = [(number, row) for number, row in cells if row["latency_ms"] or row["samples_ms"]]
        lines = [_line(path, number, row, sheet, names) for number, row in timed]
        if not lines:
            raise NasError(f"{path}: no line has a time in latency_ms or samples_ms")
        had, recorded = tables.read(sheet.slug, folder), tables.subjects(sheet.slug, folder)
        _refuse_repeats(path, lines)
        new = [line for line in lines if not _known(path, line, had)]
        _refuse_implausible(path, new, sheet, had, recorded)
        if new:
            subjects = {line.named.subject.key: line.named.subject for line in new}
            if fresh := [one for key, one in subjects.items() if key not in recorded]:
                tables.write_subjects(sheet.slug, fresh, folder)
            tables.append(sheet.slug, [line.row for line in new], folder)
    return Brought(
        path=tables.table_path(sheet.slug, ".csv", folder),
        rows=len(new),
        known=len(lines) - len(new),
        empty=len(cells) - len(timed),
        networks=len({line.row.subject for line in new}),
    )


def _cells(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The lines of the file with their numbers; a column that it does not have is empty."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            header = [name.strip() for name in reader.fieldnames or []]
            _check_header(path, header)
            reader.fieldnames = header
            found = []
            for row in reader:
                if None in row or None in row.values():
                    raise NasError(
                        f"{path}:{reader.line_num}: as many cells as the header has, {len(header)}, are needed"
                    )
                found.append((reader.line_num, {name: (row.get(name) or "").strip() for name in COLUMNS}))
            return found
    except (OSError, UnicodeDecodeError) as error:
        raise NasError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except csv.Error as error:
        raise NasError(f"{path}: not a CSV file: {error}") from error


def _check_header(path: Path, header: Sequence[str]) -> None:
    for name in header:
        if name not in COLUMNS:
            raise unknown("column", name, COLUMNS, where=f"{path}:1", hint="docs/measurements.md says what each holds")
    if len(set(header)) < len(header):
        raise UsageError(f"{path}:1: a column is there twice")
    if "subject" not in header or not {"latency_ms", "samples_ms"} & set(header):
        raise UsageError(
            f"{path}:1: the columns subject and latency_ms (or samples_ms) are needed, got {', '.join(header)}"
        )


def _line(path: Path, number: int, cells: Mapping[str, str], sheet: DeviceSheet, names: Names) -> _Line:
    where, target = f"{path}:{number}", sheet.target
    for column, wanted in (("batch", str(target.batch)), ("precision", target.precision)):
        if cells[column] not in ("", wanted):
            raise NasError(
                f"{where}: {column} is {cells[column]!r}, but {sheet.slug} is measured at {wanted}",
                hint="another precision or batch is another target: nas devices add",
            )
    chip = cells["chip"] or sheet.chip
    if sheet.chips and chip not in sheet.chips:
        raise unknown("chip", chip, sheet.chips, where=f"{where}, of {sheet.path}")
    if not sheet.chips and sheet.chip and chip != sheet.chip:
        raise NasError(f"{where}: chip is {chip!r}, but {sheet.slug} is {sheet.chip!r}")
    samples = tuple(_ms(where, "samples_ms", text) for text in cells["samples_ms"].replace(";", " ").split())
    least = sheet.shared and bool(samples)
    latency = _ms(where, "latency_ms", cells["latency_ms"]) if cells["latency_ms"] else 0.0
    if samples:
        stated, latency = latency, min(samples) if least else statistics.median(samples)
        if stated and not min(samples) * 0.99 <= stated <= max(samples) * 1.01:
            raise NasError(
                f"{where}: latency_ms is {stated:g}, outside its samples_ms, {min(samples):g} to {max(samples):g}"
            )
    named = names.find(cells["subject"], where)
    row = tables.Measurement(
        target=sheet.slug,
        subject=named.subject.key,
        subject_kind=named.subject.kind,
        latency_ms=latency,
        statistic=("min_wall" if least else "median_wall") if samples else "reported",
        samples_ms=samples,
        session=cells["session"] or _SESSION,
        batch=target.batch,
        device=cells["device"] or target.device,
        chip=chip,
        resolution_px=_pixels(where, cells["resolution_px"]) or named.resolution_px,
        role=named.role,
        source=cells["source"] or f"brought by its owner ({path.name})",
        protocol="; ".join(filter(None, (cells["protocol"], cells["notes"]))),
        environment=cells["environment"],
        measured_at=cells["measured_at"],
    )
    return _Line(number=number, row=row, named=named)


def _ms(where: str, column: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise NasError(f"{where}: {column} must hold positive numbers of milliseconds, got {text!r}")
    return value


def _pixels(where: str, text: str) -> int | None:
    if text and not text.isdigit():
        raise NasError(f"{where}: resolution_px must be the image's side in pixels, got {text!r}")
    return int(text) if text else None


def _identity(row: tables.Measurement) -> tuple[str, str, str, str]:
    return (row.subject, row.session, row.device, row.chip)


def _refuse_repeats(path: Path, lines: Sequence[_Line]) -> None:
    first: dict[tuple[str, str, str, str], int] = {}
    for line in lines:
        before = first.setdefault(_identity(line.row), line.number)
        if before != line.number:
            raise NasError(
                f"{path}:{line.number}: {line.named.text!r} has a time in session {line.row.session!r} already, in line"
                f" {before}",
                hint="put repeats of one session into samples_ms, or name another session in the column session",
            )


def _known(path: Path, line: _Line, had: Sequence[tables.Measurement]) -> bool:
    """Whether the table has the row.

    Raises:
        NasError: it has another time for the same subject and session.
    """
    for row in had:
        if _identity(row) == _identity(line.row):
            if math.isclose(row.latency_ms, line.row.latency_ms, rel_tol=1e-5):
                return True
            raise NasError(
                f"{path}:{line.number}: {line.named.text!r} takes {line.row.latency_ms:g} ms, but the table of"
                f" {row.target} has {row.latency_ms:g} ms for it in session {row.session!r}",
                hint="name another session in the column session, or take the old row out of the table",
            )
    return False


def _refuse_implausible(
    path: Path,
    lines: Sequence[_Line],
    sheet: DeviceSheet,
    had: Sequence[tables.Measurement],
    recorded: Mapping[str, tables.Subject],
) -> None:
    """A unit error stands out against what the operators of a network cost elsewhere."""
    # Each line under a name of its own, so that what is said of it has its number.
    rows = [replace(line.row, subject=f"line {line.number}") for line in lines]
    subjects = {
        row.subject: replace(line.named.subject, key=row.subject, name=f"{row.subject}: {line.named.text}")
        for line, row in zip(lines, rows, strict=True)
    }
    wrong = implausible(rows, {**recorded, **subjects}, sheet, had)
    if wrong:
        more = f"; and {len(wrong) - 1} more lines like it" if len(wrong) > 1 else ""
        raise NasError(
            f"{path}: {wrong[0]}{more}",
            hint=f"write every time in milliseconds per call; where they are right, correct [roofline] of {sheet.path}",
        )
