"""A target of tiny networks with rows made up from their operators, shared by the tests of what `nas measure` does."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nas import measure, tables
from nas.cli import main
from nas.device import DeviceSheet, load_sheet
from nas.latency.problem import roofline
from nas.measure.subjects import Subject, table_subject
from nas.measure.timing import Clocks, Protocol
from nas.provenance import processor
from nas.space import SearchSpace, load_space
from tests.toy_space import write_space

# A protocol of few calls, for a clock of our own.
QUICK = Protocol(repeats=7, least_sample_ms=1.0, round_ms=1.0, most_per_round=1, group=2, separation_s=0.0)
SLUG = "cpu--onnxruntime--fp32"
SHEET = """
device = "{device}"
chip = "{chip}"
runtime = "{runtime}"
precision = "fp32"
aliases = ["{alias}"]
shared = true
{more}
[roofline]
ms_per_gmac = 25.0
ms_per_gb = 125.0
ms_per_op = 0.005
[protocol]
separation_s = 0.0
group = 3
drift = 10.0
components = false
most_block_gmac = 0.05
least_network_gmac = 0.0
most_network_gmac = 0.3
{last}
"""


def sheet_in(
    folder: Path,
    alias: str = "tiny",
    *,
    device: str = "cpu",
    runtime: str = "onnxruntime",
    backend: str | None = "onnxruntime",
    chip: str | None = None,
    last: str = "",
) -> DeviceSheet:
    """A sheet in `folder`; tables beside it are its target's."""
    folder.mkdir(parents=True, exist_ok=True)
    more = "" if backend is None else f'backend = "{backend}"'
    path = folder / f"{device}--{runtime}--fp32.toml"
    found = processor() if chip is None else chip
    path.write_text(SHEET.format(device=device, chip=found, runtime=runtime, alias=alias, more=more, last=last))
    return load_sheet(path)


@functools.cache
def toy_space() -> SearchSpace:
    return load_space(str(write_space(Path(tempfile.mkdtemp()))))


@functools.cache
def toy_networks(count: int = 8) -> tuple[Subject, ...]:
    limits = measure.Limits(components=False, least_network_gmac=0.0, most_network_gmac=0.3)
    return measure.choose([toy_space()], 0, count, limits=limits)


def predicted(subject: Subject, sheet: DeviceSheet) -> float:
    assert subject.features is not None
    return float(subject.features @ roofline(sheet))


def fill(sheet: DeviceSheet, count: int = 8, sessions: int = 2, factor: float = 1.0) -> tuple[Subject, ...]:
    """Writes rows of tiny networks to the target's table: what the roofline says, times `factor`, within a few %."""
    subjects, folder = toy_networks(count), sheet.path.parent
    rng = np.random.default_rng(0)
    rows = []
    for session in range(sessions):
        for subject in subjects:
            rows.append(
                tables.Measurement(
                    target=sheet.slug,
                    subject=subject.key,
                    subject_kind="network",
                    latency_ms=predicted(subject, sheet) * factor * float(rng.normal(1, 0.02)),
                    statistic="min_cpu",
                    session=f"2026-01-0{session + 1}T00:00:00+00:00/01",
                    device=sheet.target.device,
                    chip=sheet.chip,
                    resolution_px=subject.resolution_px,
                    source="measured",
                    measured_at=f"2026-01-0{session + 1}T00:00:00+00:00",
                )
            )
    tables.write_subjects(sheet.slug, [table_subject(s) for s in subjects], folder)
    tables.append(sheet.slug, rows, folder)
    return subjects


def run(capsys, *arguments):
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def said(err):
    """The one sentence of a failure."""
    lines = [line for line in err.splitlines() if line.startswith("nas: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


def brought(folder, lines, header="subject,latency_ms"):
    path = folder / "rows.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def times(sheet, factor=1.0, count=5):
    return [(s.key, predicted(s, sheet) * factor) for s in toy_networks()[:count]]


class World:
    """A machine whose time passes only when a subject runs: wall and CPU time are scripted per call."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.calls: list[str] = []

    @property
    def clocks(self) -> Clocks:
        return Clocks(wall=lambda: self.wall, cpu=lambda: self.cpu)

    def subject(self, name: str, cpu_ms: Callable[[int], float], waiting: float = 1.0) -> Callable[[], None]:
        def run() -> None:
            took = cpu_ms(self.calls.count(name)) / 1e3
            self.calls.append(name)
            self.cpu += took
            self.wall += took * waiting

        return run
