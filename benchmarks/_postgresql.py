"""A PostgreSQL server of one's own, on this machine's loopback, gone when it is no longer needed."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg


def binaries() -> Path | None:
    """The folder of initdb and postgres, or None where PostgreSQL is not installed."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True)
    found = [*debian, *([Path(path)] if (path := shutil.which("initdb")) else [])]
    return found[0].parent if found else None


class Server:
    """A running server; `stop` and `start` let it be lost and come back.

    Attributes:
        url: of its database, as `--storage` takes it.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self._folder, self._port = folder, port
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"postgresql://nas@127.0.0.1:{port}/postgres"

    def start(self) -> None:
        """Starts it and waits until it answers."""
        program = str(_found() / "postgres")
        options = ["-D", str(self._folder), "-p", str(self._port), "-h", "127.0.0.1", "-k", str(self._folder)]
        settings = ["-c", "max_connections=200", "-c", "log_min_messages=fatal"]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([program, *options, *settings], stdout=log, stderr=log, **_user())
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise RuntimeError(f"PostgreSQL did not start: {(self._folder / 'log').read_text()[-2000:]}")
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.url, connect_timeout=5):
                return
            time.sleep(0.1)
        raise RuntimeError("PostgreSQL did not answer within a minute")

    def stop(self) -> None:
        """Ends it at once; connections are lost, and what was committed is kept."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(timeout=60)
            self._process = None


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """A new, empty server.

    Raises:
        RuntimeError: PostgreSQL is not installed, or does not start.
    """
    # Not below a folder that only root may enter: the server refuses to be root.
    folder = Path(tempfile.mkdtemp(prefix="nas-postgresql-", dir="/tmp"))
    data = folder / "data"
    try:
        if user := _user():
            shutil.chown(folder, user["user"], user["group"])
        options = ["-U", "nas", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"]
        command = [str(_found() / "initdb"), "-D", str(data), *options]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **_user())
        running = Server(data, _free_port())
        running.start()
        try:
            yield running
        finally:
            running.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _found() -> Path:
    folder = binaries()
    if folder is None:
        raise RuntimeError("PostgreSQL is not installed: apt-get install postgresql")
    return folder


def _user() -> dict[str, str]:
    """Whom to run as: root may not."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = "postgres" if "postgres" in names else "nobody"
    return {"user": user, "group": str(_group(user))}


def _group(user: str) -> str:
    return grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
