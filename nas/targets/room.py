"""Room for the files of rows: how large they may be together, which are dropped, and what a full disk is.

A file is in use where a process holds a lock on it (`nas.targets.files`); such a file is never dropped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nas.errors import NasError, UsageError

LIMIT: Final = "NAS_CACHE_GB"
DEFAULT_LIMIT_GB: Final = 8.0
SPARE: Final = 2**28  # bytes left free on the disk, for what cannot be made again: the study's own journal
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NoRoomError(Exception):
    """The rows cannot be kept on disk."""


def limit_bytes() -> int:
    """How large all files of rows may be together: NAS_CACHE_GB, in units of 1e9 bytes.

    Raises:
        UsageError: it is no number of 0 or more.
    """
    given = os.environ.get(LIMIT, "")
    try:
        limit = float(given) if given else DEFAULT_LIMIT_GB
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise UsageError(f"{LIMIT} must be a number of gigabytes of 0 or more, got {given!r}")
    return int(min(limit, 1e9) * 1e9)


def make_room(path: Path, needed: int) -> None:
    """Drops the files that were used longest ago and that nobody uses now, until `needed` bytes more are allowed.

    Raises:
        NoRoomError: they are not, whatever is dropped.
    """
    limit = limit_bytes()
    files = [each for each in path.parent.iterdir() if not each.name.startswith(".") and each.suffix != ".lock"]
    known = sorted((about.st_mtime, about.st_size, each) for each in files if (about := _stat(each)) is not None)
    total = sum(size for _, size, _ in known)
    own = next((size for _, size, each in known if each == path), 0)
    if own + needed > limit:
        raise NoRoomError(f"they take {(own + needed) / 1e9:.3g} GB, and {LIMIT} allows {limit / 1e9:.3g} GB")
    for _, size, each in known:
        if total + needed <= limit and _free(path) >= needed + SPARE:
            return
        if each != path and _dropped(each):
            total -= size
    if total + needed > limit:
        raise NoRoomError(f"all {total / 1e9:.3g} GB that {path.parent} holds are in use, and {LIMIT} allows no more")
    if _free(path) < needed + SPARE:
        raise NoRoomError(f"the disk of {path.parent} has {_free(path) / 1e9:.3g} GB left, {needed / 1e9:.3g} needed")


def _free(path: Path) -> int:
    return shutil.disk_usage(path.parent).free


def _stat(path: Path) -> os.stat_result | None:
    with contextlib.suppress(OSError):
        return path.stat()
    return None


def _dropped(path: Path) -> bool:
    """Removes a file unless a process has it mapped or appends to it."""
    try:
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def room_needed() -> Iterator[None]:
    """Tells a full disk from other failures.

    Raises:
        NoRoomError: the system has no room for what is written inside.
        NasError: it cannot be written for another reason.
    """
    try:
        yield
    except (OSError, NasError) as error:
        cause = error.__cause__ if isinstance(error, NasError) else error
        if isinstance(cause, OSError) and cause.errno in _FULL:
            raise NoRoomError(os.strerror(cause.errno)) from error
        if isinstance(error, NasError | FileNotFoundError):
            raise
        raise NasError(
            f"cannot write teacher targets: {error}", hint="set NAS_CACHE to a folder you may write to"
        ) from error
