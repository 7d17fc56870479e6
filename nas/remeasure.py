"""A study's finalists on the hardware: full-size networks of its front, measured beside what was predicted.

The study itself is left as it is: it is stamped with the predictor that it was made with. What was measured goes into
the target's table, where the next fit reads it, and into remeasured.json in the study's folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nas import measure, tables
from nas.device import DeviceSheet, find_target
from nas.errors import NasError
from nas.measure.kit import Kit, write_kit
from nas.measure.session import began, chip_of
from nas.measure.subjects import Subject, candidate_subject, rebuilt
from nas.paths import atomic_write
from nas.provenance import provenance
from nas.record import candidate_of, read_study

FILE = "remeasured.json"
Progress = Callable[[str, int, int], None]
# Of a network that takes longer than this a call, three repeats in one session are taken: fourteen in two, beside the
# warm-ups and anchors, would be ten minutes and more for each.
_SLOW_S = 3.0
_SLOW_REPEATS = 3
# Weights in torch, in the exported file, in the runtime, and once more while one is made from the other.
_COPIES_OF_WEIGHTS = 4
_COPIES_OF_ACTIVATIONS = 2


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A member of a study's front: what was predicted of it, and what was measured.

    Attributes:
        step_ms: predicted, of one denoiser call.
        latency_ms, low_ms, high_ms: predicted, with the study's bounds, of what the budget is for: an image, or a call.
        memory_gb: about what measuring it on this machine takes.
        measured_step_ms: of one call at full size; None where it was not measured.
        measured_ms: the budget's latency with the measured call in it.
        within_budget: whether that is at most the budget; None where it was not measured.
        sessions: how many the measured time rests on.
        skipped: why it was not measured, or "".
    """

    key: str
    step_ms: float
    latency_ms: float
    low_ms: float
    high_ms: float
    memory_gb: float = 0.0
    measured_step_ms: float | None = None
    measured_ms: float | None = None
    within_budget: bool | None = None
    sessions: int = 0
    skipped: str = ""

    @property
    def error(self) -> float | None:
        """Predicted against measured time of one call, signed, as a fraction of the measured."""
        return None if self.measured_step_ms is None else self.step_ms / self.measured_step_ms - 1


@dataclass(frozen=True, kw_only=True)
class Remeasured:
    """What was done with a study's finalists.

    Attributes:
        what: what was measured, in words.
        budget_ms: of the study.
        kit: the measuring kit, where the target is on another machine; no finalist is then measured.
        path: remeasured.json; None with a kit.
    """

    study: Path
    target: str
    alias: str
    what: str
    budget_ms: float
    finalists: tuple[Finalist, ...]
    rows: int = 0
    kit: Kit | None = None
    path: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "study": self.study.name,
            "target": self.target,
            "what": self.what,
            "budget_ms": self.budget_ms,
            "rows": self.rows,
            "finalists": [{**asdict(f), "error": f.error} for f in self.finalists],
            "kit": None if self.kit is None else str(self.kit.folder),
        }


def finalists(folder: Path, count: int) -> list[Finalist]:
    """The members of a front that hardware should decide on: the recommended one, then the most doubtful ones.

    Doubtful are those whose probability to meet the budget is lowest.

    Raises:
        NasError: the study's files cannot be read, or its front is empty.
    """
    record = read_study(folder)
    frame = pd.read_csv(folder / "front.csv", dtype={"key": str})
    if frame.empty:
        raise NasError(f"{folder}: the front is empty, so there is nothing to measure", hint=record.get("next"))
    chosen = (record.get("recommended") or {}).get("key")
    frame = frame.assign(_first=frame["key"] != chosen).sort_values(["_first", "meets_budget_probability"])
    return [
        Finalist(
            key=row["key"],
            step_ms=float(row["step_ms"]),
            latency_ms=float(row["latency_ms"]),
            low_ms=float(row["latency_low_ms"]),
            high_ms=float(row["latency_high_ms"]),
            memory_gb=_memory_gb(row),
        )
        for _, row in frame.head(count).iterrows()
    ]


def remeasure(
    folder: Path,
    count: int,
    *,
    sessions: int | None = None,
    repeats: int | None = None,
    progress: Progress | None = None,
    tables_folder: Path | None = None,
) -> Remeasured:
    """Measures `count` finalists of a study on its target, or writes a kit where the target cannot be reached.

    Args:
        folder: of the study.
        count: how many members of its front.
        sessions: per network; None: two, or one where a call takes more than three seconds.
        repeats: per session; None: the sheet's, or three where a call takes more than three seconds.
        progress: as of `nas.measure.run_subjects`.
        tables_folder: of the latency tables; None: the project's own.

    Raises:
        NasError: the study cannot be read, or a finalist fails on the backend; rows measured before it are kept.
    """
    record = read_study(folder)
    sheet = find_target(record["target"], tables_folder)
    chosen = finalists(folder, count)
    if progress is not None:
        progress("tracing the finalists", 0, 0)
    subjects = {f.key: _subject(folder, f.key, sheet) for f in chosen}
    done = Remeasured(
        study=folder,
        target=sheet.slug,
        alias=sheet.alias,
        what=f"full-size denoisers with random weights at {record['resolution_px']} px, batch {sheet.target.batch}",
        budget_ms=float(record["budget"]["ms"]),
        finalists=tuple(chosen),
    )
    if measure.cannot(sheet) is not None:
        kit = write_kit(list(subjects.values()), sheet, folder / "kit", progress=progress)
        return replace(done, kit=kit)
    chosen = [replace(f, skipped=_too_much(f, sheet)) for f in chosen]
    fitting = [f for f in chosen if not f.skipped]
    slow = any(f.step_ms > _SLOW_S * 1e3 for f in fitting)
    protocol, _ = measure.settings(sheet)
    rounds = repeats or (min(_SLOW_REPEATS, protocol.repeats) if slow else protocol.repeats)
    held = sessions or (1 if slow else 2)
    rows = 0
    if fitting:
        summary = measure.run_subjects(
            [subjects[f.key] for f in fitting],
            sheet,
            known=_anchored(sheet, tables_folder),
            sessions=held,
            repeats=rounds,
            progress=progress,
            folder=tables_folder,
        )
        rows = summary.rows
    found = _measured(sheet, tables_folder)
    times = {f.key: found.get(subjects[f.key].key) for f in fitting}
    chosen = [_with_time(f, times.get(f.key), record) for f in chosen]
    few = " (fewer than the protocol's: a call takes seconds)" if slow and repeats is None else ""
    what = f"{done.what}; {rounds} repeats in {held} session{'s' if held > 1 else ''}{few}"
    done = replace(done, finalists=tuple(chosen), rows=rows, what=what, path=folder / FILE)
    data = {**done.to_json(), "provenance": provenance(predictor=record["predictor"].get("target"))}
    atomic_write(folder / FILE, json.dumps(data, indent=1) + "\n")
    return done


def _subject(folder: Path, key: str, sheet: DeviceSheet) -> Subject:
    return candidate_subject(candidate_of(f"{folder}#{key}")[1], sheet.target.batch)


def _memory_gb(row: Any) -> float:
    weights, activations = float(row["weight_bytes"]), float(row["peak_activation_bytes"])
    return (_COPIES_OF_WEIGHTS * weights + _COPIES_OF_ACTIVATIONS * activations) / 1e9


def _too_much(finalist: Finalist, sheet: DeviceSheet) -> str:
    """Why a network is not to be run here, or ""."""
    _, limits = measure.settings(sheet)
    if finalist.step_ms > limits.most_call_s * 1e3:
        return (
            f"a call would take {finalist.step_ms / 1e3:.0f} s, more than the {limits.most_call_s:g} s of most_call_s"
        )
    free = _free_gb()
    if finalist.memory_gb > free:
        return f"it needs about {finalist.memory_gb:.1f} GB of memory, and {free:.1f} GB are free"
    return ""


def _free_gb() -> float:
    """Memory that this process could have, files that the system keeps in it included where the system tells."""
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.is_file() else ():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024 / 1e9
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def _anchored(sheet: DeviceSheet, folder: Path | None) -> list[Subject]:
    """The subjects that every earlier session has: they must be measured again beside the finalists."""
    labels: dict[str, set[str]] = {}
    pixels: dict[str, int | None] = {}
    for row in tables.read(sheet.slug, folder):
        if row.chip == chip_of(sheet):
            labels.setdefault(row.subject, set()).add(row.session)
            pixels[row.subject] = row.resolution_px
    everywhere = set().union(*labels.values())
    recorded = tables.subjects(sheet.slug, folder)
    keys = [key for key, found in labels.items() if found == everywhere and key in recorded]
    found = [rebuilt(recorded[key], pixels[key], sheet.target.batch) for key in keys]
    return [subject for subject in found if subject is not None]


def _measured(sheet: DeviceSheet, folder: Path | None) -> dict[str, tuple[float, int]]:
    """Subject -> its latency on this machine, from all its sessions, and how many those are."""
    rows = [row for row in tables.read(sheet.slug, folder) if row.chip == chip_of(sheet)]
    held: dict[str, set[str]] = {}
    for row in rows:
        if row.used:
            held.setdefault(row.subject, set()).add(began(row.session))
    return {seen.subject: (seen.ms, len(held[seen.subject])) for seen in tables.observations(rows)}


def _with_time(finalist: Finalist, found: tuple[float, int] | None, record: Mapping[str, Any]) -> Finalist:
    """A finalist with its measured time and what the budget makes of it."""
    if found is None:
        skipped = finalist.skipped or "every session was flagged: the machine was not steady; measure it again"
        return replace(finalist, skipped=skipped)
    step_ms, sessions = found
    total = float(record["pipeline"]["fixed_ms"]) + int(record["pipeline"]["calls"]) * step_ms
    return replace(
        finalist,
        measured_step_ms=step_ms,
        measured_ms=total,
        within_budget=bool(total <= float(record["budget"]["ms"])),
        sessions=sessions,
    )


def mean_error(found: Sequence[Finalist]) -> float | None:
    """Mean absolute error of the predicted calls, as a fraction; None where none was measured."""
    errors = [abs(f.error) for f in found if f.error is not None]
    return float(np.mean(errors)) if errors else None
