"""Training a small copy and watching it: what proxies and long runs share."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nas.batches import WHOLE, Batch, Batches, Part
from nas.bench.held import Fidelity
from nas.bench.small import learning_rate
from nas.build import Network
from nas.diffusion import FlowDenoiser
from nas.distill import Progress, TrainSettings, train
from nas.errors import DIVERGED, OUT_OF_MEMORY, NasError, UntrainableError
from nas.features import body

if TYPE_CHECKING:
    from nas.bench import Bench

_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed")
_LOOKS = (1 / 4, 1 / 2, 3 / 4)  # shares of the steps at which a run may be stopped


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a student stands on its way.

    Attributes:
        step: optimiser steps done.
        train_db: -10 log10 of its mean training loss since the point before. All candidates see the same rows in the
            same order, so these compare like with like and cost nothing.
        seconds: of training so far.
        quality_db, text_db: on held-out rows, with the averaged weights; None where that was not asked for.
    """

    step: int
    train_db: float
    seconds: float
    quality_db: float | None = None
    text_db: float | None = None


Curve = tuple[Point, ...]
Stop = Callable[[Sequence[Point]], str | None]


class Stopped(NasError):
    """A run that was ended early because it could not reach what it had to; `curve` is how far it came."""

    def __init__(self, message: str, curve: Curve) -> None:
        super().__init__(message)
        self.curve = curve

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message, self.curve)


def distilled(
    fresh: FlowDenoiser,
    bench: Bench,
    *,
    stop: Stop | None = None,
    judged_at: Sequence[int] = (),
) -> tuple[FlowDenoiser, Fidelity, Curve]:
    """Trains a student on the bench's rows; it, how well it follows the teacher, and its way there.

    Args:
        fresh: with the weights to start from; trained in place.
        bench: whose settings' steps are taken.
        stop: asked at a quarter, half and three quarters of the steps.
        judged_at: steps at which the averaged student is judged on the held-out rows too, for curves.

    Raises:
        Stopped: `stop` gave a reason.
        UntrainableError: training diverged (not finite, or the student is worse than nothing and than it was
            untrained), or memory ran out; then the batch that fits is named.
    """
    settings = bench.settings
    if settings.steps == 0:
        fresh.eval()
        return fresh, bench.judge(fresh), ()
    network = body(fresh)
    assert isinstance(network, Network)  # a small copy is made of our blocks
    schedule = settings.schedule(learning_rate(network.spec, settings))
    looks = sorted({max(1, round(share * settings.steps)) for share in _LOOKS}) if stop is not None else []
    points: list[Point] = []
    # Kept off the device, where a network of full size has no room for a second copy.
    untrained = {name: each.detach().to("cpu", copy=True) for name, each in fresh.state_dict().items()}

    def watch(step: int, average: FlowDenoiser, history: Sequence[Progress]) -> None:
        points.append(_point(bench, average, history, judged=step in judged_at))
        reason = stop(points) if stop is not None and step in looks else None
        if reason is not None:
            raise Stopped(reason, tuple(points))

    with _fitting(fresh, bench, schedule):
        trained = train(
            fresh,
            bench.data,
            settings.objectives,
            schedule,
            teacher=bench.asked,
            report_every=settings.steps,
            watch=watch,
            watch_at={*looks, *judged_at, settings.steps},
        ).average
    found = bench.judge(trained)
    # Put so that what is not a number counts as worse.
    if not found.quality_db >= 0 and not found.quality_db > (start := _untrained(bench, fresh, untrained)).quality_db:
        raise UntrainableError(
            f"after {settings.steps} steps the student is no better than before the first"
            f" ({found.quality_db:.2f} dB, then {start.quality_db:.2f} dB)",
            DIVERGED,
            hint="a lower learning rate in the proxy's settings",
        )
    return trained, found, tuple(points)


def _untrained(bench: Bench, fresh: FlowDenoiser, weights: dict[str, Tensor]) -> Fidelity:
    """The student as it was."""
    fresh.load_state_dict(weights)
    return bench.judge(fresh.eval())


@contextmanager
def _fitting(fresh: FlowDenoiser, bench: Bench, schedule: TrainSettings) -> Iterator[None]:
    """Says of a run that was out of memory which batch would fit, by trying halves of it.

    Raises:
        UntrainableError: in place of the allocator's error.
    """
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they keep the failed step's tensors alive
    fresh.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    size = schedule.batch // 2
    while size and not _fits(fresh, bench, replace(schedule, steps=1, batch=size)):
        size //= 2
    raise UntrainableError(
        f"{OUT_OF_MEMORY} on {bench.device} with a batch of {schedule.batch}; "
        + (f"a batch of {size} fits" if size else "not even a batch of 1 fits"),
        OUT_OF_MEMORY,
        hint=f"batch = {size} in the proxy's settings, or fewer workers" if size else "a device with more memory",
    )


def _fits(fresh: FlowDenoiser, bench: Bench, schedule: TrainSettings) -> bool:
    try:
        train(fresh, _Fewer(bench.data, schedule.batch), bench.settings.objectives, schedule, teacher=bench.asked)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator failed: torch's own class on a GPU, plain words on the CPU and in cuBLAS and cuDNN."""
    words = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(each in words for each in _NO_MEMORY)


@dataclass(frozen=True)
class _Fewer:
    """`Batches` of the first rows of each batch."""

    inner: Batches
    size: int

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        """Some of that step's rows."""
        return self.inner.batch(step).rows(slice(0, self.size)).rows(part.rows(self.size))


def _point(bench: Bench, average: FlowDenoiser, history: Sequence[Progress], *, judged: bool) -> Point:
    last = history[-1]
    found = bench.judge(average) if judged else None
    return Point(
        step=last.step,
        train_db=decibels(last.loss),
        seconds=last.seconds,
        quality_db=None if found is None else found.quality_db,
        text_db=None if found is None else found.text_db,
    )


def decibels(loss: float) -> float:
    """-10 log10 of a loss."""
    return -10 * math.log10(max(loss, 1e-12))
