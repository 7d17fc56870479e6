"""TVM's RPC server and tracker as processes that bind what they are told to and leave nothing behind."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import IO

from nas.errors import NasError

_START_S = 300.0  # the server imports TVM: seconds on a quiet machine, minutes on a crowded one


@dataclass(frozen=True, kw_only=True)
class Served:
    """A running server or tracker.

    Attributes:
        process: leader of a process group of its own, which holds the workers that do the serving.
    """

    what: str
    host: str
    port: int
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        """host:port."""
        return f"{self.host}:{self.port}"

    def kill(self) -> None:
        """Ends the process and every worker of it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def tracker(host: str = "127.0.0.1", port: int = 9190) -> Iterator[Served]:
    """A tracker: devices register with it, clients ask it for one.

    Raises:
        NasError: it does not start (the port is taken).
    """
    with _started("tracker", "tvm.exec.rpc_tracker", host, port, []) as served:
        yield served


@contextlib.contextmanager
def server(
    host: str = "127.0.0.1", port: int = 9090, *, key: str | None = None, at: Served | None = None
) -> Iterator[Served]:
    """A server that runs what its client sends; registered under `key` with the tracker `at`, where there is one.

    Raises:
        NasError: it does not start (the port is taken).
    """
    extra = ["--key", key or "device", "--tracker", at.address] if at is not None else []
    with _started("server", "tvm.exec.rpc_server", host, port, extra) as served:
        yield served


def serve(
    host: str = "127.0.0.1",
    port: int = 9090,
    *,
    tracker_port: int | None = None,
    key: str = "device",
    say: Callable[[str], None],
) -> None:
    """Serves until interrupted (Ctrl-C or SIGTERM).

    Args:
        host: the address to bind; anything but a loopback address is warned about.
        port: of the server.
        tracker_port: also start a tracker on this port and register the server with it.
        key: under which it is registered.
        say: where messages go.

    Raises:
        NasError: a process does not start, or ends by itself.
    """
    if not is_loopback(host):
        say(
            f"warning: {host} is reachable from other machines, and TVM's RPC has no authentication: whoever reaches"
            f" port {port} can run any code here as this user"
        )
    with contextlib.ExitStack() as stack, _terminable():
        at = stack.enter_context(tracker(host, tracker_port)) if tracker_port is not None else None
        if at is not None:
            say(f"TVM tracker on {at.address}")
        served = stack.enter_context(server(host, port, key=key, at=at))
        say(f"TVM RPC server on {served.address}" + (f", registered as {key!r}" if at is not None else ""))
        with contextlib.suppress(KeyboardInterrupt):
            code = served.process.wait()
            raise NasError(f"the TVM RPC server on {served.address} ended by itself with exit code {code}")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _started(what: str, module: str, host: str, port: int, extra: list[str]) -> Iterator[Served]:
    # The range holds one port: TVM would otherwise take the next one when this is taken.
    _check_free(what, host, port)
    command = [sys.executable, "-m", module, "--host", host, "--port", str(port), "--port-end", str(port + 1), *extra]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        served = Served(what=what, host=host, port=port, process=process)
        try:
            _wait(served, log)
            yield served
        finally:
            served.kill()


def _check_free(what: str, host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise NasError(f"the TVM {what} cannot bind {host}:{port}: {error.strerror}") from error


def _wait(served: Served, log: IO[bytes]) -> None:
    """Until the port answers."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if served.process.poll() is not None:
            raise NasError(f"the TVM {served.what} on {served.address} did not start: {_last_line(log)}")
        with contextlib.suppress(OSError):
            socket.create_connection((served.host, served.port), timeout=1).close()
            return
        time.sleep(0.1)
    raise NasError(f"the TVM {served.what} on {served.address} did not answer within {_START_S:g} s: {_last_line(log)}")


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block like Ctrl-C, so that the servers are ended too."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
