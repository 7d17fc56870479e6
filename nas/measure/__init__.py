"""Measuring: subjects on a target, session by session, every sample into the target's table.

Rows are appended group by group, so a killed run loses at most one group; running the same command again measures only
what still lacks sessions.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType

import numpy as np

from nas import registry, tables
from nas.device import DeviceSheet
from nas.errors import NasError, unknown
from nas.measure.sampling import known_subjects, sample_blocks, sample_networks
from nas.measure.session import Session, began, pick_anchors
from nas.measure.subjects import Subject, components
from nas.measure.timing import Clocks, Protocol, Samples
from nas.provenance import processor
from nas.space import SearchSpace

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How large the subjects of a target may be, in giga-MACs: a slow target's sheet sets lower ones.

    A pipeline component beyond its limit is not measured; a budget is then charged with what the predictor says of it.
    """

    most_block_gmac: float = 6.0
    least_network_gmac: float = 0.3
    most_network_gmac: float = 12.0
    most_component_gmac: float = 400.0
    components: bool = True


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
        chip: the processor of this machine; a fit reads only the rows of the chip that its sheet names.
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
    space: SearchSpace,
    target: DeviceSheet,
    *,
    blocks: int = 64,
    networks: int = 48,
    sessions: int = 2,
    repeats: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    folder: Path | None = None,
    clocks: Clocks | None = None,
) -> MeasureSummary:
    """Measures subjects of `space` on `target` and appends every session of every subject to the target's table.

    Args:
        space: where blocks (at full size, up to 6 GMAC) and networks (scaled down, 0.3-12 GMAC) are drawn from.
        target: a device sheet with a backend; its [protocol] table may change the fields of `Protocol` and `Limits`.
        blocks: how many distinct blocks; those that the table already has come first.
        networks: how many small networks, likewise; new ones begin with the space's references.
        sessions: how many unflagged sessions every subject shall have in the end.
        repeats: rounds per session; None: the sheet's, or 7.
        seed: of the choice of new subjects and of the order.
        progress: called with (what is done now, subjects done, subjects in all) of the present session.
        folder: of the tables; None: the project's own.
        clocks: where time comes from; None: this machine's.

    Raises:
        NasError: the target has no backend or it is unavailable, the machine is not the one that the sheet describes,
            or a subject fails on the backend.
    """
    start, cpu = time.perf_counter(), time.process_time()
    backend = _backend(target)
    protocol, _ = settings(target)
    protocol = protocol if repeats is None else replace(protocol, repeats=repeats)
    report = progress or (lambda message, done, total: None)
    report("choosing subjects", 0, blocks + networks)
    known = _known(space, target, folder)
    subjects = _planned(space, target, blocks, networks, seed, known)
    tables.write_subjects(target.slug, [_table_subject(s) for s in subjects], folder)
    anchors = _anchors(subjects, known, tables.read(target.slug, folder))
    written: list[tables.Measurement] = []
    had = _sessions_of(target.slug, folder)
    for number in range(sessions):
        counts = _sessions_of(target.slug, folder)
        todo = [s for s in subjects if len(counts.get(s.key, {})) <= number]
        if not todo:
            continue
        _wait(todo, counts, protocol.separation_s, report)
        session = Session(
            name=_now(),
            sheet=target,
            backend=backend,
            protocol=protocol,
            anchors=anchors,
            seed=seed + 7919 * number,
            clocks=clocks or Clocks(),
        )
        for rows, message, done in session.measure(todo):
            tables.append(target.slug, rows, folder)
            written += rows
            report(message, done, len(todo))
    return MeasureSummary(
        path=tables.table_path(target.slug, ".csv", folder),
        sessions=tuple(dict.fromkeys(began(row.session) for row in written)),
        rows=len(written),
        flagged=sum(bool(row.flagged) for row in written),
        skipped=sum(len(had.get(s.key, {})) >= sessions for s in subjects),
        lacking=sum(len(_sessions_of(target.slug, folder).get(s.key, {})) < sessions for s in subjects),
        repeatability=_repeatability(tables.read(target.slug, folder), {s.key for s in subjects}),
        chip=processor(),
        contention=_contention(written),
        wall_s=time.perf_counter() - start,
        cpu_s=time.process_time() - cpu,
    )


def plan(
    space: SearchSpace, target: DeviceSheet, blocks: int, networks: int, *, seed: int = 0, folder: Path | None = None
) -> tuple[Subject, ...]:
    """The subjects that `run` would measure with the same arguments; nothing is measured or written."""
    return _planned(space, target, blocks, networks, seed, _known(space, target, folder))


def _planned(
    space: SearchSpace, target: DeviceSheet, blocks: int, networks: int, seed: int, known: Sequence[Subject]
) -> tuple[Subject, ...]:
    _, limits = settings(target)
    return choose(space, blocks, networks, seed=seed, limits=limits, batch=target.target.batch, known=known)


def _known(space: SearchSpace, target: DeviceSheet, folder: Path | None) -> tuple[Subject, ...]:
    pixels = {row.subject: row.resolution_px for row in tables.read(target.slug, folder)}
    return known_subjects(space, tables.subjects(target.slug, folder), pixels, batch=target.target.batch)


def _anchors(
    subjects: Sequence[Subject], known: Sequence[Subject], rows: Sequence[tables.Measurement]
) -> tuple[Subject, ...]:
    """The anchors of earlier sessions on this machine, without which sessions cannot be aligned; new ones at first."""
    here = processor()
    labels: dict[str, set[str]] = {}
    for row in rows:
        if row.chip == here:
            labels.setdefault(row.subject, set()).add(row.session)
    everywhere = set().union(*labels.values())
    earlier = tuple(s for s in known if len(everywhere) > 1 and labels.get(s.key) == everywhere)
    return earlier or pick_anchors(subjects)


def choose(
    space: SearchSpace,
    blocks: int,
    networks: int,
    *,
    seed: int = 0,
    limits: Limits | None = None,
    batch: int = 1,
    known: Sequence[Subject] = (),
) -> tuple[Subject, ...]:
    """The subjects of a run: the known ones first, then newly drawn ones up to the numbers asked for."""
    limits = limits or Limits()
    had = {kind: [s for s in known if s.kind == kind] for kind in ("block", "network")}
    new_blocks = sample_blocks(
        space, _lacking(blocks, had["block"]), seed=seed, batch=batch, most_gmac=limits.most_block_gmac
    )
    new_networks = sample_networks(
        space,
        _lacking(networks, had["network"]),
        seed=seed,
        batch=batch,
        least_gmac=limits.least_network_gmac,
        most_gmac=limits.most_network_gmac,
    )
    return (
        *_distinct([*had["block"], *new_blocks])[:blocks],
        *_distinct([*had["network"], *new_networks])[:networks],
        *(components(space, most_gmac=limits.most_component_gmac) if limits.components else ()),
    )


def _lacking(asked: int, known: Sequence[Subject]) -> int:
    """How many to draw: the whole sample where the known do not suffice, since some of it may be known."""
    return asked if len(known) < asked else 0


def _distinct(subjects: Sequence[Subject]) -> tuple[Subject, ...]:
    return tuple({subject.key: subject for subject in subjects}.values())


def settings(sheet: DeviceSheet) -> tuple[Protocol, Limits]:
    """The sheet's [protocol] table over the defaults.

    Raises:
        NasError: the target's rows are published, so its [protocol] is not ours.
        UsageError: a key that is neither of `Protocol` nor of `Limits`.
    """
    _backend_name(sheet)
    names = {kind: {f.name for f in fields(kind)} for kind in (Protocol, Limits)}
    for key in sheet.protocol:
        if not any(key in known for known in names.values()):
            raise unknown("key", key, set().union(*names.values()), where=f"[protocol] of {sheet.path}")
    given = {kind: {k: v for k, v in sheet.protocol.items() if k in known} for kind, known in names.items()}
    return Protocol(**given[Protocol]), Limits(**given[Limits])


def _backend_name(sheet: DeviceSheet) -> str:
    if sheet.backend is None:
        raise NasError(
            f"target {sheet.alias} cannot be measured from here: {sheet.path} names no backend, its rows are published",
            hint="nas devices",
        )
    return sheet.backend


def _backend(sheet: DeviceSheet) -> ModuleType:
    backend = registry.load("nas.backends", _backend_name(sheet))
    reason = backend.unavailable()
    if reason is not None:
        raise NasError(f"target {sheet.alias} cannot be measured here: {reason}")
    return backend


def _table_subject(subject: Subject) -> tables.Subject:
    return tables.Subject(
        key=subject.key,
        kind=subject.kind,
        name=subject.name,
        spec=subject.spec or {},
        features={} if subject.features is None else tables.feature_map(subject.features),
        macs=subject.macs,
        params=subject.params,
    )


def _sessions_of(slug: str, folder: Path | None) -> dict[str, dict[str, str]]:
    """Subject -> its unflagged sessions on a machine like this one -> when the subject was last measured in it."""
    found: dict[str, dict[str, str]] = {}
    here = processor()
    for row in tables.read(slug, folder):
        if row.used and row.chip == here:
            found.setdefault(row.subject, {})[began(row.session)] = row.measured_at
    return found


def _wait(
    todo: Sequence[Subject], counts: Mapping[str, Mapping[str, str]], separation_s: float, report: Progress
) -> None:
    """Sleeps until the latest row of the subjects is old enough: what disturbs one session must not reach the next."""
    latest = [max(counts[s.key].values()) for s in todo if counts.get(s.key)]
    if not latest:
        return
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(max(latest))
    remaining = separation_s - age.total_seconds()
    if remaining > 0:
        report(f"waiting {remaining:.0f} s to keep the sessions apart", 0, len(todo))
        time.sleep(remaining)


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


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
