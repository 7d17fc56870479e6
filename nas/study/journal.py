"""The journal of a study: one writer at a time, whole lines only, and never of two different studies."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend

from nas.errors import NasError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One search per folder at a time; the lock goes with the process, so a killed run leaves none behind.

    Raises:
        NasError: another search holds it.
    """
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise NasError(
                f"another search is running in {folder}", hint="wait for it, or choose another --out"
            ) from error
        yield


def open_journal(folder: Path, identity: Mapping[str, Any]) -> optuna.Study:
    """The study in the folder's journal, new or continued.

    Raises:
        NasError: it belongs to other settings (each difference is named) or cannot be read.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = folder / "journal.log"
    _repair(path)
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(
            study_name="search", storage=storage, directions=["minimize", "maximize"], load_if_exists=True
        )
        found = study.user_attrs.get("identity")
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise NasError(
            f"the journal {path} is damaged and cannot be read ({type(error).__name__}: {error})",
            hint="move it away and run the search again, or choose another --out",
        ) from error
    if found is None:
        study.set_user_attr("identity", dict(identity))
        return study
    changed = [f"{k} was {found.get(k)!r}, is now {v!r}" for k, v in identity.items() if found.get(k) != v]
    if changed:
        raise NasError(
            f"the study in {folder} was made with other settings: {'; '.join(changed)}",
            hint="choose another --out; studies of different settings cannot be joined",
        )
    return study


def _repair(path: Path) -> None:
    """Removes what a killed writer leaves: half a last line, and Optuna's lock file. The caller holds the folder."""
    Path(f"{path}.lock").unlink(missing_ok=True)
    if path.is_file():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)
