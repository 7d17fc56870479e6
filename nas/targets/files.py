"""Files of rows in the cache: appended to in chunks, memory-mapped by many processes, and the oldest dropped.

A file is a header of one page and then record after record, so that a batch of consecutive rows is one stretch of the
file and a longer cache is a shorter one continued. The number of rows that count stands at the end of the header and is
raised only when a chunk is on the disk: whoever is killed leaves a file that is whole up to there. Whoever maps a file
holds a shared lock on it for as long as the mapping lives, and nobody drops a file that is locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from nas.errors import NasError
from nas.network import short_hash
from nas.paths import atomic_write, cache_dir
from nas.targets.room import NoRoomError, make_room, room_needed

LOG = logging.getLogger("nas.targets")

FORMAT: Final = 2  # raise it when the content of a file changes meaning
_SUFFIX: Final = ".rows"
_HEADER: Final = 4096  # bytes: the count is its last 8
_COUNT_AT: Final = _HEADER - 8

Chunk = Mapping[str, Tensor]


class _UnfitError(Exception):
    """What is in a file is not what its name says."""


def cached_rows(
    about: Mapping[str, Any],
    count: int,
    chunk: int,
    make: Callable[[int], Chunk],
    tick: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """The first `count` rows of what `about` describes, by field, memory-mapped; missing ones are made first.

    Where they cannot be kept (a full disk, a limit that is too low), they are made in memory and the log says so, once.

    Args:
        about: what decides the rows, as plain data; their number is no part of it.
        count: how many.
        chunk: how many are made at once.
        make: makes chunk i: field -> [chunk, ...], the same at every call.
        tick: called with the rows there are after each chunk that was made.
    """
    if (kept := _in_memory.get(_key(about))) is not None and _length(kept) >= count:
        return {name: part[:count] for name, part in kept.items()}
    wanted = _Wanted(about=about, count=count, chunk=chunk, make=make, tick=tick or _silent)
    try:
        return _from_disk(wanted)
    except NoRoomError as problem:
        _say_once(problem)
    found = _from_memory(wanted)
    _in_memory[_key(about)] = found
    for old in list(_in_memory)[:-_KEPT]:
        del _in_memory[old]
    return found


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What was asked for; `spare` holds a chunk that was made and could not be written."""

    about: Mapping[str, Any]
    count: int
    chunk: int
    make: Callable[[int], Chunk]
    tick: Callable[[int], None]
    spare: dict[int, Chunk] = field(default_factory=dict)

    @property
    def chunks(self) -> int:
        """How many there must be."""
        return -(-self.count // self.chunk)

    def made(self, index: int) -> Chunk:
        """One chunk."""
        return self.spare.pop(index) if index in self.spare else self.make(index)

    def done(self, chunks: int) -> None:
        """Says how far it is."""
        self.tick(min(chunks * self.chunk, self.count))


def path_of(about: Mapping[str, Any]) -> Path:
    """The file of the rows that `about` describes."""
    return cache_dir("targets") / f"{_key(about)}{_SUFFIX}"


def rows_in(path: Path) -> int:
    """How many rows of a file count; what is said of it is not checked."""
    with path.open("rb") as stream:
        stream.seek(_COUNT_AT)
        return int.from_bytes(stream.read(8), "little")


# ------------------------------------------------------------------------------------------------------- in memory

_KEPT = 6  # parts of two caches
_in_memory: dict[str, dict[str, Tensor]] = {}


def _from_memory(wanted: _Wanted) -> dict[str, Tensor]:
    """The rows that are on disk, and the others made."""
    parts: list[Chunk] = []
    with contextlib.suppress(OSError, NasError, _UnfitError):
        path = path_of(wanted.about)
        if have := _header(path, wanted.about)[1]:
            parts.append(_load(str(path), have))
    for index in range(sum(map(_length, parts)) // wanted.chunk, wanted.chunks):
        parts.append(wanted.made(index))
        wanted.done(index + 1)
    return {name: torch.cat([part[name] for part in parts])[: wanted.count].contiguous() for name in parts[0]}


# --------------------------------------------------------------------------------------------------------- on disk


def _from_disk(wanted: _Wanted) -> dict[str, Tensor]:
    with room_needed():
        path = path_of(wanted.about)
    for _ in range(3):  # another process may drop the file between two of our looks at it
        with contextlib.suppress(FileNotFoundError, _UnfitError):
            if _header(path, wanted.about)[1] >= wanted.count:
                return _load(str(path), wanted.count)
        with contextlib.ExitStack() as stack:
            with room_needed():
                # Released by the operating system when its holder dies, so a killed worker leaves nobody waiting.
                stack.enter_context(FileLock(path.with_suffix(".lock")))
            with contextlib.suppress(FileNotFoundError):
                _grow(path, wanted)
                return _load(str(path), wanted.count)
    raise NoRoomError(f"{path} is removed by others as soon as it is written")


def _grow(path: Path, wanted: _Wanted) -> None:
    """Appends the chunks that are missing; the caller holds the file's lock."""
    have = _whole(path, wanted.about) // wanted.chunk
    if have >= wanted.chunks:
        return
    rows = wanted.made(have)
    record = _record(rows)
    wanted.spare[have] = rows
    with room_needed():
        make_room(path, (wanted.chunks - have) * wanted.chunk * record.itemsize + _HEADER)
        if not path.is_file():
            atomic_write(path, _head(wanted.about, record))
    with _locked(path, "r+b") as stream:
        for index in range(have, wanted.chunks):
            rows = wanted.spare[index] = wanted.made(index)
            _append(stream.fileno(), _packed(rows, record), index * wanted.chunk)
            del wanted.spare[index]
            wanted.done(index + 1)


def _append(handle: int, rows: NDArray[Any], place: int) -> None:
    """Writes rows at `place`, and only when they are on the disk counts them."""
    with room_needed():
        _write(handle, rows.tobytes(), _HEADER + place * rows.itemsize)
        os.fsync(handle)
        _write(handle, (place + len(rows)).to_bytes(8, "little"), _COUNT_AT)


def _write(handle: int, data: bytes, place: int) -> None:
    rest = memoryview(data)
    while rest:
        done = os.pwrite(handle, rest, place)
        rest, place = rest[done:], place + done


def _whole(path: Path, about: Mapping[str, Any]) -> int:
    """How many rows there are; a file that is not what its name says is removed, and the log says so."""
    try:
        return _header(path, about)[1]
    except FileNotFoundError:
        return 0
    except _UnfitError as problem:
        LOG.warning("the teacher targets in %s are made again: %s", path, problem)
        # Never cut: whoever has it mapped goes on with what was there.
        path.unlink(missing_ok=True)
        _load.cache_clear()
        return 0


def _head(about: Mapping[str, Any], record: np.dtype[Any]) -> bytes:
    fields = [[name, record[name].base.str, list(record[name].shape)] for name in record.names or ()]
    said = json.dumps({"format": FORMAT, "about": dict(about), "fields": fields}, sort_keys=True).encode()
    assert len(said) < _COUNT_AT  # digests and a few shapes
    return said.ljust(_COUNT_AT) + bytes(8)


def _header(path: Path, about: Mapping[str, Any]) -> tuple[np.dtype[Any], int]:
    """The type of one record, and how many records count.

    Raises:
        FileNotFoundError: no such file.
        _UnfitError: it is of another format, of something else, or damaged.
    """
    with path.open("rb") as stream:
        head = stream.read(_HEADER)
        size = os.fstat(stream.fileno()).st_size
    try:
        said = json.loads(head[:_COUNT_AT])
        found, described, fields = said["format"], said["about"], said["fields"]
        if found == FORMAT:
            record = np.dtype([(name, kind, tuple(shape)) for name, kind, shape in fields], align=True)
    except (ValueError, KeyError, TypeError) as error:
        raise _UnfitError("they are damaged (their header cannot be read)") from error
    if found != FORMAT:
        raise _UnfitError(f"they are of format {found!r}, and this version of nas reads {FORMAT}")
    if described != json.loads(json.dumps(dict(about))):
        raise _UnfitError("they are of another teacher or other settings")
    count = int.from_bytes(head[_COUNT_AT:], "little")
    if len(head) < _HEADER or size < _HEADER + count * record.itemsize:
        raise _UnfitError(f"they are damaged ({size:,} bytes are too few for {count:,} rows)")
    return record, count


@functools.lru_cache(maxsize=8)
def _load(path: str, count: int) -> dict[str, Tensor]:
    """The first rows of a file by field, mapped: a page is read when it is first used, and shared by all processes.

    Raises:
        FileNotFoundError: another process has just dropped it.
    """
    with _locked(Path(path), "rb") as stream:
        head = json.loads(stream.read(_HEADER)[:_COUNT_AT])
        record = np.dtype([(name, kind, tuple(shape)) for name, kind, shape in head["fields"]], align=True)
        # "c" is private and writable, as torch wants it; nothing is written, so nothing is copied. The mapping keeps a
        # copy of the file's handle, and with it the lock.
        rows: Any = np.memmap(stream, dtype=record, mode="c", offset=_HEADER, shape=(count,))
    with contextlib.suppress(OSError):
        os.utime(path)  # the age by which files are dropped
    return {name: torch.from_numpy(rows[name]) for name in record.names or ()}


@contextlib.contextmanager
def _locked(path: Path, mode: str) -> Iterator[Any]:
    """The file, open under a shared lock, which lasts as long as any copy of the handle.

    Raises:
        FileNotFoundError: it is not there, or was dropped while it was opened.
    """
    with path.open(mode, buffering=0) as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        if os.fstat(stream.fileno()).st_nlink == 0:
            raise FileNotFoundError(path)
        yield stream


def _record(chunk: Chunk) -> np.dtype[Any]:
    """One row: its fields side by side, each at a place that its type allows."""
    return np.dtype([(name, part.numpy().dtype, tuple(part.shape[1:])) for name, part in chunk.items()], align=True)


def _packed(chunk: Chunk, record: np.dtype[Any]) -> NDArray[Any]:
    rows = np.zeros(_length(chunk), dtype=record)
    for name, part in chunk.items():
        rows[name] = part.numpy()
    return rows


# ----------------------------------------------------------------------------------------------------------- words


_said: set[Path] = set()


def _say_once(problem: NoRoomError) -> None:
    """Says it of each cache once, and not again in the worker processes."""
    folder = Path(os.environ.get("NAS_CACHE") or "~/.cache/nas")
    if folder not in _said and multiprocessing.parent_process() is None:
        LOG.warning("teacher targets are computed in memory and not kept in %s: %s", folder, problem)
    _said.add(folder)


def _silent(done: int) -> None:
    """Tells nobody."""


def _key(about: Mapping[str, Any]) -> str:
    return short_hash(json.dumps(dict(about), sort_keys=True))


def _length(chunk: Chunk) -> int:
    return len(next(iter(chunk.values())))
