"""The embedded task: captioned scenes of coloured shapes, drawn in code, whose answers can be checked exactly.

Nothing is downloaded and nothing is labelled: a caption is drawn as often as wanted, each time at another place and
size, and a generated image is judged by geometry instead of a learnt detector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.tasks.shapes.captions import SPLITS, TOKENS, VOCABULARY, Caption, Thing, captions, parse, tokens
from nas.tasks.shapes.checker import CheckScores, Found, check, detect
from nas.tasks.shapes.scenes import SIZE, background, render

__all__ = ["SPLITS", "Caption", "CheckScores", "Found", "Task", "Thing", "detect", "parse"]

ONE_OBJECT_SHARE = 0.25  # of sampled captions: most of them must exercise relations


@dataclass(frozen=True, kw_only=True)
class Task:
    """The task shapes with 2 relations (left of, above) or 4 (also right of, below)."""

    relations: int = 2

    def __post_init__(self) -> None:
        captions("all", self.relations)  # refuses another number of relations

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return (3, SIZE, SIZE)

    @property
    def vocabulary_size(self) -> int:
        """Token ids run from 0 to this, exclusive; the same for both sets of relations."""
        return len(VOCABULARY)

    @property
    def text_tokens(self) -> int:
        """T: every caption has as many tokens, padding included."""
        return TOKENS

    @property
    def background(self) -> tuple[float, ...]:
        """The background's value per channel in [-1, 1]: the mean that the preconditioner starts from."""
        return tuple(background().tolist())

    def captions(self, split: str = "all") -> tuple[Caption, ...]:
        """Every caption of "train", "held-out" (a tenth of the two-object ones) or "all"."""
        return captions(split, self.relations)

    def sample(self, count: int, split: str, generator: torch.Generator) -> list[Caption]:
        """`count` random captions of a split, a quarter of them with one object where the split has any."""
        pool = self.captions(split)
        one, two = [c for c in pool if c.second is None], [c for c in pool if c.second is not None]
        alone, place = torch.rand((2, count), generator=generator).tolist()
        groups = [one if one and share < ONE_OBJECT_SHARE else two for share in alone]
        return [group[int(where * len(group))] for group, where in zip(groups, place, strict=True)]

    def render(self, batch: Sequence[Caption], generator: torch.Generator) -> Tensor:
        """One random scene per caption, [B, 3, 32, 32] float32 in [-1, 1]."""
        return render(batch, generator)

    def tokens(self, batch: Sequence[Caption | None]) -> Tensor:
        """Token ids [B, T] int64; None is the null caption."""
        return tokens(batch)

    def check(self, images: Tensor, batch: Sequence[Caption]) -> CheckScores:
        """Scores images [B, 3, 32, 32] against one caption each."""
        return check(images, batch)

    def grid(self, images: Tensor, columns: int = 8) -> NDArray[np.uint8]:
        """Images [B, 3, H, W] in [-1, 1] side by side with a pixel between, as uint8 [rows, columns, 3]."""
        pixels = ((images.detach().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        count, _, height, width = pixels.shape
        rows = -(-count // columns)
        canvas = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, 3), 255, dtype=np.uint8)
        for index, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            top, left = index // columns * (height + 1), index % columns * (width + 1)
            canvas[top : top + height, left : left + width] = image
        return canvas
