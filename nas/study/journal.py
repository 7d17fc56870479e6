"""The journal of a study in its folder: whole lines only, locks that go with their process, one search at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from nas.errors import NasError

NAME = "journal.log"


@contextlib.contextmanager
def searching(folder: Path) -> Iterator[None]:
    """One search per folder at a time; the lock goes with the process, so a killed run leaves none behind.

    Raises:
        NasError: another search holds it.
    """
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise NasError(
                f"another search is running in {folder}",
                hint=f"wait for it, join it with nas worker {folder}, or choose another --out",
            ) from error
        yield


class Presence:
    """That somebody works in a folder, by a lock that any number may hold and that goes with its holder's process.

    Attributes:
        alone: whether nobody else held it when it was taken: then whatever was left running has no owner.
    """

    def __init__(self, folder: Path) -> None:
        self._handle = (folder / ".workers").open("w")
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.alone = True
        except OSError:
            fcntl.flock(self._handle, fcntl.LOCK_SH)
            self.alone = False

    def share(self) -> None:
        """Lets others in."""
        fcntl.flock(self._handle, fcntl.LOCK_SH)

    def close(self) -> None:
        """Leaves."""
        self._handle.close()


class Journal(JournalFileBackend):
    """Optuna's journal file with the kernel's lock instead of a lock file.

    A killed writer then holds nobody up, and the half line that it may leave is removed before the next is written.
    """

    def __init__(self, path: Path) -> None:
        # Optuna does not export the class that its locks share.
        super().__init__(str(path), lock_obj=_Lock(path))  # type: ignore[arg-type]
        self._guard = _Lock(path)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """Whole lines from a number on; no line is half written while they are read."""
        self._guard.acquire(shared=True)
        try:
            found = list(super().read_logs(log_number_from))
        finally:
            self._guard.release()
        yield from found


class _Lock:
    """As Optuna's BaseJournalFileLock, by flock on a file beside the journal."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._path = Path(f"{journal}.flock")
        self._held: int | None = None

    def acquire(self, shared: bool = False) -> bool:
        """Waits for the lock; with it alone, removes what a killed writer left."""
        held = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(held, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        self._held = held
        if not shared:
            _repair(self._journal)
        return True

    def release(self) -> None:
        """Lets the next one in."""
        if self._held is not None:
            os.close(self._held)
            self._held = None


def _repair(path: Path) -> None:
    """Removes half a last line. The caller holds the lock."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        if not size:
            return
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) == b"\n":
            return
        stream.seek(0)
        data = stream.read()
    os.truncate(path, data.rfind(b"\n") + 1)
