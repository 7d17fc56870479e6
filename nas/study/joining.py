"""What a machine that joins a study reads there before it can make the study's plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nas
from nas.errors import NasError
from nas.study.journal import NAME
from nas.study.ledger import load
from nas.study.storage import close_storage, open_storage, shown
from nas.study.study import JOURNALS_STUDY


def stored_settings(url: str | None, folder: Path | None, name: str | None) -> dict[str, Any]:
    """The settings that a study was begun with (`Plan.settings`).

    Args:
        url: of the storage, or None for the journal in `folder`.
        folder: of a study on this machine.
        name: of the study in the storage.

    Raises:
        NasError: there is no such study, it cannot be reached, it was begun without settings or by another version.
    """
    if url is None and (folder is None or not (folder / NAME).is_file()):
        raise NasError(
            f"{folder} holds no study that can be joined",
            hint="name the folder of a running search, or its name and --storage URL",
        )
    storage = open_storage(url, folder)
    try:
        attributes = dict(load(storage, JOURNALS_STUDY if url is None else str(name)).user_attrs)
    finally:
        close_storage(storage)
    return _settings(attributes, shown(url, folder))


def _settings(attributes: Mapping[str, Any], where: str) -> dict[str, Any]:
    version = attributes.get("terms", {}).get("version")
    if version is None:
        raise NasError(f"the study in {where} was begun by an older version", hint="take it up with nas search first")
    if version != nas.__version__:
        raise NasError(
            f"the study in {where} is searched by nas {version}, and this machine has {nas.__version__}",
            hint=f"pip install nas-diffusion=={version}",
        )
    if "settings" not in attributes:
        raise NasError(
            f"the study in {where} was begun from Python and does not say its settings",
            hint="give Plan its settings, or open it with nas.study.Study(plan, folder, joins=True)",
        )
    return dict(attributes["settings"])
