"""Tuning records: the best schedule of every kernel, one line of JSON each, in one file per machine.

The first line names the machine and TVM's version. A kernel is known by TVM's structural hash, so that subjects share
its record whatever its name in them; of several lines for one kernel the fastest counts. TVM's own JSON database would
repeat every kernel's program, some 80 kB where the schedule takes three.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nas.errors import NasError
from nas.paths import atomic_write


@dataclass(frozen=True, kw_only=True)
class Record:
    """The best schedule found for one kernel.

    Attributes:
        kernel: TVM's structural hash.
        name: what the kernel is called in the subject that it was tuned in.
        best_ms: time of the kernel with this schedule, when it was tuned.
        trials: how many schedules were tried.
        schedule: TVM's tuning record (trace, seconds, target, arguments).
    """

    kernel: str
    name: str
    best_ms: float
    trials: int
    schedule: list[Any] = field(repr=False)


def kernel_hash(kernel: Any) -> str:
    """TVM's structural hash of a kernel's IRModule."""
    from tvm.s_tir import meta_schedule as ms

    return str(ms.database.Workload(kernel).as_json()[0])


def read(path: Path, machine: Mapping[str, Any]) -> dict[str, Record]:
    """The fastest record of every kernel; none where the file does not exist.

    A last line that a killed process left half written is passed over.

    Raises:
        NasError: the file is of another machine, or a line before the last is damaged.
    """
    if not path.is_file():
        return {}
    lines = path.read_text().splitlines()
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line)
            if number == 1:
                _check_machine(path, data["machine"], machine)
                continue
            record = Record(**data)
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            if number == len(lines) > 1:
                break
            raise NasError(f"{path}:{number}: not a tuning record: {error}") from error
        known = records.get(record.kernel)
        if known is None or record.best_ms < known.best_ms:
            records[record.kernel] = record
    return records


def append(path: Path, record: Record, machine: Mapping[str, Any]) -> None:
    """Adds a record; it is on disk when this returns."""
    if not path.is_file():
        write(path, {}, machine)
    text = path.read_text()
    start = "" if text.endswith("\n") else "\n" if _is_json(text.splitlines()[-1]) else None
    if start is None:
        # What a killed process left half written.
        atomic_write(path, "".join(f"{line}\n" for line in text.splitlines()[:-1]))
        start = ""
    with path.open("a") as stream:
        stream.write(f"{start}{_line(record)}\n")
        stream.flush()
        os.fsync(stream.fileno())


def write(path: Path, records: Mapping[str, Record], machine: Mapping[str, Any]) -> Path:
    """Replaces the file: one line per kernel, sorted by name."""
    import tvm

    header = json.dumps({"machine": dict(machine), "tvm": tvm.__version__}, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(records.values(), key=lambda record: (record.name, record.kernel))
    return atomic_write(path, "".join(f"{line}\n" for line in (header, *map(_line, ordered))))


def database(kernels: Mapping[str, Any], records: Mapping[str, Record]) -> tuple[Any, dict[str, Any]]:
    """The records of some kernels as TVM takes them, and the kernels that have none.

    Args:
        kernels: name -> IRModule.
        records: as `read` gives them.
    """
    from tvm.s_tir import meta_schedule as ms

    found, lacking = ms.database.MemoryDatabase(), {}
    for name, kernel in kernels.items():
        record = records.get(kernel_hash(kernel))
        if record is None:
            lacking[name] = kernel
            continue
        workload = found.commit_workload(kernel)
        found.commit_tuning_record(ms.database.TuningRecord.from_json(record.schedule, workload))
    return found, lacking


def best(found: Any, kernel: Any, name: str, trials: int) -> Record | None:
    """The fastest valid record of a database that holds one kernel; None where no schedule ran.

    A trial is as fast as its fastest repeat: others on the machine only ever add time.
    """
    timed = [(_least_s(record.run_secs), record) for record in found.get_all_tuning_records()]
    seconds, record = min(timed, key=lambda pair: pair[0], default=(math.inf, None))
    if record is None or seconds == math.inf:
        return None
    return Record(
        kernel=kernel_hash(kernel),
        name=name,
        best_ms=round(1e3 * seconds, 6),
        trials=trials,
        schedule=plain(record.as_json()),
    )


def _least_s(repeats: Any) -> float:
    """The fastest repeat in s; a schedule that failed has none, or TVM's 1e9 s and more."""
    return min((s for s in map(float, repeats or ()) if 0 < s < 1e9), default=math.inf)


def plain(value: Any) -> Any:
    """TVM's arrays, texts and numbers as Python's."""
    if value is None or isinstance(value, (bool, str, int, float)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "__iter__"):
        return [plain(item) for item in value]
    return value.value


def _check_machine(path: Path, tuned: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if dict(tuned) != dict(wanted):
        raise NasError(
            f"{path}: its kernels were tuned for {_words(tuned)}, this target is {_words(wanted)}",
            hint='name another file in the device sheet: [options] records = "..."',
        )


def _line(record: Record) -> str:
    return json.dumps(record.__dict__, separators=(",", ":"))


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True


def _words(machine: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(machine.items()))
