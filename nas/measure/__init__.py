"""Measuring: subjects on a target, session by session, every sample into the target's table.

Rows are appended group by group, so a killed run loses at most one group; running the same command again measures only
what still lacks sessions.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np

from nas import registry, tables
from nas.device import DeviceSheet
from nas.errors import NasError
from nas.measure.choosing import Limits, backend_name, choose, distinct, known_to, limits_of, settings
from nas.measure.guard import writing
from nas.measure.session import Session, began, chip_of, pick_anchors
from nas.measure.subjects import Subject, table_subject
from nas.measure.timing import Clocks, Samples
from nas.space import SearchSpace

__all__ = [
    "Limits",
    "MeasureSummary",
    "cannot",
    "choose",
    "limits_of",
    "plan",
    "run",
    "run_subjects",
    "settings",
    "table_subject",
]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class MeasureSummary:
    """What a run of `run` did.

    Attributes:
        path: the table.
        sessions: names of the sessions of this run.
        rows, flagged: rows appended, and how many of them carry a flag (kept, but not to be fitted).
        skipped: subjects that already had their sessions.
        lacking: subjects that still have fewer unflagged sessions than asked for: run the same command again.
        repeatability: median over subjects of (largest - smallest) / smallest between unflagged sessions, the table's
            earlier ones included; None where no subject has two.
        chip: what was measured; a fit reads only the rows of the chip that its sheet names.
        contention: median of wall over CPU time; 1 on a quiet machine with one thread.
        wall_s, cpu_s: what the run took, preparation included.
    """

    path: Path
    sessions: tuple[str, ...]
    rows: int
    flagged: int
    skipped: int
    lacking: int
    repeatability: float | None
    chip: str
    contention: float | None
    wall_s: float
    cpu_s: float


def run(
    spaces: Sequence[SearchSpace],
    target: DeviceSheet,
    *,
    blocks: int = 64,
    networks: int = 48,
    sessions: int = 2,
    repeats: int | None = None,
    seed: int = 0,
    like: DeviceSheet | None = None,
    progress: Progress | None = None,
    folder: Path | None = None,
    clocks: Clocks | None = None,
) -> MeasureSummary:
    """Measures subjects of `spaces` on `target` and appends every session of every subject to the target's table.

    Args:
        spaces: where blocks (at full size, up to 6 GMAC) and networks (scaled down, 0.3-12 GMAC) are drawn from, as
            many from each.
        target: a device sheet with a backend; its [protocol] table may change the fields of `Protocol` and `Limits`.
        blocks: how many distinct blocks; those that the table already has come first.
        networks: how many small networks, likewise; new ones begin with the space's references.
        sessions: how many unflagged sessions every subject shall have in the end.
        repeats: rounds per session; None: the sheet's, or 7.
        seed: of the choice of new subjects and of the order.
        like: another target: its table's subjects are taken before new ones are drawn, so that the two can be compared.
        progress: see `run_subjects`.
        folder: of the tables; None: the project's own.
        clocks: where time comes from; None: this machine's.

    Raises:
        NasError: see `run_subjects`.
    """
    _backend(target)
    if progress is not None:
        progress("choosing subjects", 0, 0)
    known = known_to(spaces, target, like, folder)
    subjects = _planned(spaces, target, blocks, networks, seed, known)
    return run_subjects(
        subjects,
        target,
        known=known,
        sessions=sessions,
        repeats=repeats,
        seed=seed,
        progress=progress,
        folder=folder,
        clocks=clocks,
    )


def run_subjects(
    subjects: Sequence[Subject],
    target: DeviceSheet,
    *,
    known: Sequence[Subject] = (),
    sessions: int = 2,
    repeats: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    folder: Path | None = None,
    clocks: Clocks | None = None,
) -> MeasureSummary:
    """Measures exactly these subjects on `target` and appends every session of every subject to the target's table.

    Args:
        subjects: what to measure; those that have their sessions already are left out.
        target: as of `run`.
        known: subjects of the target's table, among which are the anchors of its earlier sessions.
        sessions: as of `run`.
        repeats: as of `run`.
        seed: of the order.
        progress: called with (what is done now, sessions of subjects done, sessions of subjects in all); 0 in all
            while that is not known yet.
        folder: as of `run`.
        clocks: as of `run`.

    Raises:
        NasError: the target has no backend or it is unavailable, the tables cannot be written to or another run is
            writing this one, the machine is not the one that the sheet describes, or a subject fails on the backend;
            rows measured before it are kept, and the message says so.
    """
    start, cpu = time.perf_counter(), time.process_time()
    backend = _backend(target)
    protocol, _ = settings(target)
    protocol = protocol if repeats is None else replace(protocol, repeats=repeats)
    written: list[tables.Measurement] = []
    path = tables.table_path(target.slug, ".csv", folder)
    with writing(target.slug, folder):
        had = _sessions_of(target, folder)
        # Subjects that a table already has are not written again: a predictor fitted to it would count as outdated.
        recorded = tables.subjects(target.slug, folder)
        if new := [one for s in subjects if recorded.get(s.key) != (one := table_subject(s))]:
            tables.write_subjects(target.slug, new, folder)
        anchors = _anchors(subjects, known, tables.read(target.slug, folder), chip_of(target))
        work = _Work(subjects, sessions, had, progress or (lambda message, done, total: None))
        try:
            for number in range(sessions):
                counts = _sessions_of(target, folder)
                todo = [s for s in subjects if len(counts.get(s.key, {})) <= number]
                if not todo:
                    continue
                _wait(todo, counts, protocol.separation_s, work.say)
                session = Session(
                    name=_unused({began(row.session) for row in tables.read(target.slug, folder)}),
                    sheet=target,
                    backend=backend,
                    protocol=protocol,
                    anchors=anchors,
                    seed=seed + 7919 * number,
                    clocks=clocks or Clocks(),
                )
                work.say("loading the first subjects")
                for rows, message, done in session.measure(todo):
                    tables.append(target.slug, rows, folder)
                    written += rows
                    work.say(message, done)
                work.finished(len(todo))
        except NasError as error:
            if not written:
                raise
            raise NasError(
                f"{error.message}; the {len(written)} rows measured before are kept in {path}",
                hint=error.hint or "the same command, once that is mended: it measures what is left",
            ) from error
    counts = _sessions_of(target, folder)
    return MeasureSummary(
        path=path,
        sessions=tuple(dict.fromkeys(began(row.session) for row in written)),
        rows=len(written),
        flagged=sum(bool(row.flagged) for row in written),
        skipped=sum(len(had.get(s.key, {})) >= sessions for s in subjects),
        lacking=sum(len(counts.get(s.key, {})) < sessions for s in subjects),
        repeatability=_repeatability(tables.read(target.slug, folder), {s.key for s in subjects}),
        chip=chip_of(target),
        contention=_contention(written),
        wall_s=time.perf_counter() - start,
        cpu_s=time.process_time() - cpu,
    )


class _Work:
    """How much of a run is done, over all its sessions."""

    def __init__(self, subjects: Sequence[Subject], sessions: int, had: Mapping[str, object], report: Progress) -> None:
        counts = {key: len(found) for key, found in had.items() if isinstance(found, Mapping)}
        self.total = sum(max(0, sessions - counts.get(s.key, 0)) for s in subjects)
        self.done = 0
        self.report = report

    def say(self, message: str, done: int = 0) -> None:
        """Reports what is done now, `done` subjects of the present session being finished."""
        self.report(message, min(self.done + done, self.total), self.total)

    def finished(self, subjects: int) -> None:
        """Counts a session of that many subjects as done."""
        self.done += subjects
        self.say("session over")


def plan(
    spaces: Sequence[SearchSpace],
    target: DeviceSheet,
    blocks: int,
    networks: int,
    *,
    seed: int = 0,
    like: DeviceSheet | None = None,
    folder: Path | None = None,
) -> tuple[Subject, ...]:
    """The subjects that `run` would measure with the same arguments; nothing is measured or written.

    For a target that nothing here can run, they are what is worth measuring on it elsewhere.
    """
    return _planned(spaces, target, blocks, networks, seed, known_to(spaces, target, like, folder))


def _planned(
    spaces: Sequence[SearchSpace], target: DeviceSheet, blocks: int, networks: int, seed: int, known: Sequence[Subject]
) -> tuple[Subject, ...]:
    limits = limits_of(target) if target.backend is None else settings(target)[1]
    return choose(spaces, blocks, networks, seed=seed, limits=limits, batch=target.target.batch, known=known)


def _anchors(
    subjects: Sequence[Subject], known: Sequence[Subject], rows: Sequence[tables.Measurement], chip: str
) -> tuple[Subject, ...]:
    """The anchors of earlier sessions on this machine, by which groups are compared best; new ones at first.

    A session measures its anchors in every group and all else in one of them. That most groups have a subject is not
    enough: where a run was killed after a few groups, they may all have it.
    """
    groups: dict[str, set[str]] = {}
    for row in rows:
        if row.used and row.chip == chip and row.subject_kind != "component":
            groups.setdefault(row.subject, set()).add(row.session)
    everywhere = set().union(*groups.values())
    often = {
        key
        for key, seen in groups.items()
        if len(seen) > len(everywhere) / 2 and len(seen) > len({began(label) for label in seen})
    }
    return tuple(s for s in distinct([*known, *subjects]) if s.key in often) or pick_anchors(subjects)


def cannot(sheet: DeviceSheet) -> str | None:
    """Why a target cannot be measured from here, or None."""
    try:
        _backend(sheet)
    except NasError as error:
        return error.message
    return None


def _backend(sheet: DeviceSheet) -> ModuleType:
    backend = registry.load("nas.backends", backend_name(sheet))
    reason = backend.unavailable()
    if reason is not None:
        raise NasError(f"target {sheet.alias} cannot be measured here: {reason}")
    return backend


def _sessions_of(sheet: DeviceSheet, folder: Path | None) -> dict[str, dict[str, str]]:
    """Subject -> its unflagged sessions on what this run measures -> when the subject was last measured in it."""
    found: dict[str, dict[str, str]] = {}
    chip = chip_of(sheet)
    for row in tables.read(sheet.slug, folder):
        if row.used and row.chip == chip:
            found.setdefault(row.subject, {})[began(row.session)] = row.measured_at
    return found


def _wait(
    todo: Sequence[Subject],
    counts: Mapping[str, Mapping[str, str]],
    separation_s: float,
    report: Callable[[str], None],
) -> None:
    """Sleeps until the latest row of the subjects is old enough: what disturbs one session must not reach the next."""
    ended = [moment for s in todo for text in counts.get(s.key, {}).values() if (moment := _moment(text)) is not None]
    if not ended:
        return
    age = datetime.datetime.now(datetime.UTC) - max(ended)
    remaining = separation_s - age.total_seconds()
    if remaining > 0:
        report(f"waiting {remaining:.0f} s to keep the sessions apart")
        time.sleep(remaining)


def _moment(text: str) -> datetime.datetime | None:
    """When a row was measured; None where it does not say to the second, as rows brought from elsewhere need not."""
    try:
        found = datetime.datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else None


def _repeatability(rows: Sequence[tables.Measurement], keys: set[str]) -> float | None:
    gaps = [
        max(seen.session_ms) / min(seen.session_ms) - 1
        for seen in tables.observations(rows)
        if seen.subject in keys and len(seen.session_ms) > 1
    ]
    return float(np.median(gaps)) if gaps else None


def _contention(rows: Sequence[tables.Measurement]) -> float | None:
    ratios = [Samples(wall_ms=r.samples_ms, cpu_ms=r.cpu_samples_ms).contention for r in rows if r.cpu_samples_ms]
    return float(np.median(ratios)) if ratios else None


def _unused(names: set[str]) -> str:
    """A session's name: the time to the second, of a second in which no other session of the table began."""
    while (name := _now()) in names:
        time.sleep(0.05)
    return name


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
