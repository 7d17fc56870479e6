"""A folder of cached latents and text embeddings: its rows by number, and teachers' answers about them.

Legend: B batch, C channels, H W height and width of the latent, T text tokens, D text width.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from nas.diffusion import Conditioning
from nas.errors import NasError
from nas.paths import atomic_write, cache_dir
from nas.provenance import file_sha
from nas.tasks.latents.manifest import Manifest, Shard
from nas.tasks.latents.shards import Index, Reader, build_index

LATENT: Final = "latent"
CAPTION: Final = "txt"
IMAGE: Final = "png"
TARGETS_FORMAT: Final = "nas-latent-targets-1"
_CHECK: Final = "nas cache --out FOLDER --check says which files are whole"


@dataclass(frozen=True, eq=False)
class Store:
    """The rows of a folder that `nas cache` wrote.

    Attributes:
        folder: the folder.
        manifest: what it holds.
    """

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """The data in a folder, whose files are there and as long as they should be.

        Raises:
            NasError: no such data, or a file that is missing or of another length; nothing is read in full here, which
                `check` does.
        """
        place = Path(folder)
        found = cls(folder=place, manifest=Manifest.read(place))
        for file in (*found.manifest.shards, found.manifest.null):
            _check_length(place, file)
        if found.manifest.rows == 0:
            raise NasError(f"the data in {place} has no rows")
        return found

    def __len__(self) -> int:
        return self.manifest.rows

    @property
    def digest(self) -> str:
        """What a training on this data belongs to."""
        return self.manifest.digest

    @cached_property
    def reader(self) -> Reader:
        """Its rows."""
        return reader(self.folder, self.manifest.shards, self.digest)

    def conditions(self, rows: Iterable[int], device: torch.device | None = None) -> Conditioning:
        """The conditions [B, ...] of rows, float32."""
        rows = list(rows)
        parts = {name: _tensor(self.reader, name, rows, device) for name in self.manifest.conditions}
        return Conditioning(**parts)

    def null(self, device: torch.device | None = None) -> Conditioning:
        """The conditions of no prompt, one row, float32."""
        parts = load_file(self.folder / self.manifest.null.name)
        return Conditioning(**{name: part.to(device=device).float() for name, part in parts.items()})

    def latents(self, rows: Iterable[int], device: torch.device | None = None) -> Tensor:
        """The latents [B, C, H, W] of rows, float32.

        Raises:
            NasError: there are prompts only.
        """
        if self.manifest.latent_shape is None:
            raise NasError(
                f"the data in {self.folder} has prompts only, and images are needed",
                hint="nas cache IMAGES --pipeline ID --out FOLDER",
            )
        return _tensor(self.reader, LATENT, list(rows), device)

    def images(self, rows: Iterable[int], device: torch.device | None = None) -> Tensor:
        """The images [B, 3, h, w] in [-1, 1] that the latents are of.

        Raises:
            NasError: they were not kept.
        """
        if not self.manifest.with_images:
            raise NasError(
                f"the data in {self.folder} has no pixels, which a decoder is trained on",
                hint="cache it again with --keep-images",
            )
        from PIL import Image

        pixels = [np.asarray(Image.open(io.BytesIO(self.reader.raw(IMAGE, row))).convert("RGB")) for row in rows]
        stacked = torch.from_numpy(np.stack(pixels)).to(device=device).permute(0, 3, 1, 2)
        return stacked.float() / 127.5 - 1

    def captions(self, rows: Iterable[int]) -> list[str]:
        """The captions of rows."""
        return [self.reader.raw(CAPTION, row).decode() for row in rows]

    def targets(self, teacher_digest: str) -> Targets | None:
        """A teacher's cached answers, None where there are none.

        Raises:
            NasError: they are not of this data, or damaged.
        """
        path = targets_file(self.folder, teacher_digest)
        return Targets.read(path, self.digest, teacher_digest) if path.is_file() else None

    def check(self, on_progress: Callable[[int, int, str], None] | None = None) -> None:
        """Reads every file in full, teachers' answers included, and compares its hash with the manifest's.

        Raises:
            NasError: names the first that differs.
        """
        files = [*self.manifest.shards, self.manifest.null]
        for path in sorted(self.folder.glob("targets-*.json")):
            if not path.name.endswith(".ledger.json"):
                files += Targets.read(path, self.digest, None).shards
        for number, file in enumerate(files):
            if on_progress is not None:
                on_progress(number, len(files), file.name)
            _check_length(self.folder, file)
            found = file_sha(self.folder / file.name)
            if found != file.sha256:
                raise NasError(
                    f"{self.folder / file.name} has changed since it was written: SHA-256 {found[:12]}, the manifest"
                    f" says {file.sha256[:12]}",
                    hint="remove it and run the same nas cache command again, which makes it anew",
                )
        rows = len(reader(self.folder, self.manifest.shards, None))
        if rows != self.manifest.rows:
            raise NasError(f"the shards in {self.folder} have {rows} rows, the manifest says {self.manifest.rows}")
        if on_progress is not None:
            on_progress(len(files), len(files), "")


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """A teacher's answers about every row, at one time and one noise of the row's own.

    Attributes:
        folder: of the data.
        data: digest of the data.
        teacher: the teacher's name.
        teacher_digest: its digest.
        times: what the manifest says of the times.
        shards: files, one beside each shard of the data.
    """

    folder: Path
    data: str
    teacher: str
    teacher_digest: str
    times: dict[str, Any]
    shards: tuple[Shard, ...]

    @classmethod
    def read(cls, path: Path, data: str, teacher_digest: str | None) -> Targets:
        """The answers that a targets file lists.

        Raises:
            NasError: they are of other data, of another teacher, or damaged.
        """
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            if about.pop("format", None) != TARGETS_FORMAT:
                raise NasError(f"{path} lists no teacher's answers of this format")
            found = cls(folder=path.parent, **{**about, "shards": tuple(Shard(**each) for each in about["shards"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise NasError(f"{path} is damaged: {error}", hint=_CHECK) from error
        if found.data != data or teacher_digest not in (None, found.teacher_digest):
            raise NasError(
                f"the teacher's answers in {path} are of other data or of another teacher",
                hint=f"remove {path.stem}* and run nas cache --out {path.parent} --teacher-targets TEACHER again",
            )
        for file in found.shards:
            _check_length(path.parent, file)
        return found

    @cached_property
    def reader(self) -> Reader:
        """The rows, in the order of the data's."""
        return reader(self.folder, self.shards, f"{self.data}-{self.teacher_digest}")

    def tensor(self, field: str, rows: Sequence[int], device: torch.device | None = None) -> Tensor:
        """One of noise [B, C, H, W], t [B], velocity and null_velocity [B, C, H, W] of rows, float32."""
        return _tensor(self.reader, field, rows, device)


def targets_file(folder: Path, teacher_digest: str) -> Path:
    """The file that lists a teacher's answers."""
    return folder / f"targets-{teacher_digest[:16]}.json"


def reader(folder: Path, shards: Sequence[Shard], digest: str | None) -> Reader:
    """The rows of shards, whose index is kept in the cache under the data's digest; None builds it anew."""
    paths = [folder / shard.name for shard in shards]
    if digest is None:
        return Reader(paths, build_index(paths))
    kept = cache_dir("latents") / f"{digest}.npz"
    if kept.is_file():
        return Reader(paths, Index.load(kept))
    index = build_index(paths)
    atomic_write(kept, index.save())
    return Reader(paths, index)


def _tensor(source: Reader, field: str, rows: Sequence[int], device: torch.device | None) -> Tensor:
    return torch.from_numpy(source.arrays(field, rows)).to(device=device).float()


def _check_length(folder: Path, file: Shard) -> None:
    path = folder / file.name
    if not path.is_file():
        raise NasError(f"{path} is missing, which the manifest beside it lists", hint=_CHECK)
    size = path.stat().st_size
    if size != file.bytes:
        raise NasError(f"{path} has {size:,} bytes, the manifest beside it says {file.bytes:,}", hint=_CHECK)
