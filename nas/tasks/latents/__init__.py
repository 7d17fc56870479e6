"""Captioned images as latents and text embeddings that were computed once: the data of full-size training.

`nas cache` writes a folder of webdataset shards with a manifest. `Task` opens it; its batches are pure functions of the
step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from nas.tasks.latents.ahead import Ahead
from nas.tasks.latents.batches import LatentBatches, PromptBatches
from nas.tasks.latents.manifest import Manifest, Shard, check_fit, check_input
from nas.tasks.latents.store import Store, Targets
from nas.times import Times

__all__ = [
    "Ahead",
    "LatentBatches",
    "Manifest",
    "PromptBatches",
    "Shard",
    "Store",
    "Targets",
    "Task",
    "check_fit",
    "check_input",
]


@dataclass(frozen=True)
class Task:
    """The data in a folder that `nas cache` wrote.

    Attributes:
        folder: the folder.
    """

    folder: Path

    @cached_property
    def store(self) -> Store:
        """Its rows.

        Raises:
            NasError: no such data, or a file that is missing or of another length.
        """
        return Store.open(self.folder)

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of a latent; None where there are prompts only."""
        return self.store.manifest.latent_shape

    @property
    def digest(self) -> str:
        """What a training on this data belongs to."""
        return self.store.digest

    def batches(
        self,
        size: int,
        *,
        seed: int = 0,
        null_share: float = 0.1,
        times: Times | None = None,
        images: bool = False,
        teacher_digest: str | None = None,
        device: torch.device | None = None,
        only: Sequence[int] | None = None,
    ) -> LatentBatches:
        """Latents with noise and times; see `LatentBatches`.

        Args:
            size: rows per batch.
            seed: of everything random.
            null_share: of rows without their caption.
            times: at which noise levels.
            images: whether the pixels are wanted too.
            teacher_digest: of the teacher whose cached answers are taken where there are any; None takes none.
            device: where the batches are wanted.
            only: numbers of the rows that may be drawn; None draws from all.
        """
        return LatentBatches(
            store=self.store,
            size=size,
            seed=seed,
            null_share=null_share,
            times=times or Times(),
            images=images,
            targets=None if teacher_digest is None else self.store.targets(teacher_digest),
            device=device,
            only=only,
        )

    def prompts(
        self, size: int, *, seed: int = 0, null_share: float = 0.0, device: torch.device | None = None
    ) -> PromptBatches:
        """Prompts alone; see `PromptBatches`."""
        return PromptBatches(store=self.store, size=size, seed=seed, null_share=null_share, device=device)
