"""Latency tables: measured rows and the subjects that they are rows of.

A table is `latency_tables/<slug>.csv`, one row per session and subject, beside `<slug>.subjects.json`, which holds each
subject's features so that a fit needs neither torch nor a trace. A device whose sheet names a family reads the family's
table behind its own, so that devices of one make pool what was measured on any of them.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from nas.device import load_sheet
from nas.errors import NasError
from nas.op import FEATURES
from nas.paths import atomic_write, data_dir
from nas.provenance import text_sha

SUBJECT_KINDS = ("block", "network", "component", "reference")
FEATURES_VERSION = 2
_PACE_ROUNDS = 200  # of aligning groups; far more than it takes to settle
_PACE_NOISE = 0.005  # deviations below this count alike
_MEASURE_HINT = "nas measure --space snapgen_unet --target {alias}"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One subject in one session.

    Attributes:
        target: slug of the table the row belongs to.
        subject: key into the table's subjects; free text where only the time is known (see `role`).
        subject_kind: "block", "network", "component" (a pipeline part) or "reference" (a published network).
        latency_ms: the session's statistic, in ms per call.
        statistic: how `latency_ms` comes from the samples ("min_cpu", "median_wall", "published").
        samples_ms, cpu_samples_ms: every wall and CPU-time sample in ms, in the order taken; empty for published rows.
        session: rows of one session share machine state; alignment and noise are between sessions. What is measured
            here is labelled "<session>/<group>": a long session is aligned group by group, by its anchors.
        flagged: why the session is not to be trusted, or "".
        device, chip: where it ran; a table may pool the chips of one family.
        resolution_px: of the image, where the row is a pipeline part.
        role: "decoder" or "text_encoders" for rows that a budget in seconds is charged with.
        excluded_because: why the row is kept but not fitted, or "".
    """

    target: str
    subject: str
    subject_kind: str
    latency_ms: float
    statistic: str
    samples_ms: tuple[float, ...] = ()
    cpu_samples_ms: tuple[float, ...] = ()
    session: str
    flagged: str = ""
    batch: int = 1
    device: str
    chip: str = ""
    resolution_px: int | None = None
    role: str = ""
    source: str
    protocol: str = ""
    environment: str = ""
    measured_at: str = ""
    excluded_because: str = ""

    def __post_init__(self) -> None:
        if self.subject_kind not in SUBJECT_KINDS:
            raise NasError(f"subject_kind must be one of {', '.join(SUBJECT_KINDS)}, got {self.subject_kind!r}")
        times = (self.latency_ms, *self.samples_ms, *self.cpu_samples_ms)
        if not all(math.isfinite(ms) and ms >= 0 for ms in times) or self.latency_ms <= 0:
            raise NasError(
                f"latencies of {self.subject!r} must be positive and finite, got latency_ms={self.latency_ms}"
            )
        if self.batch < 1:
            raise NasError(f"batch of {self.subject!r} must be at least 1, got {self.batch}")

    @property
    def used(self) -> bool:
        """Whether a fit may read the row."""
        return not self.flagged and not self.excluded_because


COLUMNS = tuple(f.name for f in fields(Measurement))


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was timed: enough to price it again without building it.

    Attributes:
        key: hash of its spec, or a name for a published network.
        spec: how it was built.
        features: nonzero entries of the vector of `nas.op.FEATURES`, at the row's batch and at float32.
        note: what is known to differ from the network that was really timed.
    """

    key: str
    kind: str
    name: str
    spec: Mapping[str, Any] = field(default_factory=dict)
    features: Mapping[str, float] = field(default_factory=dict)
    macs: int = 0
    params: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        strange = sorted(set(self.features) - set(FEATURES))
        if strange:
            raise NasError(f"subject {self.name!r} has unknown features {', '.join(strange)}")

    @property
    def vector(self) -> np.ndarray:
        """Features as float64 [F]."""
        return np.array([float(self.features.get(name, 0.0)) for name in FEATURES])


@dataclass(frozen=True, kw_only=True)
class Observation:
    """A subject's one latency on one chip, from all its trusted sessions.

    Attributes:
        ms: median over sessions of the session's statistic after alignment.
        session_ms: the aligned sessions, in order of session name.
    """

    subject: str
    kind: str
    chip: str
    ms: float
    session_ms: tuple[float, ...]


def feature_map(vector: np.ndarray) -> dict[str, float]:
    """The nonzero entries of a feature vector [F] by name, as a subject keeps them."""
    return {name: float(value) for name, value in zip(FEATURES, vector, strict=True) if value}


def table_path(slug: str, suffix: str, folder: str | Path | None = None) -> Path:
    """latency_tables/<slug><suffix>."""
    return data_dir("latency_tables", folder) / f"{slug}{suffix}"


def family(slug: str, folder: str | Path | None = None) -> str | None:
    """The slug of the family whose table a target reads behind its own; None if its sheet names none."""
    path = table_path(slug, ".toml", folder)
    return load_sheet(path).family if path.is_file() else None


def _with_family(slug: str, folder: str | Path | None) -> tuple[str, ...]:
    shared = family(slug, folder)
    return (slug,) if shared is None else (slug, shared)


def read(slug: str, folder: str | Path | None = None) -> tuple[Measurement, ...]:
    """Every row of a table and of its family's, flagged and excluded ones too; none if there is no table yet.

    Raises:
        NasError: a row is corrupt; the message has file and line.
    """
    return tuple(row for name in _with_family(slug, folder) for row in _read(name, folder))


def _read(slug: str, folder: str | Path | None) -> tuple[Measurement, ...]:
    path = table_path(slug, ".csv", folder)
    if not path.is_file():
        return ()
    with path.open(newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            return tuple(_rows(reader, slug, path))
        except csv.Error as error:
            raise NasError(f"{path}:{reader.line_num}: not a CSV row: {error}") from error


def _rows(reader: Any, slug: str, path: Path) -> Iterable[Measurement]:
    header: list[str] = next(reader, [])
    if tuple(header) != COLUMNS:
        wrong = sorted(set(header) ^ set(COLUMNS)) or ["their order"]
        raise NasError(f"{path}:1: the columns are not those of a latency table; they differ in {', '.join(wrong)}")
    for cells in reader:
        if len(cells) != len(COLUMNS):
            raise NasError(f"{path}:{reader.line_num}: {len(cells)} cells where the header has {len(COLUMNS)}")
        try:
            row = _parse(dict(zip(COLUMNS, cells, strict=True)))
        except (ValueError, NasError) as error:
            raise NasError(f"{path}:{reader.line_num}: {error}") from error
        if row.target != slug:
            raise NasError(f"{path}:{reader.line_num}: target must be {slug}, got {row.target!r}")
        yield row


def _parse(cells: Mapping[str, str]) -> Measurement:
    values: dict[str, Any] = dict(cells)
    values["latency_ms"] = float(cells["latency_ms"])
    for name in ("samples_ms", "cpu_samples_ms"):
        values[name] = tuple(float(sample) for sample in cells[name].split())
    values["batch"] = int(cells["batch"])
    values["resolution_px"] = int(cells["resolution_px"]) if cells["resolution_px"] else None
    return Measurement(**values)


def write(slug: str, rows: Iterable[Measurement], folder: str | Path | None = None) -> Path:
    """Replaces a table whole."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        if row.target != slug:
            raise NasError(f"a row of {row.target} cannot be written to the table of {slug}")
        writer.writerow([_cell(getattr(row, name)) for name in COLUMNS])
    return atomic_write(table_path(slug, ".csv", folder), stream.getvalue())


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{sample:.6g}" for sample in value)
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def append(slug: str, rows: Sequence[Measurement], folder: str | Path | None = None) -> Path:
    """Adds rows to a table; the file is replaced whole, so a killed run leaves the old table or the new one."""
    return write(slug, (*_read(slug, folder), *rows), folder)


def subjects(slug: str, folder: str | Path | None = None) -> dict[str, Subject]:
    """The subjects of a table and of its family's by key; none if there is no table yet.

    Raises:
        NasError: the file is not valid, or its features are of another version than this code's.
    """
    # Later entries win: what a device's own table says of a subject is nearer to what was timed.
    return {key: one for name in reversed(_with_family(slug, folder)) for key, one in _subjects(name, folder).items()}


def _subjects(slug: str, folder: str | Path | None) -> dict[str, Subject]:
    path = table_path(slug, ".subjects.json", folder)
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise NasError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    if data.get("features_version") != FEATURES_VERSION:
        raise NasError(
            f"{path}: features are of version {data.get('features_version')}, this code reads {FEATURES_VERSION}",
            hint="trace the subjects again: " + _MEASURE_HINT.format(alias=slug),
        )
    try:
        return {key: Subject(key=key, **record) for key, record in data["subjects"].items()}
    except (KeyError, TypeError, NasError) as error:
        raise NasError(f"{path}: not a subjects file: {error}") from error


def write_subjects(slug: str, new: Iterable[Subject], folder: str | Path | None = None) -> Path:
    """Adds subjects to the table's, replacing those of the same key."""
    known = {**_subjects(slug, folder), **{subject.key: subject for subject in new}}
    records = {key: asdict(known[key]) for key in sorted(known)}
    for record in records.values():
        del record["key"]
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(record)}" for key, record in records.items())
    text = f'{{"features_version": {FEATURES_VERSION}, "subjects": {{\n{lines}\n}}}}\n'
    return atomic_write(table_path(slug, ".subjects.json", folder), text)


def inputs_sha(slug: str, folder: str | Path | None = None) -> str:
    """Hash of everything in a table that a fit reads: rows, subjects, sheet and ratios, the family's included."""
    names = _with_family(slug, folder)
    paths = [table_path(name, suffix, folder) for name in names for suffix in (".csv", ".subjects.json", ".toml")]
    # Few tables have ratios: a file that is not there leaves the hash as it would be without this line.
    ratios = [path for name in names if (path := table_path(name, ".ratios.csv", folder)).is_file()]
    return text_sha("\0".join(path.read_text() if path.is_file() else "" for path in (*paths, *ratios)))


def observations(rows: Iterable[Measurement]) -> tuple[Observation, ...]:
    """One latency per subject and chip: the median over its trusted sessions after aligning the sessions.

    A shared machine has slow and fast sessions. The subjects that a chip's every session measured are its anchors; a
    session is divided by the median over anchors of its time over that anchor's median across sessions. Sessions in
    groups ("<session>/<group>") are aligned group by group, by all subjects that several groups have. A subject
    repeated within a session keeps its least time there (with statistics that are minima) or its median.
    """
    by_chip: dict[str, dict[str, dict[str, list[Measurement]]]] = {}
    for row in rows:
        if row.used:
            by_chip.setdefault(row.chip, {}).setdefault(row.subject, {}).setdefault(row.session, []).append(row)
    found = []
    for chip, by_subject in sorted(by_chip.items()):
        times = {s: {name: _session_ms(group) for name, group in by.items()} for s, by in by_subject.items()}
        pace = _session_pace(times)
        for subject, by_session in times.items():
            aligned = tuple(by_session[name] / pace[name] for name in sorted(by_session))
            kind = next(iter(by_subject[subject].values()))[0].subject_kind
            found.append(
                Observation(subject=subject, kind=kind, chip=chip, ms=float(np.median(aligned)), session_ms=aligned)
            )
    return tuple(found)


def _session_ms(rows: Sequence[Measurement]) -> float:
    times = [row.latency_ms for row in rows]
    return min(times) if rows[0].statistic.startswith("min") else float(np.median(times))


def _session_pace(times: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """By what factor each session was slow; `times` is subject -> session -> ms."""
    sessions = sorted({name for by_session in times.values() for name in by_session})
    if any("/" in name for name in sessions):
        return _group_pace(times, sessions)
    anchors = [by for by in times.values() if len(by) == len(sessions)]
    if not anchors:
        return dict.fromkeys(sessions, 1.0)
    middle = [float(np.median(list(by.values()))) for by in anchors]
    return {name: float(np.median([by[name] / m for by, m in zip(anchors, middle, strict=True)])) for name in sessions}


def _group_pace(times: Mapping[str, Mapping[str, float]], sessions: Sequence[str]) -> dict[str, float]:
    """Factors of groups of about ten subjects, most of which were measured in other groups too.

    Log times are a subject's plus a group's, by least squares reweighted towards least absolute deviations, so that one
    disturbed row does not move its group. Without the other subjects, three anchors would carry their own noise into
    every group.
    """
    repeated = [by for by in times.values() if len(by) > 1]
    if not repeated:
        return dict.fromkeys(sessions, 1.0)
    place = {name: i for i, name in enumerate(sessions)}
    rows = np.array([(i, place[name]) for i, by in enumerate(repeated) for name in by]).reshape(-1, 2)
    logs = np.log([ms for by in repeated for ms in by.values()])
    weights = np.ones(len(logs))
    paces, typical = np.zeros(len(sessions)), np.zeros(len(repeated))
    for _ in range(_PACE_ROUNDS):
        # Each half of the problem has a closed form given the other; the typical pace is 1.
        for group, other, values, size in ((0, 1, typical, len(repeated)), (1, 0, paces, len(sessions))):
            known = paces if other == 1 else typical
            total = np.bincount(rows[:, group], weights * (logs - known[rows[:, other]]), size)
            count = np.bincount(rows[:, group], weights, size)
            np.divide(total, count, out=values, where=count > 0)
        paces -= np.median(paces)
        missed = np.abs(logs - typical[rows[:, 0]] - paces[rows[:, 1]])
        weights = 1.0 / np.maximum(missed, _PACE_NOISE)
    return {name: float(np.exp(paces[i])) for name, i in place.items()}


def noise_floor(found: Iterable[Observation]) -> dict[str, float] | None:
    """How far one session lies from a subject's median: mean absolute deviation, as a fraction.

    Returns:
        None when no subject has two sessions.
    """
    repeated = [o for o in found if len(o.session_ms) > 1]
    if not repeated:
        return None
    # Per subject first: the anchors, repeated in every group, would otherwise outweigh all others.
    deviations = [float(np.mean([abs(ms / o.ms - 1) for ms in o.session_ms])) for o in repeated]
    return {
        "mean_deviation": float(np.mean(deviations)),
        "subjects": float(len(repeated)),
        "sessions": float(np.median([len(o.session_ms) for o in repeated])),
    }
