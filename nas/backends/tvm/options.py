"""What a device sheet's [options] may say to TVM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nas.backends import check_options
from nas.errors import UsageError, unknown
from nas.paths import data_dir

UNTUNED = "tvm-untuned"  # the runtime of a target without schedules; its rows never mix with a tuned target's


@dataclass(frozen=True, kw_only=True)
class Rpc:
    """A device that runs TVM's RPC server.

    Attributes:
        host, port: of its server, or of the tracker that it is registered with.
        key: under which it is registered with the tracker; None: `host` and `port` are the server's own.
        timeout_s: an answer that takes longer counts as a device that went away.
    """

    host: str
    port: int
    key: str | None = None
    timeout_s: float = 600.0

    @property
    def address(self) -> str:
        """host:port, with the key where there is a tracker."""
        return f"{self.host}:{self.port}" + (f" (key {self.key!r})" if self.key else "")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How kernels are scheduled, and where they run.

    Attributes:
        untuned: compile without schedules; the target's runtime must then be `UNTUNED`.
        records: file of the tuning records, in the folder of the latency tables unless absolute; None:
            "<slug>.records.jsonl".
        tune: tune kernels that have no record when a module is loaded; else such a module is refused.
        trials: schedules tried per kernel.
        target: TVM's table of the machine, such as {kind = "llvm", mtriple = "aarch64-linux-gnu"}; None: this machine.
        compiler: links what is sent to the device here, such as "aarch64-linux-gnu-g++"; None: the device links.
        rpc: the device; None: this machine.
    """

    untuned: bool = False
    records: str | None = None
    tune: bool = False
    trials: int = 8
    target: Mapping[str, Any] | None = None
    compiler: str | None = None
    rpc: Rpc | None = None

    def records_path(self, slug: str) -> Path:
        """The file of the tuning records of the target `slug`."""
        return data_dir("latency_tables") / (self.records or f"{slug}.records.jsonl")


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "untuned": (bool, "true or false"),
    "records": (str, "a file name"),
    "tune": (bool, "true or false"),
    "trials": (int, "a whole number above 0"),
    "target": (dict, "a table"),
    "compiler": (str, "a command"),
    "rpc": (dict, "a table"),
    "host": (str, "a text"),
    "port": (int, "a port number"),
    "key": (str, "a text"),
    "timeout_s": ((int, float), "a number of seconds above 0"),
}


def read(options: Mapping[str, Any] | None) -> Options:
    """The options of a sheet, checked.

    Raises:
        UsageError: an unknown option, a value of the wrong form, or two that contradict each other.
    """
    given = check_options(options, [f.name for f in fields(Options)], runtime="tvm")
    _check_kinds(given)
    if "rpc" in given:
        given["rpc"] = _rpc(given["rpc"])
    found = Options(**given)
    if found.untuned and found.tune:
        raise UsageError("[options] untuned and tune of a device sheet contradict each other")
    if found.rpc is None and (found.target is not None or found.compiler is not None):
        raise UsageError("[options] target and compiler of a device sheet are for a device behind rpc = {host=, port=}")
    return found


def _rpc(table: Mapping[str, Any]) -> Rpc:
    known = [f.name for f in fields(Rpc)]
    for name in table:
        if name not in known:
            raise unknown("option", name, known, where="rpc of a device sheet for backend tvm")
    _check_kinds(table)
    missing = [name for name in ("host", "port") if name not in table]
    if missing:
        raise UsageError(f'rpc of a device sheet lacks {" and ".join(missing)}: rpc = {{host = "...", port = 9090}}')
    return Rpc(**table)


def _check_kinds(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        kind, words = _KINDS[name]
        right = isinstance(value, kind) and (isinstance(value, bool) == (kind is bool))
        if not right or (name in ("trials", "port", "timeout_s") and value <= 0):
            raise UsageError(f"option {name!r} of a device sheet for backend tvm must be {words}, got {value!r}")
