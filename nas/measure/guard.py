"""One writer per table, and a folder that can be written to, both known before an hour is spent."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nas import tables
from nas.errors import NasError
from nas.network import short_hash
from nas.paths import cache_dir, data_dir, writable_dir


def writable_tables(folder: str | Path | None = None) -> Path:
    """The folder of the tables, proved writable.

    Raises:
        NasError: it is not (an installed package's own, say); the hint says how to have one's own.
    """
    place = data_dir("latency_tables", folder)
    try:
        return writable_dir(place)
    except NasError as error:
        raise NasError(
            f"the latency tables in {place} cannot be written to: {error.message.rpartition(': ')[2]}",
            hint=f"mkdir -p ~/nas-data && cp -r {place} ~/nas-data/latency_tables && export NAS_DATA=~/nas-data",
        ) from error


@contextmanager
def writing(slug: str, folder: str | Path | None = None) -> Iterator[None]:
    """Holds a table for writing; the lock goes with the process, so a killed run leaves none behind.

    Raises:
        NasError: the folder cannot be written to, or another process is writing this table.
    """
    writable_tables(folder)
    path = tables.table_path(slug, ".csv", folder).resolve()
    with (cache_dir("locks") / f"{slug}-{short_hash(str(path))}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise NasError(
                f"another nas measure is writing {path}", hint="wait for it; two at once would lose rows"
            ) from error
        yield
