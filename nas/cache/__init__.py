"""Data made ready for training: images to latents, captions to text embeddings, and a teacher's answers about them.

All of it is computed once, in shards that are finished one by one: a killed run goes on where it was, and ends in the
same bytes. Legend: B batch, C channels, H W height and width of the latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from nas.cache.ledger import Ledger, check_identity, claimed
from nas.cache.pixels import UnreadableError, square
from nas.cache.sources import Item, find_images, read_prompts, source_digest
from nas.cache.targets import TargetSettings, cache_targets
from nas.diffusion import Conditioning
from nas.errors import NasError
from nas.paths import atomic_write
from nas.provenance import text_sha
from nas.tasks.latents.manifest import MANIFEST, Manifest
from nas.tasks.latents.shards import ShardWriter, record
from nas.tasks.latents.store import CAPTION, IMAGE, LATENT, Store
from nas.teachers import Crop, Pipeline, Vae, load_pipeline, load_vae

__all__ = ["CacheSettings", "Report", "TargetSettings", "cache_images", "cache_prompts", "cache_targets", "check"]

Report = Callable[[str, int, int, str], None]  # stage, done, total, note

_KIND: Final = "data"
_NULL: Final = "null.safetensors"
_DECODERS: Final = 4  # threads; decoding and resizing leave Python's lock
_PRECISIONS: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """How data is made.

    Attributes:
        pipeline: folder or hub id whose text encoders, and whose VAE unless `vae` says otherwise, are used.
        vae: another VAE, by folder or hub id.
        size: side of the images in px; None takes what the pipeline's denoiser was made for.
        batch: images or prompts encoded at once.
        shard_rows: rows per shard.
        keep_images: whether the pixels are kept too, which training a decoder needs.
        skip_unreadable: whether images that cannot be decoded are passed over, and listed; else they end the run.
        device: where the encoders run.
        precision: of their weights; what they give is stored in float16.
    """

    pipeline: str
    vae: str | None = None
    size: int | None = None
    batch: int = 8
    shard_rows: int = 1000
    keep_images: bool = False
    skip_unreadable: bool = False
    device: str = "cpu"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.batch < 1 or self.shard_rows < 1 or (self.size is not None and self.size < 1):
            raise NasError(
                "caching needs batch, shard rows and size of at least 1, got"
                f" {self.batch}, {self.shard_rows} and {self.size}"
            )
        if self.precision not in _PRECISIONS:
            raise NasError(f"unknown precision {self.precision!r}; known: {', '.join(_PRECISIONS)}")

    @property
    def dtype(self) -> torch.dtype:
        """The precision as torch has it."""
        return _PRECISIONS[self.precision]


def cache_images(source: Path, settings: CacheSettings, out: Path, report: Report | None = None) -> Store:
    """Latents and text embeddings of captioned images, in a folder that a training reads.

    Args:
        source: see `nas.cache.sources.find_images`.
        settings: how.
        out: the folder; one that an unfinished run of the same settings left is taken up.
        report: called with stage, rows done, rows in all and a note.

    Raises:
        NasError: images without captions or that cannot be read, a VAE or pipeline that cannot be read, values that do
            not fit float16, data of other settings in the folder, or a disk that is full.
    """
    tell = report or _silent
    items = find_images(source)
    with claimed(out):
        tell("load", 0, 1, settings.pipeline)
        own = settings.vae is None
        pipe = load_pipeline(settings.pipeline, device=settings.device, dtype=settings.dtype, vae=own)
        vae = pipe.vae if own else load_vae(str(settings.vae), device=settings.device, dtype=settings.dtype)
        size = settings.size or pipe.image_size
        latent_shape = vae.latent_shape(size)
        identity = {
            **_identity(pipe, settings),
            "images": source_digest(items),
            "VAE": vae.digest,
            "size": size,
            "keep_images": settings.keep_images,
        }
        maker = _Maker(pipe=pipe, vae=vae, size=size, settings=settings)
        about = {"name": vae.name, "digest": vae.digest, "scaling": vae.scaling.to_json(), "factor": vae.factor}

        def fill(writer: ShardWriter, first: int, tick: Callable[[int], None]) -> list[str]:
            return maker.images(writer, items[first : first + settings.shard_rows], first, tick)

        return _run(
            out, identity, len(items), settings, pipe, fill, tell,
            latent_shape=latent_shape, image_size=size, with_images=settings.keep_images, vae=about,
        )  # fmt: skip


def cache_prompts(source: Path, settings: CacheSettings, out: Path, report: Report | None = None) -> Store:
    """Text embeddings of prompts alone, for objectives that need no images.

    Args:
        source: a text file with one prompt per line.
        settings: how; nothing about images is used but the size, which some denoisers are told.
        out: as for `cache_images`.
        report: likewise.

    Raises:
        NasError: no prompts, a pipeline that cannot be read, or as for `cache_images`.
    """
    tell = report or _silent
    prompts = read_prompts(source)
    with claimed(out):
        tell("load", 0, 1, settings.pipeline)
        pipe = load_pipeline(settings.pipeline, device=settings.device, dtype=settings.dtype, vae=False)
        size = settings.size or pipe.image_size
        identity = {**_identity(pipe, settings), "prompts": text_sha("\n".join(prompts)), "size": size}
        maker = _Maker(pipe=pipe, vae=None, size=size, settings=settings)

        def fill(writer: ShardWriter, first: int, tick: Callable[[int], None]) -> list[str]:
            return maker.prompts(writer, prompts[first : first + settings.shard_rows], first, tick)

        return _run(out, identity, len(prompts), settings, pipe, fill, tell, latent_shape=None, image_size=None)


def check(folder: Path, report: Report | None = None) -> Store:
    """Reads all cached data of a folder and compares it with its hashes.

    Raises:
        NasError: names the first file that is missing or has changed.
    """
    store = Store.open(folder)
    tell = report or _silent
    store.check(lambda done, total, name: tell("check", done, total, name))
    return store


def _identity(pipe: Pipeline, settings: CacheSettings) -> dict[str, Any]:
    return {
        "text encoders": pipe.text_digest,
        "precision": settings.precision,
        "rows per shard": settings.shard_rows,
    }


def _run(
    out: Path,
    identity: dict[str, Any],
    total: int,
    settings: CacheSettings,
    pipe: Pipeline,
    fill: Callable[[ShardWriter, int, Callable[[int], None]], list[str]],
    tell: Report,
    **about: Any,
) -> Store:
    """Makes the shards that are not there yet, then the manifest."""
    manifest = Manifest.read(out) if (out / MANIFEST).is_file() else None
    if manifest is not None:
        check_identity(out, manifest.identity, identity)
    ledger = Ledger(out, _KIND, identity)
    if manifest is not None and (not ledger.path.is_file() or manifest.shards == ledger.shards()):
        return Store.open(out)
    for number, first in enumerate(range(0, total, settings.shard_rows)):

        def tick(rows: int, first: int = first) -> None:
            tell("cache", first + rows, total, "")

        def write(writer: ShardWriter, first: int = first, tick: Callable[[int], None] = tick) -> list[str]:
            return fill(writer, first, tick)

        tick(0)
        ledger.shard(number, write)
    if not ledger.shards():
        raise NasError(f"none of the {total:,} images could be read", hint="leave --skip-unreadable out to see why")
    null = {name: _half(part, "the conditions of no prompt") for name, part in pipe.null().parts()}
    atomic_write(out / _NULL, save({name: torch.from_numpy(part) for name, part in null.items()}))
    manifest = Manifest(
        conditions={name: tuple(part.shape[1:]) for name, part in _one(pipe, identity["size"]).parts()},
        text={"name": pipe.name, "digest": pipe.text_digest, "encoders": list(pipe.text_encoders)},
        shards=ledger.shards(),
        null=record(out / _NULL, 1),
        identity=ledger.identity,
        skipped=ledger.passed_over(),
        **about,
    )
    manifest.write(out)
    tell("cache", total, total, "")
    return Store.open(out)


def _one(pipe: Pipeline, size: int) -> Conditioning:
    return pipe.encode([""], [Crop.whole(size)])


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """Turns items into rows."""

    pipe: Pipeline
    vae: Vae | None
    size: int
    settings: CacheSettings

    def prompts(
        self, writer: ShardWriter, prompts: Sequence[str], first: int, tick: Callable[[int], None]
    ) -> list[str]:
        """Writes the rows of prompts."""
        for start in range(0, len(prompts), self.settings.batch):
            some = prompts[start : start + self.settings.batch]
            told = self._told(some, [Crop.whole(self.size)] * len(some))
            for row, prompt in enumerate(some):
                fields = {name: part[row] for name, part in told.items()}
                writer.add(f"{first + start + row:09d}", {**fields, CAPTION: prompt})
            tick(start + len(some))
        return []

    def images(self, writer: ShardWriter, items: Sequence[Item], first: int, tick: Callable[[int], None]) -> list[str]:
        """Writes the rows of images; says which were passed over."""
        skipped = []
        with ThreadPoolExecutor(_DECODERS) as pool:
            for start in range(0, len(items), self.settings.batch):
                some = items[start : start + self.settings.batch]
                cut = list(self._cut(pool, some))
                skipped += [item.name for item, found in zip(some, cut, strict=True) if found is None]
                rows = [(start + i, item, *got) for i, (item, got) in enumerate(zip(some, cut, strict=True)) if got]
                if rows:
                    self._write(writer, first, rows)
                tick(start + len(some))
        return skipped

    def _cut(self, pool: ThreadPoolExecutor, items: Sequence[Item]) -> Iterator[tuple[NDArray[np.uint8], Crop] | None]:
        for future in [pool.submit(square, item, self.size) for item in items]:
            try:
                yield future.result()
            except UnreadableError:
                if not self.settings.skip_unreadable:
                    raise
                yield None

    def _write(
        self, writer: ShardWriter, first: int, rows: Sequence[tuple[int, Item, NDArray[np.uint8], Crop]]
    ) -> None:
        assert self.vae is not None  # there are images
        pixels = np.stack([each for _, _, each, _ in rows])
        images = torch.from_numpy(pixels).to(self.settings.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        names = f"the image {rows[0][1].name} or one of the {len(rows)} from it on"
        latents = _half(self.vae.encode(images), f"the latents of {names} (VAE {self.vae.name})")
        told = self._told([item.caption for _, item, _, _ in rows], [crop for _, _, _, crop in rows])
        for row, (number, item, each, _) in enumerate(rows):
            fields: dict[str, Any] = {name: part[row] for name, part in told.items()}
            fields |= {LATENT: latents[row], CAPTION: item.caption}
            if self.settings.keep_images:
                fields[IMAGE] = _png(each)
            writer.add(f"{first + number:09d}", fields)

    def _told(self, prompts: Sequence[str], crops: Sequence[Crop]) -> dict[str, NDArray[Any]]:
        """The conditions of prompts as they are stored."""
        told = self.pipe.encode(prompts, crops)
        return {
            # Sizes in px are exact in float16 up to 2048 only.
            name: part.cpu().numpy() if name == "size_ids" else _half(part, f"the {name} of {prompts[0]!r}")
            for name, part in told.parts()
        }


def _half(values: Tensor, what: str) -> NDArray[np.float16]:
    """The values as float16.

    Raises:
        NasError: one is not finite, or too large.
    """
    half = values.detach().to("cpu", torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise NasError(
            f"{what} are not finite in float16, which they are stored in",
            hint="use --precision fp32 or bf16 (SDXL's own VAE overflows in fp16), or look at the image",
        )
    return half.numpy()


def _png(pixels: NDArray[np.uint8]) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _silent(stage: str, done: int, total: int, note: str) -> None:
    """Tells nobody."""
