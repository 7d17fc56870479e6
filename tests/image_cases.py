"""Captioned images of random pixels, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def folder_of_images(folder: Path, count: int = 7) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number, width=20 + number).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture {chr(97 + number)}\n")
    return folder


def one_image(folder: Path, name: str, content: str | bytes) -> None:
    """An image without a caption and another file."""
    picture(0).save(folder / "a.png")
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
