"""Which files of a folder are finished: what a killed `nas cache` takes up, and what it makes again if it is gone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nas.errors import NasError
from nas.paths import atomic_write, writable_dir
from nas.tasks.latents.manifest import Shard
from nas.tasks.latents.shards import ShardWriter


class Ledger:
    """The finished shards of one kind in a folder, and what they were made with.

    Args:
        folder: where they are.
        kind: first part of the shards' names.
        identity: what decides their content; other shards of the same kind are not continued.
    """

    def __init__(self, folder: Path, kind: str, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.kind = kind
        self.identity = json.loads(json.dumps(identity))
        self.path = folder / f"{kind}.ledger.json"
        self.done: dict[int, Shard] = {}
        self.notes: dict[int, list[str]] = {}
        if self.path.is_file():
            self._take_up()

    def _take_up(self) -> None:
        try:
            saved = json.loads(self.path.read_text())
            done = {int(number): Shard(**each) for number, each in saved["done"].items()}
            notes = {int(number): list(each) for number, each in saved["notes"].items()}
            identity = dict(saved["identity"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise NasError(f"{self.path} is damaged: {error}", hint="remove it to begin anew") from error
        check_identity(self.folder, identity, self.identity)
        for number, shard in done.items():
            path = self.folder / shard.name
            # One that was removed or cut since is made again.
            if path.is_file() and path.stat().st_size == shard.bytes:
                self.done[number] = shard
                self.notes[number] = notes.get(number, [])

    def shard(self, number: int, fill: Callable[[ShardWriter], list[str]]) -> None:
        """Makes one shard and notes it down, unless it is there already.

        Args:
            number: which.
            fill: writes its rows and says what was passed over.

        Raises:
            NasError: the system refuses the write; what was finished before stays.
        """
        if number in self.done:
            return
        writer = ShardWriter(self.folder / f"{self.kind}-{number:06d}.tar")
        try:
            with writer:
                notes = fill(writer)
            self.done[number], self.notes[number] = writer.record(), notes
        except OSError as error:
            raise NasError(
                f"cannot write {writer.path}: {error.strerror or error}; {len(self.done)} finished shards are kept",
                hint="make room and run the same command again",
            ) from error
        self._save()

    def _save(self) -> None:
        state = {
            "identity": self.identity,
            "done": {number: asdict(shard) for number, shard in sorted(self.done.items())},
            "notes": dict(sorted(self.notes.items())),
        }
        atomic_write(self.path, json.dumps(state) + "\n")

    def shards(self) -> tuple[Shard, ...]:
        """The finished ones in order, those without rows left out."""
        return tuple(shard for _, shard in sorted(self.done.items()) if shard.rows)

    def passed_over(self) -> tuple[str, ...]:
        """What was passed over, in order."""
        return tuple(note for _, notes in sorted(self.notes.items()) for note in notes)


def check_identity(folder: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuses to go on with data that was made otherwise.

    Raises:
        NasError: names what differs.
    """
    changed = [
        f"{name} was {_short(saved.get(name))} and is now {_short(asked.get(name))}"
        for name in dict.fromkeys([*saved, *asked])
        if saved.get(name) != asked.get(name)
    ]
    if changed:
        raise NasError(
            f"the data in {folder} was made otherwise: {'; '.join(changed)}", hint="choose another folder with --out"
        )


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text  # a digest


@contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """The folder, made and proved writable, for this process alone.

    Raises:
        NasError: it cannot be written, another process writes it now, or it holds something else.
    """
    strangers = [path.name for path in folder.iterdir() if not _is_ours(path)] if folder.is_dir() else []
    if strangers:
        raise NasError(
            f"{folder} holds {sorted(strangers)[0]}, which is no cached data", hint="choose a new folder with --out"
        )
    writable_dir(folder)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise NasError(
            f"another nas cache is writing {folder} now", hint="wait for it, or choose another --out"
        ) from error
    try:
        for leftover in folder.glob(".*.unfinished"):
            leftover.unlink(missing_ok=True)
        yield folder
    finally:
        lock.release()


def _is_ours(path: Path) -> bool:
    return path.name.startswith((".", "data-", "data.", "targets-", "null.", "manifest."))
