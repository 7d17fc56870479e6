"""Image files to training images: decoded, resized to the wanted side, cut out of the middle."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from nas.cache.sources import Item
from nas.errors import NasError
from nas.teachers import Crop


class UnreadableError(NasError):
    """An image that cannot be decoded."""


def square(item: Item, side: int) -> tuple[NDArray[np.uint8], Crop]:
    """The middle square of an image, resized, as [side, side, 3], and where it was cut.

    The shorter side is brought to `side` (Lanczos; small images are enlarged), then the middle is taken. Transparency
    is laid on white, and the camera's orientation is followed.

    Raises:
        UnreadableError: it cannot be decoded.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(item.read())) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UnreadableError(
            f"the image {item.name} cannot be read: {error}", hint="remove it, or pass over such: --skip-unreadable"
        ) from error
    width, height = image.size
    scale = side / min(width, height)
    resized = image.resize(
        (max(side, round(width * scale)), max(side, round(height * scale))), Image.Resampling.LANCZOS
    )
    left, top = (resized.width - side) // 2, (resized.height - side) // 2
    cut = resized.crop((left, top, left + side, top + side))
    return np.asarray(cut), Crop(original=(height, width), corner=(top, left), size=(side, side))
