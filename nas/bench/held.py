"""One student against the teacher on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nas.batches import Batch
from nas.diffusion import Conditioning, FlowDenoiser, NativeDenoiser
from nas.distill import predict

_EVALUATED = 128  # held-out rows per forward pass


class Held(Protocol):
    """Rows with both of the teacher's answers, such as `nas.targets.Rows`."""

    def __len__(self) -> int: ...

    def batch(self, rows: slice, device: torch.device | None = None) -> Batch:
        """Some of them."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """One trained student against the teacher on held-out rows; higher is better.

    Attributes:
        quality_db: 10 log10(P / mse), where P is the mean square of what the teacher's velocity has beyond that of a
            student whose network gives zeros (`nothing`), so 0 dB is a network that adds nothing.
        text_error: relative error (root mean square) of v(caption) - v(no caption) against the teacher's; 1 is a
            student that ignores the caption.
        loss: mse of the velocity.
    """

    quality_db: float
    text_error: float
    loss: float

    @property
    def text_db(self) -> float:
        """-20 log10(text_error)."""
        return -20 * math.log10(self.text_error) if self.text_error < math.inf else -math.inf


def nothing(denoiser: FlowDenoiser | NativeDenoiser, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
    """The velocity [B, C, H, W] of a student whose network gives zeros: what P of `Fidelity` is counted from.

    Behind a preconditioner it is the skip path. A network that keeps a published schedule says by a zero what its
    parameterisation makes of one (`nas.diffusion.clean_and_noise`): of predicted noise eps = 0, hence x0 = x / (1 - t)
    and v = -x / (1 - t); of a velocity on a variance-preserving schedule x0 = a x and eps = s x; of a rectified flow
    v = 0. Of predicted noise P is so the mean of |eps|^2 / (1 - t)^2, and an error counts by the same factor: high
    noise, where the text decides what is drawn, counts most. Students of one teacher share it.
    """
    if isinstance(denoiser, FlowDenoiser):
        return denoiser.preconditioner.skip(x, t)
    return NativeDenoiser(nn.Identity(), denoiser.schedule, _zeros).velocity(x, t, text)


def _ratio_db(wanted: float, error: float) -> float:
    """10 log10(wanted / error); an error beyond numbers is worse than any."""
    if error == 0:
        return math.inf
    return 10 * math.log10(wanted / error) if error < math.inf else -math.inf


def _zeros(network: nn.Module, sample: Tensor, timestep: Tensor, text: Conditioning) -> Tensor:
    return torch.zeros_like(sample)


@torch.no_grad()
def fidelity_of(
    denoiser: Any,
    held: Held,
    *,
    device: torch.device | None = None,
    at_once: int = _EVALUATED,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Fidelity:
    """How closely a student follows the teacher on held-out rows.

    Args:
        denoiser: the student, a `FlowDenoiser` or `NativeDenoiser` in eval mode.
        held: the rows.
        device: where it is.
        at_once: rows per forward pass, each of which is asked with and without its caption.
        autocast: makes the context that it is asked in.
    """
    residual = error = change = change_error = 0.0
    entries = 0
    for first in range(0, len(held), at_once):
        batch = held.batch(slice(first, min(first + at_once, len(held))), device)
        with autocast():
            outputs = predict(denoiser, batch, with_null=True)
        teacher = batch.teacher
        assert teacher is not None  # held-out rows bring it
        assert outputs.null_velocity is not None  # asked for
        assert teacher.null_velocity is not None
        empty = nothing(denoiser, *batch.point(), batch.text)
        wanted = teacher.velocity - teacher.null_velocity
        residual += float((teacher.velocity - empty).square().sum())
        error += float((teacher.velocity - outputs.velocity).square().sum())
        change += float(wanted.square().sum())
        change_error += float((wanted - (outputs.velocity - outputs.null_velocity)).square().sum())
        entries += wanted.numel()
    return Fidelity(
        quality_db=_ratio_db(residual, error),
        text_error=math.sqrt(change_error / change),
        loss=error / entries,
    )
