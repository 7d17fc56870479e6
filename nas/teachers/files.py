"""Files of teachers: their JSON, and digests of whatever decides an answer, to which cached data belongs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nas.errors import NasError
from nas.network import short_hash
from nas.paths import atomic_write, cache_dir
from nas.provenance import file_sha


def content_digest(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 over the names and contents of files; the same wherever they lie.

    The contents are really hashed, once: a file's own SHA-256 is kept in the cache under its path, size and time of
    last change, so that a checkpoint of many gigabytes is not read again at every command.

    Args:
        files: (name, path) pairs; a name is part of the digest, a path is not.
    """
    lines = [f"{name} {cached_sha(path)}" for name, path in sorted(files)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def cached_sha(path: Path) -> str:
    """SHA-256 of a file's content, read again only if its size or its time of change is another one."""
    place = path.resolve()
    about = place.stat()
    note = cache_dir("digests") / f"{short_hash(str(place))}.json"
    key = [str(place), about.st_size, about.st_mtime_ns]
    try:
        kept = json.loads(note.read_text())
    except (OSError, ValueError):
        kept = {}
    if isinstance(kept, dict) and kept.get("key") == key:
        return str(kept["sha256"])
    found = file_sha(place)
    # On a full disk it is not kept: hashing again costs time, and no number depends on it.
    with suppress(NasError):
        atomic_write(note, json.dumps({"key": key, "sha256": found}))
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        NasError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NasError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise NasError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
