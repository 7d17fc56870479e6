"""TVM over RPC on loopback: sent, run and timed on the server; what is missing or goes away is one sentence."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn

from nas.backends import tvm as backend
from nas.backends.tvm import remote, serve
from nas.backends.tvm.options import Options, Rpc
from nas.device import DeviceSheet, Target
from nas.errors import NasError, UsageError
from nas.exporters.tvm.machine import host
from nas.measure.session import Session
from nas.measure.subjects import Subject
from nas.measure.timing import Protocol
from nas.tables import Measurement

pytest.importorskip("tvm")
TARGET = Target(device="board", runtime="tvm-untuned", precision="fp32")
QUICK = Protocol(repeats=2, most_warm_up=2, least_sample_ms=0.1, round_ms=0.1, group=1, drift=1e9, retries=0)


class Small(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.linear(x), dim=-1)


def options(served: serve.Served, key: str | None = None, **more: Any) -> dict[str, Any]:
    rpc = {"host": served.host, "port": served.port, **({"key": key} if key else {}), "timeout_s": 120}
    return {"untuned": True, "rpc": rpc, **more}


@contextlib.contextmanager
def registered(key: str) -> Iterator[tuple[serve.Served, serve.Served]]:
    """A tracker and a server that has registered with it."""
    from tvm import rpc

    with serve.tracker(port=serve.free_port()) as at, serve.server(port=serve.free_port(), key=key, at=at) as served:
        deadline = time.monotonic() + 300
        while not rpc.connect_tracker(at.host, at.port).summary()["queue_info"].get(key, {}).get("free"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield at, served


@pytest.fixture(autouse=True)
def _no_connections() -> Iterator[None]:
    yield
    remote._connections.clear()
    remote._chips.clear()


@pytest.mark.parametrize(("key", "what"), [(None, "RPC server"), ("pi", "tracker")])
def test_nothing_there_is_said_at_once(key: str | None, what: str) -> None:
    rpc = Rpc(host="127.0.0.1", port=serve.free_port(), key=key)
    began = time.monotonic()
    with pytest.raises(NasError, match=f"no TVM {what} answers at 127.0.0.1:{rpc.port}: Connection refused") as caught:
        remote.connect(rpc)
    assert time.monotonic() - began < remote._REACH_S + 1
    assert f"--port {rpc.port}" in str(caught.value.hint)


def test_a_device_that_says_nothing_is_given_up() -> None:
    rpc = Rpc(host="127.0.0.1", port=1, timeout_s=0.05)
    with pytest.raises(NasError, match=r"127\.0\.0\.1:1 did not answer within 0\.05 s"):
        remote.within(rpc, lambda: time.sleep(5))
    assert remote.within(rpc, lambda: 3) == 3


def test_what_the_device_raises_is_raised_here() -> None:
    with pytest.raises(KeyError, match="there"):
        remote.within(Rpc(host="127.0.0.1", port=1), lambda: {}["there"])


@pytest.mark.parametrize(
    ("summary", "named"),
    [
        ({"server_info": [], "queue_info": {}}, "has no device under the key 'pi'; it has: none"),
        ({"server_info": [{"key": "server:phone"}], "queue_info": {}}, "it has: phone"),
        ({"server_info": [{"key": "server:pi"}], "queue_info": {"pi": {"free": 0}}}, "is in use"),
    ],
)
def test_a_tracker_without_the_device_is_said(summary: dict[str, Any], named: str) -> None:
    with pytest.raises(NasError, match=named):
        remote._wait_until_free(Rpc(host="127.0.0.1", port=1, key="pi"), lambda: summary, most_s=0)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("192.0.2.7", False)],
)
def test_only_loopback_is_loopback(host: str, loopback: bool) -> None:
    assert serve.is_loopback(host) is loopback


def test_a_taken_port_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(NasError, match=f"cannot bind 127.0.0.1:{port}"), serve.server(port=port):
            pass


@pytest.mark.parametrize("change", [{"precision": "fp16"}, {"runtime": "coreml"}])
def test_another_target_is_refused(change: dict[str, str]) -> None:
    target = Target(**{"device": "board", "runtime": "tvm", "precision": "fp32", **change})
    with pytest.raises(UsageError, match="cannot run target board"):
        backend.load(Small(), {"x": torch.zeros(1, 4)}, target, {"rpc": {"host": "127.0.0.1", "port": 1}})


def test_a_device_without_llvm_is_called_what_the_sheet_says() -> None:
    nothing = SimpleNamespace(get_function={}.__getattribute__)
    assert remote._asked(nothing) is None
    assert remote._stated(Options(target={"kind": "llvm", "mcpu": "cortex-a72", "mtriple": "x"})) == "cortex-a72"
    assert remote._stated(Options(target={"kind": "llvm", "mtriple": "aarch64-linux-gnu"})) == "aarch64-linux-gnu"


@pytest.mark.slow
def test_sent_run_timed_and_killed_in_the_middle(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs = Small().eval(), {"x": torch.randn(1, 4)}
    with registered("pi") as (at, served):
        _tune_there(at, tmp_path / "board.records.jsonl")
        loaded = backend.load(module, inputs, TARGET, options(at, "pi"))
        # The server is this machine, asked over the wire.
        assert loaded.describe()["mcpu"] == backend.chip(TARGET, options(at, "pi")) == host(1)["mcpu"]
        with torch.no_grad():
            np.testing.assert_allclose(loaded(), module(**inputs).numpy(), atol=1e-6)
        assert loaded.device_ms is not None
        assert loaded.device_ms(3) > 0
        assert loaded.describe()["provider"].endswith("over RPC")
        assert loaded.describe()["threads"] == 1
        second = backend.load(Small(6).eval(), inputs, TARGET, options(at, "pi"))
        assert second().shape == (1, 6)  # on the same connection: the server has room for one
        _measure_until_killed(at, served)
        with pytest.raises(NasError, match="went away or failed"):
            loaded()


def _tune_there(at: serve.Served, path: Path) -> None:
    """Trials run on the device; the next client finds it free again."""
    target = replace(TARGET, runtime="tvm")
    module, inputs = Small(2).eval(), {"x": torch.zeros(1, 4)}
    tuned = {**options(at, "pi"), "untuned": False, "tune": True, "trials": 1, "records": str(path)}
    assert backend.chip(target, tuned)  # asking does not keep the device from being tuned on
    backend.prepare([(module, inputs)], target, tuned)
    assert len(path.read_text().splitlines()) == 2
    loaded = backend.load(module, inputs, target, {**tuned, "tune": False})
    assert loaded.describe()["tuning"] == "tuned (1 of 1 kernels have records)"
    with torch.no_grad():
        np.testing.assert_allclose(loaded(), module(**inputs).numpy(), atol=1e-6)
    with pytest.raises(NasError, match="1 of 1 kernels have no tuning record") as caught:
        backend.load(Small(5).eval(), inputs, target, tuned)
    assert "before anything is loaded on the device" in str(caught.value.hint)


def _measure_until_killed(at: serve.Served, served: serve.Served) -> None:
    """Measures three subjects; the server is killed when the first one's rows are there."""
    subjects = [subject(f"s{width}", width) for width in (3, 4, 5)]
    sheet = DeviceSheet(
        target=TARGET,
        path=Path("board--tvm-untuned--fp32.toml"),
        chip="a board",
        aliases=(),
        summary="",
        backend="tvm",
        shared=False,
        options=options(at, "pi"),
    )
    session = Session(name="now", sheet=sheet, backend=backend, protocol=QUICK, anchors=(), seed=0)
    rows: list[Measurement] = []

    def measure() -> None:
        for found, _, _ in session.measure(subjects):
            rows.extend(found)
            served.kill()

    with pytest.raises(NasError, match=rf"the device at {at.address} \(key 'pi'\) went away or failed") as caught:
        measure()
    assert "rows already measured are kept" in str(caught.value.hint)
    assert "\n" not in caught.value.message
    assert len(rows) == 1
    assert rows[0].cpu_samples_ms == ()
    assert rows[0].latency_ms > 0
    with pytest.raises(NasError, match="no device under the key 'pi'"):
        backend.load(Small().eval(), {"x": torch.zeros(1, 4)}, TARGET, options(at, "pi"))


def subject(key: str, width: int) -> Subject:
    return Subject(
        key=key,
        kind="block",
        name=key,
        spec={},
        resolution_px=None,
        build=lambda batch: (Small(width), {"x": torch.zeros(batch, 4)}),
        features=None,
    )


@pytest.mark.slow
def test_serving_tells_what_it_binds_and_leaves_nothing(tmp_path: Path) -> None:
    port, tracker_port = serve.free_port(), serve.free_port()
    script = (
        "import functools, sys; from nas.backends.tvm.serve import serve;"
        f"serve('127.0.0.1', {port}, tracker_port={tracker_port}, key='k',"
        " say=functools.partial(print, file=sys.stderr, flush=True))"
    )
    run = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    try:
        assert run.stderr is not None
        said = [run.stderr.readline().strip() for _ in range(2)]
        children = psutil.Process(run.pid).children(recursive=True)
    finally:
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=60)
    assert said == [
        f"TVM tracker on 127.0.0.1:{tracker_port}",
        f"TVM RPC server on 127.0.0.1:{port}, registered as 'k'",
    ]
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_an_open_address_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    process = SimpleNamespace(wait=lambda: 3)

    @contextlib.contextmanager
    def started(host: str, port: int, **_: Any) -> Iterator[serve.Served]:
        yield serve.Served(what="server", host=host, port=port, process=process)  # type: ignore[arg-type]

    monkeypatch.setattr(serve, "server", started)
    with pytest.raises(NasError, match="ended by itself with exit code 3"):
        serve.serve("0.0.0.0", 9090, say=said.append)
    assert "no authentication" in said[0]
    assert "0.0.0.0" in said[0]
    said.clear()
    with pytest.raises(NasError, match="ended by itself"):
        serve.serve("127.0.0.1", 9090, say=said.append)
    assert said == ["TVM RPC server on 127.0.0.1:9090"]
