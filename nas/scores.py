"""Scores of proxies, kept across studies: quality depends on neither the device nor the budget.

One file of JSON lines in the cache folder for each space, teacher and proxy settings; the first line says which. Any
number of searches may append to it at once. A line that a killed search left unfinished is not read, and is dropped by
the next one that writes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from nas import quality
from nas.bench import Curve, Point, ProxySettings, bench_of
from nas.errors import OUT_OF_MEMORY, NasError
from nas.network import short_hash
from nas.paths import cache_dir
from nas.proxies import Score
from nas.space import Candidate, SearchSpace

SCHEMA = 1
_SCORE = tuple(f.name for f in fields(Score) if f.name != "curve")


@dataclass(frozen=True, kw_only=True)
class StoredScore:
    """What came of one finished proxy run.

    Attributes:
        row: the candidate's choices as indices of their values.
        score: None where there is none.
        curve: the run's way.
        cause: why there is no score, in a word or two: "training diverged".
        state: as the study calls it.
        reason: the same in a sentence.
    """

    row: tuple[int, ...]
    score: Score | None
    curve: Curve = ()
    cause: str = ""
    state: str = "proxied"
    reason: str = ""

    @property
    def lasting(self) -> bool:
        """Whether another run would end the same: a score, or training that diverged.

        Not what was stopped early, which was for the budget of its study, nor what failed or had too little memory,
        which was for that day and machine.
        """
        return self.score is not None or (bool(self.cause) and self.cause != OUT_OF_MEMORY)


class Scores:
    """The kept scores of one space, teacher and proxy.

    Args:
        space: whose candidates; another version of its file, or another resolution, has scores of its own.
        teacher: as for `nas.teachers.load_teacher`; its weights count, not its name. So do examples from disk.
        settings: of the proxy.

    Raises:
        NasError: no such teacher, or the cache folder cannot be made.
    """

    def __init__(self, space: SearchSpace, teacher: str, settings: ProxySettings) -> None:
        identity = {
            "schema": SCHEMA,
            "space": space.name,
            "space_hash": space.hash,
            "teacher": quality.teacher_hash(teacher),
            "proxy": quality.identity(settings, space, teacher),
            "examples": bench_of(teacher, settings).digest,
        }
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        name = f"{space.name}-{settings.proxy}-{short_hash(json.dumps(self._identity, sort_keys=True))}.jsonl"
        self.path: Path = cache_dir("scores") / name

    def all(self) -> dict[str, StoredScore]:
        """Candidate key -> its score; of a candidate that was scored twice the last.

        Raises:
            NasError: the file is damaged, or another's.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise NasError(f"{self.path} cannot be read: {error.strerror}", hint=_WITHOUT) from error
        lines = data.split(b"\n")[:-1]  # what stands after the last newline was never finished
        if not lines:
            return {}
        try:
            header, *rest = [json.loads(line) for line in lines]
            found = {each["key"]: _read(each) for each in rest}
        except (ValueError, KeyError, TypeError) as error:
            raise NasError(
                f"the kept scores in {self.path} are damaged ({type(error).__name__}: {error})",
                hint=f"remove the file, and its candidates are scored again; {_WITHOUT}",
            ) from error
        if header != self._identity:
            raise NasError(f"the kept scores in {self.path} are of other settings", hint=f"remove it; {_WITHOUT}")
        return found

    def keep(self, candidate: Candidate, found: StoredScore) -> None:
        """Adds what came of a proxy run, unless it would not be the same again (`StoredScore.lasting`).

        Raises:
            NasError: the file cannot be written.
        """
        if not found.lasting:
            return
        try:
            with self.path.open("a+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX)
                empty = _drop_unfinished(stream)
                lines = [self._identity] if empty else []
                lines.append({"key": candidate.key, **_written(found)})
                stream.write("".join(json.dumps(line) + "\n" for line in lines).encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise NasError(f"cannot write {self.path}: {error.strerror}", hint=_WITHOUT) from error


_WITHOUT = "--no-reuse searches without kept scores"


def _drop_unfinished(stream: BinaryIO) -> bool:
    """Removes half a last line; whether nothing is left. The caller holds the file's lock."""
    stream.seek(0)
    data = stream.read()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        stream.truncate(whole)
    return whole == 0


def _written(found: StoredScore) -> dict[str, Any]:
    """As JSON; of a curve what another study asks of it."""
    score = None if found.score is None else {name: getattr(found.score, name) for name in _SCORE}
    curve = [[point.step, point.train_db, point.seconds] for point in found.curve]
    rest = {"cause": found.cause, "state": found.state, "reason": found.reason}
    return {"row": list(found.row), "score": score, "curve": curve, **rest}


def _read(line: Mapping[str, Any]) -> StoredScore:
    curve = tuple(Point(step=step, train_db=db, seconds=s) for step, db, s in line["curve"])
    score = None
    if line["score"] is not None:
        score = Score(**{**line["score"], "seeds": tuple(line["score"]["seeds"])}, curve=curve)
    return StoredScore(
        row=tuple(line["row"]),
        score=score,
        curve=curve,
        cause=line["cause"],
        state=line["state"],
        reason=line["reason"],
    )
