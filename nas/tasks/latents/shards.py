"""Shards: tar files as the webdataset library writes and reads them, and rows of them by number.

A row is a group of members with one key ("00000012.latent.npy", "00000012.tokens.npy", "00000012.txt"), so any reader
of webdatasets can stream a folder. Training reads them otherwise: a stream can only be shuffled within a buffer, its
position cannot be a function of the step, and a resumed run would have to read all that came before. Here the members'
offsets are listed once, and rows are then copied from memory-mapped files in any order.
"""

from __future__ import annotations

import ast
import io
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from nas.errors import NasError
from nas.provenance import file_sha
from nas.tasks.latents.manifest import Shard

_NPY: Final = ".npy"
_MAGIC: Final = b"\x93NUMPY\x01\x00"


class ShardWriter:
    """Writes one shard; it appears under its name only when it is whole.

    Members carry no time and no user, so that the same rows always make the same bytes.

    Args:
        path: of the shard, a .tar file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._unfinished = path.with_name(f".{path.name}.unfinished")

    def __enter__(self) -> Self:
        # Imported here: it takes seconds, and only writing needs it.
        from webdataset import TarWriter

        self._stream = self._unfinished.open("wb")
        self._tar = TarWriter(self._stream, user="", group="", mtime=0, encoder=False)
        return self

    def add(self, key: str, fields: Mapping[str, NDArray[Any] | str | bytes]) -> None:
        """One row: arrays become "name.npy", texts "name", bytes "name"."""
        sample: dict[str, Any] = {"__key__": key}
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                sample[f"{name}{_NPY}"] = _npy(value)
            else:
                sample[name] = value.encode() if isinstance(value, str) else value
        self._tar.write(sample)
        self.rows += 1

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # Closed whatever happened: left open, it would write into the closed stream when it is collected.
            with nullcontext() if kind is None else suppress(OSError):
                self._tar.close()
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
                self._unfinished.chmod(0o644)
                os.replace(self._unfinished, self.path)
        finally:
            self._stream.close()
            self._unfinished.unlink(missing_ok=True)

    def record(self) -> Shard:
        """What the manifest says of the finished shard."""
        return record(self.path, self.rows)


def record(path: Path, rows: int) -> Shard:
    """What a manifest says of a file."""
    return Shard(name=path.name, rows=rows, bytes=path.stat().st_size, sha256=file_sha(path))


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array, order="C"), allow_pickle=False)
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class Index:
    """Where the fields of every row lie.

    Attributes:
        starts: number of the first row of each shard, and the number of rows at the end [shards + 1].
        places: field -> offset and size in its shard, of every row [rows, 2].
    """

    starts: NDArray[np.int64]
    places: dict[str, NDArray[np.int64]]

    def save(self) -> bytes:
        """As the bytes of an .npz file."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {f"field.{name}": place for name, place in self.places.items()}
        np.savez(buffer, starts=self.starts, **arrays)
        return buffer.getvalue()

    @classmethod
    def load(cls, path: Path) -> Index:
        """What `save` gave."""
        with np.load(path, allow_pickle=False) as data:
            places = {name.removeprefix("field."): data[name] for name in data.files if name != "starts"}
            return cls(starts=data["starts"], places=places)


def build_index(paths: Sequence[Path]) -> Index:
    """Lists the members of shards.

    Raises:
        NasError: a shard that is cut short, or rows of unequal fields.
    """
    starts, places = [0], dict[str, list[tuple[int, int]]]()
    for path in paths:
        rows = _members(path)
        starts.append(starts[-1] + len(rows))
        for key, fields in rows.items():
            if places and fields.keys() != places.keys():
                raise NasError(f"{path}: row {key} has {', '.join(fields)}, and the rows before {', '.join(places)}")
            for name, place in fields.items():
                places.setdefault(name, []).append(place)
    return Index(
        starts=np.array(starts, dtype=np.int64),
        places={name: np.array(each, dtype=np.int64).reshape(-1, 2) for name, each in places.items()},
    )


def _members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> field -> (offset, size), in the order of the file."""
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                rows.setdefault(key, {})[name] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise NasError(
            f"{path} is not a readable shard: {error}", hint="nas cache --check says which are whole"
        ) from error
    return rows


class Reader:
    """Rows of shards by number.

    Args:
        paths: the shards, in order.
        index: of these very shards.
    """

    def __init__(self, paths: Sequence[Path], index: Index) -> None:
        self.paths = tuple(paths)
        self.index = index
        self._open: dict[int, NDArray[np.uint8]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Open files do not travel to other processes; they are opened again there.
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return int(self.index.starts[-1])

    def fields(self) -> tuple[str, ...]:
        """The names of what a row has: arrays under their plain names, others under their extensions."""
        return tuple(name.removesuffix(_NPY) for name in self.index.places)

    def arrays(self, field: str, rows: Iterable[int]) -> NDArray[Any]:
        """An array field of some rows [B, ...], copied.

        Raises:
            NasError: the rows have no such field, or not all in one shape.
        """
        found: NDArray[Any] | None = None
        rows = list(rows)
        for place, row in enumerate(rows):
            dtype, shape, content = _array(self._member(f"{field}{_NPY}", row))
            if found is None:
                found = np.empty((len(rows), *shape), dtype)
            if shape != found.shape[1:] or dtype != found.dtype:
                raise NasError(f"{field} of row {row} has shape {shape} and others have {found.shape[1:]}")
            found[place] = content
        if found is None:
            raise NasError(f"no rows of {field} were asked for")
        return found

    def raw(self, field: str, row: int) -> bytes:
        """A field of a row that is no array, such as its caption "txt"."""
        return self._member(field, row).tobytes()

    def _member(self, name: str, row: int) -> NDArray[np.uint8]:
        if name not in self.index.places:
            raise NasError(f"the shards have no {name}; their rows have {', '.join(self.index.places)}")
        offset, size = self.index.places[name][row]
        shard = int(np.searchsorted(self.index.starts, row, side="right")) - 1
        if shard not in self._open:
            self._open[shard] = np.memmap(self.paths[shard], dtype=np.uint8, mode="r")
        return self._open[shard][offset : offset + size]


def _array(member: NDArray[np.uint8]) -> tuple[np.dtype[Any], tuple[int, ...], NDArray[Any]]:
    """Type, shape and content of an .npy file of version 1, without a copy."""
    head = member[:10].tobytes()
    if not head.startswith(_MAGIC):
        raise NasError("a member of a shard is not an array of numpy's format 1.0")
    end = 10 + int.from_bytes(head[8:10], "little")
    dtype, shape = _described(member[10:end].tobytes())
    return dtype, shape, member[end:].view(dtype).reshape(shape)


@lru_cache(maxsize=64)
def _described(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """What the header of an .npy file says; the rows of a field all have the same."""
    about = ast.literal_eval(header.decode("latin1"))
    return np.dtype(about["descr"]), tuple(about["shape"])
