"""A device that runs TVM's RPC server: compile here, send, run and time there.

The server serves one client at a time, so that all modules of a process share one connection.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, nn

from nas.backends import Loaded
from nas.backends.tvm.compiling import Compiled, compile_module
from nas.backends.tvm.options import UNTUNED, Options, Rpc
from nas.device import Target
from nas.errors import NasError, UsageError
from nas.exporters.tvm.machine import words, write_library

_REACH_S = 3.0
_FREE_S = 30.0  # a server registers again some seconds after its last client has left
_CONTINUE = "start the server again and run the same command: rows already measured are kept"
_connections: dict[Rpc, Any] = {}
_chips: dict[Rpc, str] = {}
_numbers = itertools.count()
_T = TypeVar("_T")


def load(module: nn.Module, inputs: Mapping[str, Tensor], target: Target, options: Options) -> Loaded:
    """Compiles `module`, sends it to the device and binds `inputs` there; `device_ms` is the device's own clock.

    Raises:
        UsageError: the target asks for another runtime or precision.
        NasError: the device cannot be reached, went away, or runs another number of threads.
    """
    rpc = options.rpc
    assert rpc is not None
    _check(target, inputs)
    if rpc not in _connections:
        reach(rpc)
    compiled = compile_module(module, inputs, target, options, held=rpc in _connections)
    session = connect(rpc)
    with _naming(rpc):
        return within(rpc, lambda: _bind(session, compiled, inputs, target, options, rpc))


def connect(rpc: Rpc) -> Any:
    """The connection to a device, opened at the first call.

    Raises:
        NasError: nothing listens there, or the tracker has no free server of that key.
    """
    if rpc in _connections:
        return _connections[rpc]
    reach(rpc)
    from tvm import rpc as tvm_rpc

    with _naming(rpc):
        if rpc.key is None:
            session = within(rpc, lambda: tvm_rpc.connect(rpc.host, rpc.port))
        else:
            tracker = within(rpc, lambda: tvm_rpc.connect_tracker(rpc.host, rpc.port))
            _wait_until_free(rpc, tracker.summary)
            session = within(rpc, lambda: tracker.request(rpc.key, max_retry=1))
    _connections[rpc] = session
    return session


def chip(rpc: Rpc, options: Options) -> str:
    """The device's processor as LLVM there calls it; where its TVM has no LLVM, what the target table says.

    The connection is closed again: while one is open, the device cannot be tuned on.
    """
    if rpc not in _chips:
        held = rpc in _connections
        session = connect(rpc)
        with _naming(rpc):
            _chips[rpc] = within(rpc, lambda: _asked(session)) or _stated(options)
        if not held:
            disconnect(rpc)
    return _chips[rpc]


def _asked(session: Any) -> str | None:
    try:
        return str(session.get_function("target.llvm_get_system_cpu")())
    except AttributeError:
        return None


def _stated(options: Options) -> str:
    table = options.target or {}
    return str(table.get("mcpu") or table.get("mtriple") or "unknown")


def disconnect(rpc: Rpc) -> None:
    """Forgets the connection to a device; the next call opens another."""
    _connections.pop(rpc, None)


def reach(rpc: Rpc) -> None:
    """Asks whether anything listens, so that an absent server is known at once and not after a minute of retries.

    Raises:
        NasError: nothing does.
    """
    try:
        socket.create_connection((rpc.host, rpc.port), timeout=_REACH_S).close()
    except OSError as error:
        what = "tracker" if rpc.key else "RPC server"
        raise NasError(
            f"no TVM {what} answers at {rpc.host}:{rpc.port}: {error.strerror or error}",
            hint=f"start it there: python -m tvm.exec.rpc_{'tracker' if rpc.key else 'server'} --host {rpc.host}"
            f" --port {rpc.port}",
        ) from error


def within(rpc: Rpc, call: Callable[[], _T]) -> _T:
    """The value of `call`, which waits for the device.

    A device that loses its power says nothing, and the call would wait for ever: then its thread is left behind.

    Raises:
        NasError: it took longer than `timeout_s`.
    """
    answer: list[_T] = []
    failure: list[BaseException] = []

    def wait() -> None:
        try:
            answer.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=wait, name=f"rpc {rpc.address}", daemon=True)
    thread.start()
    thread.join(rpc.timeout_s)
    if failure:
        raise failure[0]
    if not answer:
        disconnect(rpc)
        raise NasError(f"the device at {rpc.address} did not answer within {rpc.timeout_s:g} s", hint=_CONTINUE)
    return answer[0]


def _bind(
    session: Any, compiled: Compiled, inputs: Mapping[str, Tensor], target: Target, options: Options, rpc: Rpc
) -> Loaded:
    import tvm

    session.get_function("runtime.config_threadpool")(1, target.threads)
    threads = int(session.get_function("runtime.NumThreads")())
    if threads != target.threads:
        raise NasError(
            f"TVM at {rpc.address} runs on {threads} threads, target {target.slug} asks for {target.threads}"
        )
    device = session.cpu(0)
    machine = tvm.relax.VirtualMachine(_sent(session, compiled, options), device)
    arguments = [tvm.runtime.tensor(inputs[name].detach().numpy(), device) for name in compiled.names]
    machine.set_input("main", *arguments)

    def run() -> np.ndarray:
        def once() -> np.ndarray:
            machine.invoke_stateful("main")
            output: np.ndarray = machine.get_outputs("main")[0].numpy()
            return output

        with _naming(rpc):
            return within(rpc, once)

    def device_ms(calls: int) -> float:
        with _naming(rpc):
            timer = machine.time_evaluator("invoke_stateful", device, number=calls, repeat=1)
            return within(rpc, lambda: 1e3 * float(timer("main").mean))

    return Loaded(
        run=run,
        device_ms=device_ms,
        description={
            "runtime": target.runtime,
            "provider": f"{words(compiled.machine)} over RPC",
            "tuning": compiled.tuning,
            "precision": "fp32",
            "threads": threads,
            "tvm": tvm.__version__,
            "mcpu": chip(rpc, options),
        },
    )


def _sent(session: Any, compiled: Compiled, options: Options) -> Any:
    """The compiled module, loaded on the device; without a compiler it goes as object files, which the device links."""
    with tempfile.TemporaryDirectory(prefix="nas-tvm-") as folder:
        name = f"module{next(_numbers)}{'.so' if options.compiler else '.tar'}"
        path = write_library(compiled.executable, Path(folder) / name, options.compiler)
        session.upload(bytearray(path.read_bytes()), target=name)
    return session.load_module(name)


def _check(target: Target, inputs: Mapping[str, Tensor]) -> None:
    if target.runtime not in ("tvm", UNTUNED) or target.precision != "fp32":
        raise UsageError(
            f"backend tvm cannot run target {target.slug}: its runtime and precision are {target.runtime!r} and"
            f" {target.precision!r}, allowed over RPC: 'tvm' or {UNTUNED!r}, and 'fp32'"
        )
    for name, tensor in inputs.items():
        if tensor.shape[:1] != (target.batch,):
            raise NasError(
                f"input {name!r} has shape {tuple(tensor.shape)}, target {target.slug} has batch {target.batch}"
            )


def _wait_until_free(rpc: Rpc, summary: Callable[[], Mapping[str, Any]], most_s: float = _FREE_S) -> None:
    """The tracker queues a request for a device that is taken, or that nobody has, without a word."""
    deadline = time.monotonic() + most_s
    while not _is_free(rpc, summary()):
        if time.monotonic() > deadline:
            raise NasError(
                f"every device under the key {rpc.key!r} of the tracker at {rpc.host}:{rpc.port} is in use",
                hint="a device serves one client at a time: wait for the other one",
            )
        time.sleep(0.5)


def _is_free(rpc: Rpc, summary: Mapping[str, Any]) -> bool:
    servers = {entry["key"].partition(":")[2] for entry in summary["server_info"]}
    if rpc.key not in servers:
        raise NasError(
            f"the tracker at {rpc.host}:{rpc.port} has no device under the key {rpc.key!r};"
            f" it has: {', '.join(sorted(servers)) or 'none'}",
            hint=f"on the device: python -m tvm.exec.rpc_server --tracker {rpc.host}:{rpc.port} --key {rpc.key}",
        )
    return bool(summary["queue_info"].get(rpc.key, {}).get("free"))


@contextlib.contextmanager
def _naming(rpc: Rpc) -> Iterator[None]:
    """Turns what TVM raises when a device goes away into one sentence."""
    try:
        yield
    except NasError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        disconnect(rpc)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise NasError(
            f"the device at {rpc.address} went away or failed: {lines[-1] if lines else type(error).__name__}",
            hint=_CONTINUE,
        ) from error
