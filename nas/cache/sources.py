"""Captioned images as people have them: a folder of images, or webdataset shards of images and texts."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nas.errors import NasError

IMAGES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Where a caption stands, in Hugging Face's image folders and in the files of others.
TABLES: Final = ("metadata.jsonl", "captions.jsonl", "metadata.csv", "captions.csv")
COLUMNS: Final = ("text", "caption", "prompt")
_TEXTS: Final = ("txt", "caption", "text")
_HOW: Final = "put NAME.txt beside NAME.png, or a metadata.jsonl with file_name and text on each line"


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One captioned image.

    Attributes:
        name: what messages call it.
        caption: its text.
        path: the file it is in.
        place: offset and size within that file; None where it is the whole file.
        size: of the image's file, in bytes.
    """

    name: str
    caption: str
    path: Path
    place: tuple[int, int] | None
    size: int

    def read(self) -> bytes:
        """The image's file as it is."""
        if self.place is None:
            return self.path.read_bytes()
        with self.path.open("rb") as stream:
            stream.seek(self.place[0])
            return stream.read(self.place[1])


def find_images(source: Path) -> list[Item]:
    """The captioned images of a folder or of webdataset shards, in the order of their names.

    Args:
        source: a folder of images (folders in it included), a folder of .tar files, or one .tar file.

    Raises:
        NasError: nothing there, no images, captions that are missing, or a table that is damaged.
    """
    if source.is_file() and source.suffix == ".tar":
        return list(_webdataset([source]))
    if not source.is_dir():
        raise NasError(f"there is no folder of images at {source}", hint="give a folder of images, or of .tar shards")
    files = sorted(path for path in source.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in IMAGES]
    tars = [path for path in files if path.suffix == ".tar"]
    if images and tars:
        raise NasError(f"{source} holds both images and .tar shards; give the folder of one of them")
    if tars:
        return list(_webdataset(tars))
    if not images:
        raise NasError(f"{source} holds no images ({', '.join(IMAGES)}) and no .tar shards")
    captions = _tables(source, [path for path in files if path.name in TABLES])
    found = [_item(source, path, captions) for path in images]
    _refuse_missing(source, [item for item in found if not item.caption], len(found), "images", _HOW)
    return found


def _item(source: Path, path: Path, captions: Mapping[Path, str]) -> Item:
    text, beside = captions.get(path, ""), path.with_suffix(".txt")
    if not text and beside.is_file():
        text = _decoded(beside.read_bytes(), str(beside))
    name = path.relative_to(source).as_posix()
    return Item(name=name, caption=text.strip(), path=path, place=None, size=path.stat().st_size)


def _refuse_missing(source: Path, missing: list[Item], total: int, what: str, how: str) -> None:
    if missing:
        named = ", ".join(item.name for item in missing[:3])
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise NasError(f"{len(missing):,} of {total:,} {what} in {source} have no caption: {named}{more}", hint=how)


def _tables(source: Path, tables: list[Path]) -> dict[Path, str]:
    """Image -> caption, of all tables in the folder; a table's file names are relative to where it stands."""
    found: dict[Path, str] = {}
    for table in tables:
        for number, row in enumerate(_rows(table), 1):
            where = f"{table}, line {number}"
            column = next((name for name in COLUMNS if isinstance(row.get(name), str)), None)
            if not isinstance(row.get("file_name"), str) or column is None:
                raise NasError(f"{where} must have file_name and one of {', '.join(COLUMNS)}, got {', '.join(row)}")
            image = table.parent / row["file_name"]
            if not image.is_file():
                raise NasError(f"{where} names {row['file_name']}, which is not in {table.parent}")
            found[image] = row[column]
    return found


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    text = _decoded(table.read_bytes(), str(table))
    if table.suffix == ".csv":
        yield from csv.DictReader(io.StringIO(text))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise NasError(f"{table}, line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise NasError(f"{table}, line {number} must be a JSON object")
        yield row


def _webdataset(tars: list[Path]) -> Iterator[Item]:
    """The samples of shards, in their order; grouped by key as the webdataset library does."""
    # Imported here: it takes seconds, and image folders do not need it.
    from webdataset.tariterators import base_plus_ext

    for path in tars:
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    key, extension = base_plus_ext(member.name) if member.isfile() else (None, None)
                    if key is not None and extension is not None:
                        samples.setdefault(key, {})[extension.lower()] = member
        except (tarfile.TarError, OSError) as error:
            raise NasError(f"{path} is not a readable tar file: {error}") from error
        yield from _samples(path, samples)


def _samples(path: Path, samples: Mapping[str, Mapping[str, tarfile.TarInfo]]) -> Iterator[Item]:
    items = []
    with path.open("rb") as stream:
        for key, members in samples.items():
            image = next((members[e[1:]] for e in IMAGES if e[1:] in members), None)
            if image is None:
                raise NasError(f"{path} has a sample {key} without an image ({', '.join(IMAGES)})")
            text = next((members[e] for e in _TEXTS if e in members), None)
            caption = ""
            if text is not None:
                stream.seek(text.offset_data)
                caption = _decoded(stream.read(text.size), f"{path}: {text.name}").strip()
            place = (image.offset_data, image.size)
            items.append(Item(name=image.name, caption=caption, path=path, place=place, size=image.size))
    missing = [item for item in items if not item.caption]
    _refuse_missing(path, missing, len(items), "samples", "give every sample a KEY.txt beside its KEY.jpg")
    yield from items


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NasError(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def source_digest(items: list[Item]) -> str:
    """SHA-256 over names, sizes and captions: what tells one list of images from another without reading them."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps([item.name, item.size, item.caption]).encode())
    return digest.hexdigest()


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one per line; blank lines are none.

    Raises:
        NasError: no such file, or no prompts in it.
    """
    if not path.is_file():
        raise NasError(f"there is no file of prompts at {path}", hint="give a text file with one prompt per line")
    prompts = [line.strip() for line in _decoded(path.read_bytes(), str(path)).splitlines() if line.strip()]
    if not prompts:
        raise NasError(f"{path} has no prompts in it", hint="write one prompt per line")
    return prompts
