"""Where a diffusers network lies: a folder here, a part of a pipeline's folder, or a repository of the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from nas.checkpoint.files import VARIANT, WEIGHTS, find_weights
from nas.errors import NasError, UsageError
from nas.formats import CONFIG, DENOISERS, config_file

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HINT: Final = "give a folder with config.json and .safetensors files, or a hub id that can be reached"


def find_folder(name: str | Path, subfolder: str | None = None, variant: str | None = None) -> Path:
    """The folder with the config.json that `name` means, fetched where it is on the hub.

    Args:
        name: a folder, a pipeline's folder, or a hub id ("segmind/SSD-1B").
        subfolder: the part of a pipeline; its denoiser if None.
        variant: of the weights to fetch, as in `read_folder`.

    Raises:
        UsageError: there is nothing of that name.
        NasError: the hub cannot be reached, or has no such files.
    """
    path = Path(name)
    if path.is_file():
        raise UsageError(f"{path} is a file; a diffusers network is a folder with its config.json", hint=_HINT)
    if path.is_dir():
        return config_file(path, subfolder).parent
    if not _HUB_ID.fullmatch(str(name)):
        raise UsageError(f"there is no folder {path}, and it is no hub id (OWNER/NAME)", hint=_HINT)
    return _fetch(str(name), subfolder, variant)


def _fetch(repository: str, subfolder: str | None, variant: str | None) -> Path:
    """Configurations first, which say where the denoiser is; then that folder's weights and no others."""
    places = [f"{subfolder}/"] if subfolder else ["", *(f"{name}/" for name in DENOISERS)]
    root = _snapshot(repository, [f"{place}{CONFIG}" for place in places])
    try:
        folder = config_file(root, subfolder).parent
    except UsageError as error:
        looked = ", ".join(f"{place}{CONFIG}" for place in places)
        raise NasError(f"the hub repository {repository} has none of {looked}", hint=_HINT) from error
    place = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    # The plain weights unless the variant is asked for or is all that there is; never both, and no training copies
    # ("diffusion_pytorch_model.non_ema.safetensors" of Stable Diffusion 1.5).
    plain, half = (".safetensors", "-*.safetensors"), (f"*{VARIANT}*.safetensors",)
    for wanted, ends, ignored in (("", plain, [f"{place}*{VARIANT}*"]), (VARIANT, half, None)):
        if variant in (None, wanted):
            root = _snapshot(repository, [f"{place}*.json", *(f"{place}{WEIGHTS}{end}" for end in ends)], ignored)
            folder = root / place
            if find_weights(folder, wanted) is not None:
                break
    return folder


def _snapshot(repository: str, patterns: list[str], ignored: list[str] | None = None) -> Path:
    # Imported here: only a hub id needs it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=ignored))
    except (OSError, HFValidationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise NasError(
            f"{repository!r} is no folder here and cannot be fetched from the hub: {reason}", hint=_HINT
        ) from error
