"""One step's examples, which part of them a process takes, and its random draws: all functions of the step.

So the position in the data needs no saving, and one process, several, or several accumulated pieces see the same
examples and the same noise. Legend: B batch, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nas.diffusion import Conditioning, noised
from nas.errors import NasError


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """What a teacher or a student says about one batch, as rectified-flow velocities whatever its network predicts.

    Attributes:
        velocity: eps - x0 [B, C, H, W] given the caption.
        null_velocity: the same [B, C, H, W] given the text of no caption; None where nobody asked for it.
        features: outputs of the layers that an objective compares, by `nas.features.Tap.key`.
    """

    velocity: Tensor
    null_velocity: Tensor | None = None
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, which: slice) -> Outputs:
        """What is said about some of the examples."""
        return Outputs(
            velocity=self.velocity[which],
            null_velocity=None if self.null_velocity is None else self.null_velocity[which],
            features={key: value[which] for key, value in self.features.items()},
        )


@dataclass(frozen=True, slots=True)
class Part:
    """Which of `count` equal parts of a batch: one per process and accumulated piece."""

    index: int = 0
    count: int = 1

    def rows(self, total: int) -> slice:
        """Its rows of a batch of `total`.

        Raises:
            NasError: the batch cannot be cut so.
        """
        size, rest = divmod(total, self.count)
        if rest or size == 0:
            raise NasError(
                f"a batch of {total} cannot be cut into {self.count} equal parts (processes times accumulation)",
                hint="choose a batch that both divide",
            )
        return slice(self.index * size, (self.index + 1) * size)


WHOLE = Part()


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """A part of one step's examples, on the device to train on.

    Attributes:
        text: conditions of the B images.
        null_text: those of no caption, one row.
        clean: x0 [B, C, H, W], None for prompts without images.
        noise: eps [B, C, H, W], None likewise.
        t: times [B] in (0, 1), None likewise.
        x: x_t [B, C, H, W]; made of the three above where it is not given.
        images: pixels [B, 3, h, w] in [-1, 1] of the latents `clean`, where a decoder is trained.
        teacher: its outputs at x, t, where they were computed before; otherwise the loop asks the teacher.
    """

    text: Conditioning
    null_text: Conditioning
    clean: Tensor | None = None
    noise: Tensor | None = None
    t: Tensor | None = None
    x: Tensor | None = None
    images: Tensor | None = None
    teacher: Outputs | None = None

    def __len__(self) -> int:
        return len(self.text)

    def rows(self, which: slice) -> Batch:
        """Some of its examples."""
        images = {
            name: value[which]
            for name in ("clean", "noise", "t", "x", "images")
            if (value := getattr(self, name)) is not None
        }
        teacher = None if self.teacher is None else self.teacher.rows(which)
        return replace(self, text=self.text.rows(which), teacher=teacher, **images)

    def point(self) -> tuple[Tensor, Tensor]:
        """Where both networks are asked: x_t [B, C, H, W] and t [B].

        Raises:
            NasError: the data has prompts only.
        """
        if self.t is None or (self.x is None and (self.clean is None or self.noise is None)):
            raise NasError(
                "this objective compares networks on noised images, and the data has prompts only",
                hint="give data with images, or a data-free objective such as sid_lsg",
            )
        if self.x is not None:
            return self.x, self.t
        assert self.clean is not None  # checked above
        assert self.noise is not None
        return noised(self.clean, self.noise, self.t), self.t

    def images_needed(self) -> Tensor:
        """The clean images x0 [B, C, H, W].

        Raises:
            NasError: the data has none.
        """
        if self.clean is None:
            raise NasError("this objective needs real images, and the data has prompts or cached teacher targets only")
        return self.clean

    @property
    def velocity(self) -> Tensor:
        """The data's own eps - x0 [B, C, H, W]: what a denoiser is trained on without a teacher."""
        if self.noise is None:
            raise NasError("this objective needs the noise that was added, and the data does not bring it")
        return self.noise - self.images_needed()


class Batches(Protocol):
    """Training data as a function of the step."""

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        """The examples of that step, the same at every call; `part` takes a share of the same whole."""
        ...

    @property
    def size(self) -> int:
        """B of a whole batch."""
        ...


def stream(*numbers: int) -> torch.Generator:
    """An own random stream for every tuple of numbers; torch's CPU generator takes only 32 bits of a seed."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """Random numbers for the rows of one part of a batch.

    Drawn on the CPU for the whole batch and cut, so that they depend neither on the device nor on how many processes
    share the batch.

    Attributes:
        generator: of this turn.
        total: rows of the whole batch.
        part: the share that is kept.
        device: where the numbers go.
    """

    generator: torch.Generator
    total: int
    part: Part
    device: torch.device

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1) [B, *shape]."""
        return self._own(torch.randn((self.total, *shape), generator=self.generator))

    def uniform(self) -> Tensor:
        """U(0, 1) [B]."""
        return self._own(torch.rand((self.total,), generator=self.generator))

    def integers(self, low: int, high: int) -> Tensor:
        """Whole numbers [B] from `low` to `high` - 1."""
        return self._own(torch.randint(low, high, (self.total,), generator=self.generator))

    def integer(self, low: int, high: int) -> int:
        """One whole number for the whole batch."""
        return int(torch.randint(low, high, (), generator=self.generator))

    def _own(self, drawn: Tensor) -> Tensor:
        return drawn[self.part.rows(self.total)].to(self.device)
