"""TVM's options: what a sheet may say, and what contradicts itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nas.backends.tvm.compiling import _check_runtime, _tracker
from nas.backends.tvm.options import UNTUNED, Options, Rpc, read
from nas.device import Target
from nas.errors import UsageError

RPC = {"host": "127.0.0.1", "port": 9190}
TUNED = Target(device="cpu", runtime="tvm", precision="fp32")
PLAIN = Target(device="cpu", runtime=UNTUNED, precision="fp32")


def test_nothing_said_is_tuned_here_from_the_target_s_own_records(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "latency_tables").mkdir()
    monkeypatch.setenv("NAS_DATA", str(tmp_path))
    options = read({})
    assert (options.untuned, options.tune, options.rpc) == (False, False, None)
    assert options.records_path("cpu--tvm--fp32") == tmp_path / "latency_tables" / "cpu--tvm--fp32.records.jsonl"
    assert read({"records": "/elsewhere/pi.jsonl"}).records_path("x") == Path("/elsewhere/pi.jsonl")


def test_a_device_s_table_is_read() -> None:
    target = {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}
    options = read({"rpc": {**RPC, "key": "pi"}, "target": target, "compiler": "aarch64-linux-gnu-g++", "trials": 3})
    assert options.rpc == Rpc(host="127.0.0.1", port=9190, key="pi")
    assert (options.target, options.trials) == (target, 3)
    assert options.rpc.address == "127.0.0.1:9190 (key 'pi')"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tuned": True}, "unknown option 'tuned'"),
        ({"untuned": 1}, "'untuned' .* must be true or false, got 1"),
        ({"trials": 0}, "'trials' .* above 0, got 0"),
        ({"trials": True}, "'trials' .* got True"),
        ({"records": 3}, "'records' .* a file name"),
        ({"rpc": "127.0.0.1:9190"}, "'rpc' .* a table"),
        ({"rpc": {"port": 1}}, "rpc .* lacks host"),
        ({"rpc": {**RPC, "port": "9190"}}, "'port' .* a port number, got '9190'"),
        ({"rpc": {**RPC, "tracker": "x"}}, "unknown option 'tracker' in rpc"),
        ({"rpc": {**RPC, "timeout_s": 0}}, "'timeout_s'"),
        ({"untuned": True, "tune": True}, "untuned and tune .* contradict"),
        ({"target": {"kind": "llvm"}}, "target and compiler .* are for a device behind rpc"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        read(options)


@pytest.mark.parametrize(("target", "untuned"), [(TUNED, True), (PLAIN, False)])
def test_an_untuned_target_is_a_target_of_its_own(target: Target, untuned: bool) -> None:
    with pytest.raises(UsageError, match="an untuned target is another target, with runtime 'tvm-untuned'"):
        _check_runtime(target, Options(untuned=untuned))
    _check_runtime(target, Options(untuned=not untuned))


def test_tuning_on_a_device_needs_a_tracker() -> None:
    with pytest.raises(UsageError, match="through a tracker"):
        _tracker(Options(rpc=Rpc(host="127.0.0.1", port=9090)), TUNED)
    tracker = _tracker(Options(rpc=Rpc(host="127.0.0.1", port=9190, key="pi")), TUNED)
    assert tracker is not None
    assert (tracker.host, tracker.port, tracker.key) == ("127.0.0.1", 9190, "pi")
    assert _tracker(Options(), TUNED) is None
