"""Examples with a teacher's answers, and batches of them.

Legend: B batch, R rows, C channels, H W height and width, T text tokens, D text width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nas.batches import WHOLE, Batch, Outputs, Part
from nas.diffusion import Conditioning
from nas.errors import NasError


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Examples with the teacher's answers; images are kept in float16, which every student then sees alike.

    Attributes:
        x: x_t [R, C, H, W].
        t: [R].
        text: [R, T, D].
        velocity: the teacher's answer given the caption [R, C, H, W].
        null_velocity: its answer given the null caption [R, C, H, W].
        null_text: [1, T, D].
        complete: adds to text conditions what a teacher makes of them and the cache does not hold; None adds nothing.
    """

    x: Tensor
    t: Tensor
    text: Tensor
    velocity: Tensor
    null_velocity: Tensor
    null_text: Tensor
    complete: Callable[[Conditioning], Conditioning] | None = None

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: slice, device: torch.device | None = None) -> Batch:
        """Some of the rows in float32, with both of the teacher's answers."""
        x, t, text, velocity, null_velocity = (
            part[rows].to(device=device, dtype=torch.float32).contiguous()
            for part in (self.x, self.t, self.text, self.velocity, self.null_velocity)
        )
        teacher = Outputs(velocity=velocity, null_velocity=null_velocity)
        said, null = (Conditioning(tokens=each) for each in (text, self.null_text.to(x.device)))
        if self.complete is not None:
            with torch.no_grad():
                said, null = self.complete(said), self.complete(null)
        return Batch(x=x, t=t, text=said, teacher=teacher, null_text=null)


@dataclass(frozen=True, kw_only=True)
class Cached:
    """`Batches` of a cache: step s takes the rows from s * size, and starts again at the end.

    Attributes:
        rows: what there is.
        size: rows per batch.
        null_every: every n-th row is asked without its caption; 0 asks none so (objectives that need both answers of
            each row do not need it).
        device: where the batches are wanted.
    """

    rows: Rows
    size: int
    null_every: int = 0
    device: torch.device | None = None

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        """The rows of that step."""
        per_pass = len(self.rows) // self.size
        if per_pass == 0:
            raise NasError(f"a cache of {len(self.rows)} rows has no batch of {self.size}")
        first = step % per_pass * self.size
        own = part.rows(self.size)
        rows = self.rows.batch(slice(first + own.start, first + own.stop), self.device)
        return drop_captions(rows, self.null_every, first=own.start)


def drop_captions(batch: Batch, every: int, first: int = 0) -> Batch:
    """The batch with every n-th caption taken away and the teacher's answer to match; 0 changes nothing.

    Args:
        batch: with the teacher's answers.
        every: n.
        first: the place of its first row in the whole batch.
    """
    teacher = batch.teacher
    if every == 0 or teacher is None or teacher.null_velocity is None:
        return batch
    dropped = each_nth(every, len(batch), first, batch.text.device)
    velocity = torch.where(dropped.view(-1, 1, 1, 1), teacher.null_velocity, teacher.velocity)
    text = batch.text.where(dropped, batch.null_text)
    return replace(batch, text=text, teacher=Outputs(velocity=velocity))


def each_nth(count: int, rows: int, first: int, device: torch.device | None) -> Tensor:
    """True [B] at every count-th row of the whole batch, from its first on."""
    return (torch.arange(rows, device=device) + first) % count == 0
