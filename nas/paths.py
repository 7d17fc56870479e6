"""The only finder of data folders and the only writer that replaces files whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from nas.errors import NasError, unknown

_PACKAGE = Path(__file__).resolve().parent


def data_dir(kind: str, override: str | Path | None = None) -> Path:
    """The folder that holds `kind` ("search_spaces", "latency_tables").

    Looked for in this order: `override`; the folder `kind` below the environment variable NAS_DATA; the copy packaged
    in the wheel; the checkout beside the package (an editable install has no packaged copy, a wheel no sibling).

    Raises:
        NasError: none of them exists; the message lists where was looked.
    """
    candidates = [Path(override)] if override is not None else []
    if override is None:
        if os.environ.get("NAS_DATA"):
            candidates.append(Path(os.environ["NAS_DATA"]) / kind)
        candidates += [_PACKAGE / "data" / kind, _PACKAGE.parent / kind]
    for folder in candidates:
        if folder.is_dir():
            return folder
    looked = ", ".join(str(c) for c in candidates)
    raise NasError(
        f"no folder {kind!r} was found (looked in {looked})", hint="set NAS_DATA to the folder that holds it"
    )


def package_data(*parts: str) -> Path:
    """A file shipped inside the package, such as the embedded teacher's weights."""
    return _PACKAGE.joinpath("data", *parts)


def cache_dir(*parts: str) -> Path:
    """A folder for what can be made again (traces, cached teacher targets): NAS_CACHE or ~/.cache/nas.

    Raises:
        NasError: it cannot be made.
    """
    root = Path(os.environ.get("NAS_CACHE") or Path.home() / ".cache" / "nas")
    folder = root.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NasError(
            f"cannot make the cache folder {folder}: {error.strerror}",
            hint="set NAS_CACHE to a folder you may write to",
        ) from error
    return folder


def writable_dir(folder: Path) -> Path:
    """`folder`, made if it is missing and proved writable now rather than after an hour's work.

    Raises:
        NasError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise NasError(
            f"cannot write to the output folder {folder}: {error.strerror}", hint="choose another with --out"
        ) from error
    return folder


def atomic_write(path: Path, content: str | bytes) -> Path:
    """Writes `path` whole or not at all: a killed process leaves the old file or the new one, never half of one.

    Raises:
        NasError: the system refuses the write (read-only folder, full disk).
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise NasError(f"cannot write {path}: {error.strerror}", hint="choose another folder with --out") from error
    return path


def find_study(name: str, root: str | Path = "reports") -> Path:
    """The folder of a study: a path, or a name below `root`.

    Raises:
        UsageError: there is none of that name; the nearest is offered.
    """
    for folder in (Path(name), Path(root) / name):
        if (folder / "study.json").is_file():
            return folder
    known = [path.parent.name for path in Path(root).glob("*/study.json")]
    raise unknown("study", name, known, where=f"{root}/", hint="nas search --space snapgen_unet --budget 1.4s@iphone")
