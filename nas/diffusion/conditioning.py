"""What a denoiser is told besides the noisy image: text, and whatever else its pipeline gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from nas.errors import NasError


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Conditioning:
    """The conditions of B images.

    Legend: B batch, C channels, H W height and width, T text tokens, D text width, P pooled width, n sizes, G width of
    the embedding.

    Attributes:
        tokens: text tokens [B, T, D].
        pooled: summary of the text [B, P] (SDXL, SD3), None where the network takes none.
        size_ids: sizes of the wanted image [B, n] (SDXL's original size, crop and target size), None likewise.
        layout: field [B, C, H, W] that the text adds to the network's input (the embedded teacher's), None likewise.
        guidance: embedding of the guidance scale [B, G] that a consistency model was trained under, None likewise.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    size_ids: Tensor | None = None
    layout: Tensor | None = None
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.tokens.device

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors there are, by name."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Every tensor changed by the same function."""
        return type(self)(**{name: change(part) for name, part in self.parts()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """On another device, in another precision."""
        return self.map(lambda part: part.to(device=device, dtype=dtype))

    def rows(self, which: slice | Tensor) -> Self:
        """Some of the images' conditions."""
        return self.map(lambda part: part[which])

    def expand(self, count: int) -> Self:
        """One row's conditions for `count` images."""
        return self.map(lambda part: part.expand(count, *part.shape[1:]))

    def like(self, other: Conditioning) -> Self:
        """These conditions (one row, or as many as `other` has) for other's images, with what they lack taken there.

        Of no caption, the text is its own and the image sizes and the guidance are those of the image asked for.
        """
        own = dict(self.expand(len(other)).parts() if len(self) == 1 else self.parts())
        return type(self)(**{name: own.get(name, part) for name, part in other.parts()})

    def where(self, chosen: Tensor, other: Conditioning) -> Self:
        """The rows of `other` (one row, or as many) where `chosen` [B] is true, and these elsewhere."""
        theirs = dict(other.like(self).parts())

        def either(name: str, part: Tensor) -> Tensor:
            return torch.where(chosen.view(-1, *(1,) * (part.dim() - 1)), theirs[name], part)

        return type(self)(**{name: either(name, part) for name, part in self.parts()})

    @classmethod
    def cat(cls, several: Sequence[Conditioning]) -> Self:
        """One after the other.

        Raises:
            NasError: they do not hold the same parts.
        """
        names = [tuple(name for name, _ in each.parts()) for each in several]
        if len(set(names)) != 1:
            raise NasError(f"conditions of different parts cannot be joined: {' and '.join(map(str, names))}")
        return cls(**{name: torch.cat([getattr(each, name) for each in several]) for name in names[0]})
