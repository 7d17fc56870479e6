"""Where a study is kept: the journal in its folder or any Optuna storage; and patience with one that was lost."""

from __future__ import annotations

import random
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import BaseStorage, JournalStorage

from nas.errors import NasError, UsageError
from nas.study.journal import NAME, Journal

PATIENCE_S = 120.0
_CONNECT_S = 10
_GRPC = re.compile(r"grpc://(?P<host>[^:/\s]+):(?P<port>\d+)/?")
_POSTGRESQL = re.compile(r"^postgres(ql)?(\+\w+)?://")
# By name, because the libraries that define them are installed for some storages only.
_LOST = {"OperationalError", "InterfaceError", "TimeoutError", "RpcError", "ConnectionError", "OSError"}
# Optuna says with a RuntimeError that a database is of another version of its tables.
_UNREACHED = {"SQLAlchemyError", "RpcError", "OSError", "OptunaError", "RuntimeError"}

Found = TypeVar("Found")


def shown(url: str | None, folder: Path | None) -> str:
    """A storage in words, without its password."""
    return str(folder) if url is None else re.sub(r"//([^:@/]*):[^@/]*@", r"//\1:***@", url)


def one_machine(url: str | None) -> bool:
    """Whether a storage can serve workers of one machine only."""
    return url is not None and url.startswith("sqlite")


def open_storage(url: str | None, folder: Path | None) -> BaseStorage:
    """The storage of a URL, or the journal of the folder where there is no URL.

    Args:
        url: postgresql://USER@HOST/DATABASE, grpc://HOST:PORT, sqlite:///FILE, or another that Optuna takes.
        folder: the study's, for the journal.

    Raises:
        UsageError: no such kind of storage.
        NasError: it cannot be reached, a library for it is missing, or the journal is damaged.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if url is None:
        assert folder is not None
        return _journal(folder / NAME)
    if "://" not in url:
        raise UsageError(
            f"storage {url!r} is not a URL; known are postgresql://USER@HOST/DATABASE, grpc://HOST:PORT and"
            " sqlite:///FILE"
        )
    try:
        return _grpc(url) if url.startswith("grpc:") else _database(url)
    except (NasError, UsageError):
        raise
    except ImportError as error:
        extra = "grpc" if url.startswith("grpc:") else "postgresql"
        raise NasError(
            f"a library for the storage {shown(url, None)} is not installed ({error})",
            hint=f"pip install 'nas-diffusion[{extra}]'",
        ) from error
    except Exception as error:
        if not _named(error, _UNREACHED):
            raise
        raise NasError(
            f"the storage {shown(url, None)} cannot be reached ({_first_line(error)})",
            hint="check the address, that the server runs, and that this machine may connect",
        ) from error


def close_storage(storage: BaseStorage) -> None:
    """Ends its connections."""
    if isinstance(storage, optuna.storages.GrpcStorageProxy):
        storage.close()
    storage.remove_session()
    engine = getattr(getattr(storage, "_backend", None), "engine", None)
    if engine is not None:
        engine.dispose()


def _journal(path: Path) -> BaseStorage:
    try:
        return JournalStorage(Journal(path))
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise NasError(
            f"the journal {path} is damaged and cannot be read ({type(error).__name__}: {error})",
            hint="move it away and run the search again, or choose another --out",
        ) from error
    except OSError as error:
        raise NasError(f"the journal {path} cannot be opened: {error.strerror}", hint="choose another --out") from error


def _database(url: str) -> BaseStorage:
    connect: dict[str, Any] = {"timeout": 60} if url.startswith("sqlite") else {}
    if _POSTGRESQL.match(url):
        url = _POSTGRESQL.sub("postgresql+psycopg://", url, count=1)
        connect = {"connect_timeout": _CONNECT_S}
    options = {"pool_pre_ping": True, "connect_args": connect}
    for attempt in range(3):
        try:
            # Wrapped as Optuna wraps a plain URL: finished trials are then read once.
            return optuna.storages.get_storage(optuna.storages.RDBStorage(url, engine_kwargs=options))
        except Exception as error:
            # Two processes that make the tables at the same moment: the second finds them made.
            if attempt == 2 or not _named(error, {"ProgrammingError", "IntegrityError", "OperationalError"}):
                raise
            if _named(error, {"OperationalError"}) and not url.startswith("sqlite"):
                raise
            time.sleep(random.uniform(0.2, 1.0))
    raise AssertionError("the last attempt returns or raises")


def _grpc(url: str) -> BaseStorage:
    match = _GRPC.fullmatch(url)
    if match is None:
        raise UsageError(f"storage {url!r} is not of the form grpc://HOST:PORT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = optuna.storages.GrpcStorageProxy(host=match["host"], port=int(match["port"]))
    storage.wait_server_ready(timeout=_CONNECT_S)
    return storage


def _first_line(error: BaseException) -> str:
    said = str(error).strip().splitlines()
    return said[0] if said else type(error).__name__


def _named(error: BaseException, names: set[str]) -> bool:
    """Whether an error, or what it came from, is of a kind with one of these names."""
    cause: BaseException | None = error
    while cause is not None:
        if names & {kind.__name__ for kind in type(cause).__mro__}:
            return True
        cause = cause.__cause__
    return False


class Patience:
    """Repeats what failed because the storage was lost: after half a second, then twice as long each time.

    What it is given must be fit to be repeated. Errors of another kind pass at once.

    Args:
        where: the storage, in words.
        say: told that the storage is being waited for.
        patience_s: how long, in all, before the loss is an error.
    """

    def __init__(self, where: str, say: Callable[[str], None], patience_s: float = PATIENCE_S) -> None:
        self._where, self._say, self._patience_s = where, say, patience_s

    def __call__(self, call: Callable[..., Found], *arguments: Any, **named: Any) -> Found:
        """The call's answer.

        Raises:
            NasError: the storage did not come back.
        """
        until = time.monotonic() + self._patience_s
        pause_s = 0.5
        while True:
            try:
                return call(*arguments, **named)
            except Exception as error:
                if not _named(error, _LOST):
                    raise
                if time.monotonic() + pause_s > until:
                    raise NasError(
                        f"the storage {self._where} was lost and did not come back within {self._patience_s:.0f} s"
                        f" ({_first_line(error)}); nothing that was told to it is lost",
                        hint="the same command resumes once the storage can be reached",
                    ) from error
                self._say(f"the storage {self._where} cannot be reached; trying again in {pause_s:.0f} s")
            time.sleep(pause_s * random.uniform(0.8, 1.2))
            pause_s = min(2 * pause_s, 30.0)
