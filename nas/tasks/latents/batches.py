"""Cached data as training batches: a pure function of the step, so that a resumed run sees what an unbroken one sees.

Legend: B batch, C channels, H W height and width of the latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.batches import WHOLE, Batch, Outputs, Part, stream
from nas.diffusion import Conditioning
from nas.errors import NasError
from nas.tasks.latents.store import Store, Targets
from nas.times import Times

# First number of each random stream here, so that none is that of a game or of another part of the data.
_SHUFFLE, _NOISE, _TIMES, _CAPTIONS = 7_101, 7_102, 7_103, 7_104


@lru_cache(maxsize=4)
def _order(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The rows in the order of one pass."""
    order: NDArray[np.int64] = torch.randperm(rows, generator=stream(_SHUFFLE, seed, epoch)).numpy()
    return order


def rows_of(total: int, size: int, seed: int, step: int, part: Part) -> list[int]:
    """The rows of one part of one step's batch: every pass over the data is shuffled anew, and none is cut short.

    Args:
        total: rows of the data.
        size: rows of a whole batch.
        seed: of the orders.
        step: from 0.
        part: the share that is wanted.
    """
    own = part.rows(size)
    places = range(step * size + own.start, step * size + own.stop)
    return [int(_order(total, seed, place // total)[place % total]) for place in places]


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentBatches:
    """`Batches` of latents, their conditions, noise and times.

    Attributes:
        store: the data.
        size: rows per batch.
        seed: of the order, the noise, the times and the dropped captions.
        null_share: the share of rows, chosen at random, that are trained without their caption, which guidance needs.
        times: at which noise levels; unused with `targets`, which bring theirs.
        images: whether the pixels are wanted too, for decoders.
        targets: a teacher's cached answers, with which the teacher need not be asked.
        device: where the batches are wanted.
        only: numbers of the rows that may be drawn; None draws from all.
    """

    store: Store
    size: int
    seed: int = 0
    null_share: float = 0.1
    times: Times = field(default_factory=Times)
    images: bool = False
    targets: Targets | None = None
    device: torch.device | None = None
    only: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _check(self.size, self.null_share)
        if self.store.manifest.latent_shape is None:
            self.store.latents([0])  # says that there are prompts only

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        """The rows of that step."""
        rows = rows_of(len(self.store if self.only is None else self.only), self.size, self.seed, step, part)
        if self.only is not None:
            rows = [self.only[row] for row in rows]
        text, null, dropped = _told(self.store, rows, self.seed, step, part, self.size, self.null_share, self.device)
        clean = self.store.latents(rows, self.device)
        images = self.store.images(rows, self.device) if self.images else None
        if self.targets is not None:
            return self._answered(rows, Batch(text=text, null_text=null, clean=clean, images=images), dropped)
        own = part.rows(self.size)
        t = self.times.draw(self.size, stream(_TIMES, self.seed, step))[own]
        noise = self._noise(step, own, clean.shape[1:])
        return Batch(
            text=text,
            null_text=null,
            clean=clean,
            noise=noise.to(self.device),
            t=t.to(self.device),
            images=images,
        )

    def _noise(self, step: int, own: slice, shape: torch.Size) -> Tensor:
        """The noise [B, C, H, W] of some rows of a batch, each from a stream of its own.

        So no process draws what others need, and a row's noise does not depend on how many processes share the batch.
        """
        drawn = [
            torch.randn(shape, generator=stream(_NOISE, self.seed, step, row + 1)) for row in range(self.size)[own]
        ]
        return torch.stack(drawn)

    def _answered(self, rows: list[int], batch: Batch, dropped: Tensor) -> Batch:
        """The batch at the times and with the noise of the cached answers; without its caption, the answer to none."""
        assert self.targets is not None  # the caller saw to it
        noise, t, velocity, null_velocity = (
            self.targets.tensor(name, rows, self.device) for name in ("noise", "t", "velocity", "null_velocity")
        )
        velocity = torch.where(dropped.view(-1, 1, 1, 1), null_velocity, velocity)
        return replace(batch, noise=noise, t=t, teacher=Outputs(velocity=velocity, null_velocity=null_velocity))

    def statement(self) -> str:
        """One sentence on the times that are trained at, and what becomes of those that the teacher never saw."""
        if self.targets is None:
            return self.times.statement()
        return f"{self.targets.times.get('statement', '')} (cached with the answers of {self.targets.teacher})"


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptBatches:
    """`Batches` of prompts alone, for objectives that need no images; data with images serves too.

    Attributes:
        store: the data.
        size: rows per batch.
        seed: of the order and the dropped captions.
        null_share: as for `LatentBatches`; none, because data-free methods drop captions themselves, if at all.
        device: where the batches are wanted.
    """

    store: Store
    size: int
    seed: int = 0
    null_share: float = 0.0
    device: torch.device | None = None

    def __post_init__(self) -> None:
        _check(self.size, self.null_share)

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        """The prompts of that step."""
        rows = rows_of(len(self.store), self.size, self.seed, step, part)
        text, null, _ = _told(self.store, rows, self.seed, step, part, self.size, self.null_share, self.device)
        return Batch(text=text, null_text=null)


def _told(
    store: Store,
    rows: list[int],
    seed: int,
    step: int,
    part: Part,
    size: int,
    null_share: float,
    device: torch.device | None,
) -> tuple[Conditioning, Conditioning, Tensor]:
    """The conditions of rows, those of no caption, and which rows [B] have lost theirs."""
    text, null = store.conditions(rows, device), store.null(device)
    drawn = torch.rand(size, generator=stream(_CAPTIONS, seed, step))[part.rows(size)]
    dropped = (drawn < null_share).to(text.device)
    return (text.where(dropped, null) if null_share else text), null, dropped


def _check(size: int, null_share: float) -> None:
    if size < 1 or not 0 <= null_share <= 1:
        raise NasError(f"batches need size >= 1 and null_share in [0, 1], got {size} and {null_share}")
