"""Measuring: sessions of scripted subjects, whole runs."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nas import measure, tables
from nas.backends import Loaded
from nas.device import DeviceSheet, Target, find_target, load_sheet
from nas.errors import NasError, UsageError
from nas.measure.session import Session, began, pick_anchors
from nas.measure.subjects import Subject
from nas.measure.timing import Protocol, statistic_for
from nas.space import SearchSpace, load_space
from tests.measure_cases import QUICK, World

SPACE: SearchSpace = load_space("snapgen_unet")


@pytest.fixture
def world() -> World:
    return World()


def sheet_of(folder: Path, **changes: str) -> DeviceSheet:
    lines = {
        "device": '"cpu"',
        "runtime": '"onnxruntime"',
        "precision": '"fp32"',
        "aliases": '["test-cpu"]',
        "chip": '"a chip"',
        "backend": '"onnxruntime"',
        "shared": "true",
        "protocol": "{ group = 2, separation_s = 0.0, components = false, least_sample_ms = 0.1 }",
        **changes,
    }
    target = Target(device="cpu", runtime="onnxruntime", precision="fp32", threads=int(lines.get("threads", "1")))
    path = folder / f"{target.slug}.toml"
    path.write_text("\n".join(f"{key} = {value}" for key, value in lines.items()))
    return load_sheet(path)


@pytest.mark.parametrize(
    ("changes", "statistic"),
    [({}, "min_cpu"), ({"threads": "2"}, "min_wall"), ({"shared": "false"}, "median_wall")],
)
def test_the_statistic_follows_the_device(tmp_path: Path, changes: dict[str, str], statistic: str) -> None:
    assert statistic_for(sheet_of(tmp_path, **changes)) == statistic


def test_protocol_settings_are_read_and_misspelt_ones_are_errors(tmp_path: Path) -> None:
    protocol, limits = measure.settings(sheet_of(tmp_path, protocol="{ repeats = 9, most_block_gmac = 0.5 }"))
    assert protocol == Protocol(repeats=9)
    assert limits == measure.Limits(most_block_gmac=0.5)
    with pytest.raises(UsageError, match=r"unknown key 'repeat' in \[protocol\].*did you mean 'repeats'"):
        measure.settings(sheet_of(tmp_path, protocol="{ repeat = 9 }"))


# Sessions


def subject_of(key: str, gmac: float, kind: str = "block") -> Subject:
    def build(batch: int) -> tuple[nn.Module, dict[str, Tensor]]:
        return nn.Identity(), {"key": torch.zeros(batch)}

    return Subject(
        key=key, kind=kind, name=f"subject {key}", spec={}, resolution_px=64, build=build, macs=int(gmac * 1e9)
    )


@dataclass
class Scripted:
    """A backend of scripted subjects: `cpu_ms[key](n)` is what call n of a subject takes."""

    world: World
    cpu_ms: dict[str, Callable[[int], float]]
    output: float = 0.0

    def unavailable(self) -> None:
        return None

    def loader(self, key: str) -> Loaded:
        run = self.world.subject(key, self.cpu_ms.get(key, lambda n: 10.0))

        def call() -> np.ndarray:
            run()
            return np.array([self.output])

        return Loaded(run=call, description={"runtime": "scripted", "threads": 1})


@pytest.fixture
def scripted(world: World, monkeypatch: pytest.MonkeyPatch) -> Scripted:
    backend = Scripted(world, {})
    monkeypatch.setattr(Session, "_load", lambda self, subject: backend.loader(subject.key))
    return backend


def open_session(tmp_path: Path, world: World, subjects: list[Subject], **changes: object) -> Session:
    settings: dict[str, Any] = {
        "protocol": QUICK,
        "anchors": pick_anchors(subjects),
        "backend": types.ModuleType("scripted"),
        **changes,
    }
    return Session(name="s1", sheet=sheet_of(tmp_path), seed=0, clocks=world.clocks, **settings)


def test_anchors_are_quick_and_spread_over_size() -> None:
    subjects = [subject_of(f"k{i}", 0.1 * i) for i in range(1, 13)] + [subject_of("big", 50.0)]
    anchors = pick_anchors([*subjects, subject_of("c", 0.5, "component")])
    assert len(anchors) == 3
    assert [a.macs for a in anchors] == sorted(a.macs for a in anchors)
    assert not {"big", "c"} & {a.key for a in anchors}
    assert pick_anchors([]) == ()
    assert [a.key for a in pick_anchors([subject_of("big", 50.0)])] == ["big"]


def test_a_session_measures_everything_once_and_anchors_in_every_group(
    tmp_path: Path, world: World, scripted: Scripted
) -> None:
    subjects = [subject_of(f"k{i}", 0.1 + i) for i in range(5)]
    scripted.cpu_ms = {f"k{i}": (lambda n, i=i: 10.0 + i) for i in range(5)}
    session = open_session(tmp_path, world, subjects)
    groups = [rows for rows, _, _ in session.measure(subjects)]
    anchors = {a.key for a in session.anchors}
    assert len(groups) == 2
    for rows in groups:
        assert anchors < {row.subject for row in rows}
    others = [row.subject for rows in groups for row in rows if row.subject not in anchors]
    assert sorted(others) == sorted({s.key for s in subjects} - anchors)
    row = groups[0][-1]
    assert row.latency_ms == pytest.approx(10.0 + int(row.subject[1]))
    assert (row.session, row.statistic, row.flagged, row.device) == ("s1/01", "min_cpu", "", "cpu")
    assert len(row.samples_ms) == len(row.cpu_samples_ms) == QUICK.repeats
    assert "runtime scripted" in row.environment


def test_a_group_with_slow_anchors_is_flagged_and_measured_again(
    tmp_path: Path, world: World, scripted: Scripted
) -> None:
    subjects = [subject_of(f"k{i}", 0.1 + i) for i in range(3)]
    anchor = subject_of("anchor", 0.05)
    # Alone at first 10 ms, then one slow group, then steady again.
    scripted.cpu_ms = {"anchor": lambda n: 13.0 if 12 <= n < 25 else 10.0}
    session = open_session(tmp_path, world, subjects, anchors=[anchor], protocol=replace(QUICK, group=3))
    seen = list(session.measure(subjects))
    flags = [{row.flagged for row in rows} for rows, _, _ in seen]
    assert flags == [{"anchors 30% slower than their best"}, {""}]
    assert [done for _, _, done in seen] == [0, 3]
    assert [sorted(row.subject for row in rows) for rows, _, _ in seen] == [["anchor", "k0", "k1", "k2"]] * 2


def test_a_group_that_stays_slow_keeps_its_flag_and_ends(tmp_path: Path, world: World, scripted: Scripted) -> None:
    scripted.cpu_ms = {"anchor": lambda n: 10.0 if n < 12 else 20.0}
    session = open_session(tmp_path, world, [], anchors=[subject_of("anchor", 0.05)])
    seen = list(session.measure([subject_of("k", 1.0)]))
    assert len(seen) == 1 + QUICK.retries
    assert all(row.flagged for rows, _, _ in seen for row in rows)


def test_a_subject_that_returns_nan_is_named(tmp_path: Path, world: World) -> None:
    backend = types.ModuleType("nan")
    backend.load = lambda module, inputs, target, options: Loaded(run=lambda: np.array([np.nan]), description={})  # type: ignore[attr-defined]
    session = open_session(tmp_path, world, [], backend=backend)
    with pytest.raises(NasError, match=r"subject k \(k\) returns numbers that are not finite"):
        list(session.measure([subject_of("k", 1.0)]))


# Whole runs


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, scripted: Scripted, world: World) -> list[Subject]:
    subjects = [subject_of(f"k{i}", 0.1 + i) for i in range(7)]
    monkeypatch.setattr(measure, "choose", lambda *args, **kwargs: tuple(subjects))
    monkeypatch.setattr(measure, "Clocks", lambda: world.clocks)
    stamps = iter(range(10_000))
    monkeypatch.setattr(measure, "_now", lambda: f"2026-01-01T00:00:{next(stamps):02d}+00:00")
    return subjects


def test_every_subject_gets_its_sessions_and_a_rerun_does_nothing(tmp_path: Path, chosen: list[Subject]) -> None:
    sheet = sheet_of(tmp_path)
    summary = measure.run([SPACE], sheet, sessions=2, folder=tmp_path)
    sessions = measure._sessions_of(sheet, tmp_path)
    assert {key: len(found) for key, found in sessions.items()} == {s.key: 2 for s in chosen}
    assert len(summary.sessions) == 2
    assert (summary.flagged, summary.skipped, summary.lacking) == (0, 0, 0)
    assert summary.rows == len(tables.read(sheet.slug, tmp_path))
    assert set(tables.subjects(sheet.slug, tmp_path)) == {s.key for s in chosen}
    again = measure.run([SPACE], sheet, sessions=2, folder=tmp_path)
    assert (again.rows, again.skipped) == (0, 7)
    more = measure.run([SPACE], sheet, sessions=3, folder=tmp_path)
    assert len(more.sessions) == 1


@pytest.mark.parametrize("groups", [(1,) * 9, (2, 1), (2, 1, 1), (1, 2)])
def test_wherever_a_run_is_killed_only_anchors_are_measured_more_often(
    tmp_path: Path, chosen: list[Subject], groups: tuple[int, ...]
) -> None:
    """Killed after so many groups each: a subject that most groups happen to have is no anchor yet."""
    subjects, sheet = chosen[:4], sheet_of(tmp_path, protocol="{ group = 2, least_sample_ms = 0.1, separation_s = 0 }")
    del chosen[4:]
    for survived in groups:
        seen = iter(range(100))

        def stop(message: str, done: int, total: int, survived: int = survived, seen: Iterator[int] = seen) -> None:
            if message.endswith("steady") and next(seen) + 1 == survived:
                raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            measure.run([SPACE], sheet, sessions=2, folder=tmp_path, progress=stop)
    measure.run([SPACE], sheet, sessions=2, folder=tmp_path)
    (anchor,) = pick_anchors(subjects)
    counts = {key: len(found) for key, found in measure._sessions_of(sheet, tmp_path).items()}
    assert counts.pop(anchor.key) >= 2
    assert counts == {s.key: 2 for s in subjects if s != anchor}


def test_anchors_are_what_a_session_measured_in_several_groups(tmp_path: Path, chosen: list[Subject]) -> None:
    measure.run([SPACE], sheet_of(tmp_path), sessions=1, folder=tmp_path)
    row = tables.read(sheet_of(tmp_path).slug, tmp_path)[0]

    def found(*groups: tuple[str, str, str]) -> set[str]:
        rows = [replace(row, subject=k, session=s, flagged=flag) for s, keys, flag in groups for k in keys.split()]
        return {anchor.key for anchor in measure._anchors(chosen, (), rows, row.chip)}

    two = (("a/01", "k0 k1", ""), ("a/02", "k0 k2", ""))
    assert found(*two) == {"k0"}
    assert found(("a/00", "k0 k1", "slow"), *two) == {"k0"}, "a group that was measured again"
    assert found(*two, ("b/01", "k5 k1", ""), ("b/02", "k5 k2", ""), ("b/03", "k5 k3", "")) == {"k5"}, "new ones since"
    assert found(two[0]) == {anchor.key for anchor in pick_anchors(chosen)}, "not known yet"


def test_sessions_of_another_machine_do_not_count(
    tmp_path: Path, chosen: list[Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    sheet = sheet_of(tmp_path)
    measure.run([SPACE], sheet, sessions=1, folder=tmp_path)
    monkeypatch.setattr("nas.measure.session.processor", lambda: "another chip")
    summary = measure.run([SPACE], sheet, sessions=1, folder=tmp_path)
    assert summary.skipped == 0
    assert summary.rows > 0
    assert {row.chip for row in tables.read(sheet.slug, tmp_path)[-summary.rows :]} == {"another chip"}


def test_flagged_rows_do_not_count_as_sessions(tmp_path: Path, chosen: list[Subject], scripted: Scripted) -> None:
    sheet = sheet_of(tmp_path)
    for anchor in pick_anchors(chosen):
        scripted.cpu_ms[anchor.key] = lambda n: 10.0 if n < 10 else 20.0
    summary = measure.run([SPACE], sheet, sessions=1, folder=tmp_path)
    assert summary.flagged == summary.rows > 0
    assert summary.lacking == len(chosen)


def test_sessions_are_kept_apart(tmp_path: Path, chosen: list[Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    said: list[str] = []
    sheet = sheet_of(tmp_path, protocol="{ separation_s = 300.0, least_sample_ms = 0.1 }")
    measure.run([SPACE], sheet, sessions=2, folder=tmp_path, progress=lambda message, done, total: said.append(message))
    assert len(slept) == 1
    assert 290 < slept[0] <= 300
    assert any("waiting" in message for message in said)


def test_repeatability_is_the_gap_between_sessions(tmp_path: Path, chosen: list[Subject], scripted: Scripted) -> None:
    sheet = sheet_of(tmp_path)
    measure.run([SPACE], sheet, sessions=1, folder=tmp_path)
    steady = measure.run([SPACE], sheet, sessions=2, folder=tmp_path)
    assert steady.repeatability == pytest.approx(0.0, abs=1e-6)
    rows = tables.read(sheet.slug, tmp_path)
    second = steady.sessions[0]
    slow = [replace(r, latency_ms=r.latency_ms * (1.2 if began(r.session) == second else 1.0)) for r in rows]
    assert measure._repeatability(slow, {s.key for s in chosen}) == pytest.approx(0.0, abs=1e-3), "a slow session"
    odd = [
        replace(r, latency_ms=r.latency_ms * (1.05 if r.subject == "k0" else 1.0)) if began(r.session) == second else r
        for r in rows
    ]
    assert measure._repeatability(odd, {"k0"}) == pytest.approx(0.05, rel=0.15), "one subject is no session"
    assert measure._repeatability(odd, {s.key for s in chosen}) == pytest.approx(0.0, abs=1e-3)


def test_a_target_of_published_rows_cannot_be_measured(tmp_path: Path) -> None:
    sheet = replace(sheet_of(tmp_path), backend=None)
    with pytest.raises(NasError, match="test-cpu cannot be measured from here"):
        measure.run([SPACE], sheet, folder=tmp_path)


def test_an_unavailable_backend_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.backends.onnxruntime.unavailable", lambda: "the package onnxruntime is not installed")
    with pytest.raises(NasError, match="test-cpu cannot be measured here: the package onnxruntime is not installed"):
        measure.run([SPACE], sheet_of(tmp_path), folder=tmp_path)


# The shipped sheets


@pytest.mark.parametrize(
    ("alias", "backend"), [("cpu", "onnxruntime"), ("cpu-onnxruntime", "onnxruntime"), ("cpu-tvm", "tvm")]
)
def test_the_shipped_sheets_can_be_measured(alias: str, backend: str) -> None:
    sheet = find_target(alias)
    assert sheet.backend == backend
    assert sheet.target.threads == 1
    protocol, _ = measure.settings(sheet)
    assert protocol.repeats >= 7
    assert statistic_for(sheet) == "min_cpu"
