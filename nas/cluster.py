"""Ray as an executor: proxy runs as tasks of a cluster, each with the CPUs and GPUs that it asks for."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass
from typing import Any

from nas.errors import OUT_OF_MEMORY, NasError, UntrainableError, UsageError

# A task whose node died is run again elsewhere, this often; errors that the task itself raised are its answer.
_RETRIES = 5
_CONNECT_S = 10


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray cluster, and what one proxy run takes of it.

    Attributes:
        address: of the cluster: "auto" for the one this machine is a part of, HOST:PORT, or ray://HOST:PORT.
        cpus: per proxy run.
        gpus: per proxy run; a part of one where several runs share it.
    """

    address: str
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.cpus < 0 or self.gpus < 0 or self.cpus + self.gpus == 0:
            raise UsageError(
                f"a proxy run needs CPUs or GPUs: got --cpus-per-proxy {self.cpus:g} and --gpus-per-proxy {self.gpus:g}"
            )


def executor(cluster: Cluster) -> Executor:
    """Runs what is submitted as tasks of the cluster.

    Raises:
        NasError: Ray is not installed, or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise NasError("Ray is not installed", hint="pip install 'nas-diffusion[ray]'") from error
    if not ray.is_initialized():
        try:
            _reach(cluster.address)
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise NasError(
                f"the Ray cluster {cluster.address} cannot be reached ({_line(error)})",
                hint="ray start --head starts one; --ray auto finds the one of this machine",
            ) from error
    return _Tasks(cluster)


def _reach(address: str) -> None:
    """Tries the address itself: Ray would try for minutes.

    Raises:
        OSError: nobody answers.
    """
    match = re.fullmatch(r"(ray://)?(?P<host>[^:/]+):(?P<port>\d+)", address)
    if match is not None:
        socket.create_connection((match["host"], int(match["port"])), timeout=_CONNECT_S).close()


class _Tasks(Executor):
    """Each call is a task; its future has what the call returned or raised."""

    def __init__(self, cluster: Cluster) -> None:
        self._options: dict[str, Any] = {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus, "max_retries": _RETRIES}
        self._waiting: set[Any] = set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The call as a task."""
        import ray

        reference = ray.remote(**self._options)(_called).remote(fn, args, kwargs)
        self._waiting.add(reference)
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        reference.future().add_done_callback(lambda done: self._settle(future, reference, done))
        return future

    def _settle(self, future: Future[Any], reference: Any, done: Future[Any]) -> None:
        self._waiting.discard(reference)
        error = done.exception()
        if error is not None:
            future.set_exception(_translated(error))
            return
        value, raised = done.result()
        future.set_exception(raised) if raised is not None else future.set_result(value)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leaves the cluster; what still runs there is ended where that is asked for."""
        import ray

        for reference in list(self._waiting) if cancel_futures else ():
            with contextlib.suppress(Exception):
                ray.cancel(reference, force=True)
        self._waiting.clear()


def _called(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Exception | None]:
    """What a call returns, or the error that it raises, as it is: Ray would wrap it in one of its own kind."""
    try:
        return fn(*args, **kwargs), None
    except Exception as error:  # noqa: BLE001 - handed on
        return None, error


def _translated(error: BaseException) -> Exception:
    """An error of Ray itself after all its repetitions: a candidate needs too much memory, or the cluster is gone."""
    if type(error).__name__ == "OutOfMemoryError":
        return UntrainableError(f"{OUT_OF_MEMORY} on a node of the cluster: {_line(error)}", OUT_OF_MEMORY)
    return BrokenExecutor(f"Ray could not run it: {_line(getattr(error, 'cause', None) or error)}")


def _line(error: BaseException) -> str:
    """The first line of what an error says."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
