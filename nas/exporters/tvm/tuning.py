"""Tunes kernels with MetaSchedule in a process group of its own, a few random schedules per kernel.

The tuner starts worker processes that outlive it, so that the whole group is killed at the end. A kernel's record is on
disk before the next kernel is begun: a run that is killed keeps what it has found, and the next one goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from nas.errors import NasError

LOG = logging.getLogger("nas.tvm")


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard a kernel is tuned.

    Attributes:
        trials: random schedules per kernel.
        least_run_ms: length of one repeat of a schedule.
        seed: of the schedules.
    """

    trials: int = 8
    least_run_ms: int = 10
    seed: int = 1


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """A tracker whose devices run the trials instead of this machine."""

    host: str
    port: int
    key: str


def tune(
    kernels: Mapping[str, Any],
    path: Path,
    *,
    target: Mapping[str, Any],
    machine: Mapping[str, Any],
    effort: Effort,
    tracker: Tracker | None = None,
) -> None:
    """Measures schedules of some kernels and appends the best of each to the records.

    Args:
        kernels: name -> IRModule; each is tuned, whatever the records have.
        path: of the records; made if need be.
        target: the table that the target is made from.
        machine: its `identity`.
        effort: trials per kernel.
        tracker: None: the trials run here.

    Raises:
        NasError: the tuner stopped, or found no schedule that runs; the records that it wrote are kept.
    """
    import tvm

    if not kernels:
        return
    with tempfile.TemporaryDirectory(prefix="nas-tvm-") as work:
        request = {
            "kernels": {name: tvm.ir.save_json(kernel) for name, kernel in kernels.items()},
            "records": str(path),
            "target": dict(target),
            "machine": dict(machine),
            "effort": asdict(effort),
            "tracker": asdict(tracker) if tracker else None,
        }
        (Path(work) / "request.json").write_text(json.dumps(request))
        with (Path(work) / "tuner.log").open("w+") as log:
            code = _run(Path(work) / "request.json", log, len(kernels))
            log.seek(0)
            said = [line for line in log.read().splitlines() if line.strip()]
    if code != 0:
        raise NasError(
            f"tuning {len(kernels)} kernels stopped with exit code {code}: {said[-1] if said else 'no message'};"
            f" the records in {path} are kept",
            hint="run the same command again: kernels that have records are not tuned twice",
        )


def _run(request: Path, log: IO[str], count: int) -> int:
    """Runs the child in its own session, forwards its progress, and leaves none of its processes behind."""
    command = [sys.executable, "-m", "nas.exporters.tvm._tuner", str(request)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True) as child:
        try:
            for line in child.stdout or ():
                if line.startswith("{"):
                    told = json.loads(line)
                    LOG.info("kernel %d of %d: %s, %s", told["done"], count, told["kernel"], told["best"])
            return child.wait()
        finally:
            # The group outlives its leader while a worker lives.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
