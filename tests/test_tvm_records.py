"""Tuning records: read back whole, the fastest first, half-written lines passed over, one machine per file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nas.errors import NasError
from nas.exporters.tvm import records
from nas.exporters.tvm.records import Record

pytest.importorskip("tvm")
MACHINE = {"kind": "llvm", "mcpu": "cascadelake", "num-cores": 1}


def record(kernel: str = "1", ms: float = 1.0, **changes: Any) -> Record:
    values = {"kernel": kernel, "name": f"matmul{kernel}", "best_ms": ms, "trials": 4, "schedule": [["trace"], [ms]]}
    return Record(**{**values, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cpu.records.jsonl"


def test_what_is_appended_is_read(path: Path) -> None:
    records.append(path, record("1"), MACHINE)
    records.append(path, record("2", 0.5), MACHINE)
    assert records.read(path, MACHINE) == {"1": record("1"), "2": record("2", 0.5)}
    assert json.loads(path.read_text().splitlines()[0])["machine"] == MACHINE


def test_no_file_is_no_records(path: Path) -> None:
    assert records.read(path, MACHINE) == {}


def test_the_fastest_of_a_kernel_counts_and_alone_is_written(path: Path) -> None:
    for ms in (2.0, 1.0, 3.0):
        records.append(path, record("1", ms), MACHINE)
    found = records.read(path, MACHINE)
    assert found["1"].best_ms == 1.0
    records.write(path, found, MACHINE)
    assert len(path.read_text().splitlines()) == 2
    assert records.read(path, MACHINE) == found


@pytest.mark.parametrize("kept", [1, 40, 60])
def test_a_half_written_last_line_costs_only_itself(path: Path, kept: int) -> None:
    records.append(path, record("1"), MACHINE)
    whole = path.read_text()
    records.append(path, record("2"), MACHINE)
    path.write_text(path.read_text()[: len(whole) + kept])
    assert set(records.read(path, MACHINE)) == {"1"}
    records.append(path, record("3"), MACHINE)
    assert set(records.read(path, MACHINE)) == {"1", "3"}


def test_a_missing_last_newline_loses_nothing(path: Path) -> None:
    records.append(path, record("1"), MACHINE)
    path.write_text(path.read_text().rstrip("\n"))
    records.append(path, record("2"), MACHINE)
    assert set(records.read(path, MACHINE)) == {"1", "2"}


def test_a_damaged_line_in_the_middle_is_named(path: Path) -> None:
    records.append(path, record("1"), MACHINE)
    records.append(path, record("2"), MACHINE)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:30], lines[2]]) + "\n")
    with pytest.raises(NasError, match=r"cpu\.records\.jsonl:2: not a tuning record"):
        records.read(path, MACHINE)


def test_a_file_without_its_header_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("{}\n")
    with pytest.raises(NasError, match=r":1: not a tuning record"):
        records.read(path, MACHINE)


def test_records_of_another_machine_are_refused(path: Path) -> None:
    records.append(path, record(), MACHINE)
    with pytest.raises(NasError, match="tuned for kind=llvm mcpu=cascadelake num-cores=1") as caught:
        records.read(path, {**MACHINE, "mcpu": "znver4"})
    assert "mcpu=znver4" in caught.value.message
    assert "records =" in str(caught.value.hint)
