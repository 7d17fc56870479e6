"""A folder of cached latents made without a pipeline, for tests of what reads it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from nas.tasks.latents import Manifest, Store
from nas.tasks.latents.shards import ShardWriter, record

SHAPE, TOKENS, POOLED = (2, 4, 4), (3, 5), (6,)
SCALING = {"kind": "AutoencoderKL", "factor": 0.18215, "shift": 0.0, "mean": [], "sd": []}


def latent(row: int) -> NDArray[np.float16]:
    """A row's latent: no two alike."""
    return np.random.default_rng(row).normal(size=SHAPE).astype(np.float16)


def tokens(row: int) -> NDArray[np.float16]:
    return np.random.default_rng(1000 + row).normal(size=TOKENS).astype(np.float16)


def pixels(row: int) -> NDArray[np.uint8]:
    return np.random.default_rng(2000 + row).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def png(row: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(row)).save(buffer, format="PNG")
    return buffer.getvalue()


def write(folder: Path, rows: int = 10, shard_rows: int = 4, *, latents: bool = True, images: bool = False) -> Store:
    """A folder as `nas cache` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, first in enumerate(range(0, rows, shard_rows)):
        writer = ShardWriter(folder / f"data-{number:06d}.tar")
        with writer:
            for row in range(first, min(first + shard_rows, rows)):
                fields = {"tokens": tokens(row), "pooled": np.full(POOLED, row, np.float16), "txt": f"caption {row}"}
                if latents:
                    fields["latent"] = latent(row)
                if images:
                    fields["png"] = png(row)
                writer.add(f"{row:09d}", fields)
        shards.append(writer.record())
    null = {"tokens": torch.full((1, *TOKENS), 7.0), "pooled": torch.full((1, *POOLED), -1.0)}
    save_file({name: part.half() for name, part in null.items()}, folder / "null.safetensors")
    manifest = Manifest(
        latent_shape=SHAPE if latents else None,
        conditions={"tokens": TOKENS, "pooled": POOLED},
        image_size=8 if latents else None,
        with_images=images,
        vae={"name": "a/vae", "digest": "v", "scaling": SCALING, "factor": 2} if latents else {},
        text={"name": "a/pipeline", "digest": "t", "encoders": ["CLIPTextModel"]},
        shards=tuple(shards),
        null=record(folder / "null.safetensors", 1),
    )
    manifest.write(folder)
    return Store.open(folder)
