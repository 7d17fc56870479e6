"""What a denoiser draws, what that is worth, and how fast it goes.

Whoever is compared draws the same prompts from the same starting noise: each batch's noise comes from a generator of
its own, seeded by the batch's number, and its first draw is where every sampler starts. Legend: N images, B batch,
C channels, H W height and width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nas.batches import stream
from nas.diffusion import Conditioning, Denoiser
from nas.errors import NasError
from nas.judge.pipelines import EmbeddedPipeline, Pipeline
from nas.students import Sampling, draw
from nas.targets import Lesson

SEED = 777  # of prompts and noise, unless another is asked for
BATCH = 64  # images per sampling batch


class Counting(nn.Module):
    """A denoiser that counts what it is asked.

    Attributes:
        calls: times it was asked.
        rows: images it was asked about; with guidance each image counts twice.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser: Any = denoiser
        self.calls = self.rows = 0

    def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """Its clean image [B, C, H, W]."""
        self._count(x)
        clean: Tensor = self.denoiser.denoise(x, t, text)
        return clean

    def velocity(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """Its velocity [B, C, H, W]."""
        self._count(x)
        velocity: Tensor = self.denoiser.velocity(x, t, text)
        return velocity

    def _count(self, x: Tensor) -> None:
        self.calls += 1
        self.rows += len(x)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast images are drawn; text is given, and decoding is not in it.

    Attributes:
        images_per_second: of the median of the full batches after the first, which warms up.
        batch: images per batch.
        calls: times the network is asked per batch.
        evaluations: network evaluations per image: with guidance each call is of two.
    """

    images_per_second: float
    batch: int
    calls: int
    evaluations: float


def drawn(
    denoiser: Denoiser,
    pipeline: Pipeline,
    sampling: Sampling,
    prompts: Sequence[Any],
    *,
    seed: int = SEED,
    batch: int = BATCH,
    on_progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """One picture [N, 3, h, w] on the CPU per prompt, in [-1, 1] up to what the network overshoots.

    Args:
        denoiser: in eval mode, on the pipeline's device.
        pipeline: gives conditions and makes pictures.
        sampling: how it is sampled.
        prompts: of the pipeline.
        seed: of all noise, with each batch's number.
        batch: images at once; it is part of what decides the noise.
        on_progress: called with images done and images in all.

    Raises:
        NasError: an image is not finite.
    """
    return _draw(denoiser, pipeline, sampling, prompts, seed, batch, on_progress)[0]


def drawn_and_timed(
    denoiser: Denoiser,
    pipeline: Pipeline,
    sampling: Sampling,
    prompts: Sequence[Any],
    *,
    seed: int = SEED,
    batch: int = BATCH,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Speed]:
    """What `drawn` gives, and how fast it went; a batch is drawn twice where there is none after the first.

    Raises:
        NasError: an image is not finite.
    """
    counting = Counting(denoiser)
    counted: Any = counting
    pictures, seconds = _draw(counted, pipeline, sampling, prompts, seed, batch, on_progress)
    asked, evaluated = counting.calls, counting.rows
    size = min(batch, len(prompts))
    warm = [took for rows, took in seconds[1:] if rows == size]
    if not warm:
        warm = [took for _, took in _draw(counted, pipeline, sampling, prompts[:size], seed, batch, None)[1]]
    return pictures, Speed(
        images_per_second=size / statistics.median(warm),
        batch=size,
        calls=asked // len(seconds),
        evaluations=evaluated / len(prompts),
    )


def _draw(
    denoiser: Denoiser,
    pipeline: Pipeline,
    sampling: Sampling,
    prompts: Sequence[Any],
    seed: int,
    batch: int,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, list[tuple[int, float]]]:
    """The pictures, and of each batch its images and the seconds that sampling them took."""
    parts: list[Tensor] = []
    seconds: list[tuple[int, float]] = []
    for index, first in enumerate(range(0, len(prompts), batch)):
        text, null = pipeline.conditions(prompts[first : first + batch])
        _wait(text.device)
        began = time.perf_counter()
        made = draw(denoiser, sampling, text, null, shape=pipeline.shape, generator=stream(seed, index))
        _wait(text.device)
        seconds.append((len(text), time.perf_counter() - began))
        if not bool(torch.isfinite(made).all()):
            raise NasError("the network draws images that are not finite", hint="its training diverged; train it again")
        parts.append(pipeline.pictures(made))
        if on_progress is not None:
            on_progress(min(first + batch, len(prompts)), len(prompts))
    return torch.cat(parts), seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def scores(
    denoiser: Denoiser,
    lesson: Lesson,
    sampling: Sampling,
    *,
    prompts: int = 512,
    seed: int = SEED,
    split: str = "held-out",
    batch: int = BATCH,
) -> dict[str, float]:
    """What a denoiser of the embedded task is worth, all numbers by name.

    Args:
        denoiser: student or teacher, on the device of the lesson's teacher.
        lesson: the task, and the teacher whose text is read.
        sampling: how it is sampled.
        prompts: images, one per random caption.
        seed: of captions and noise; equal seeds draw the same captions from the same noise.
        split: of the captions: "held-out", "train" or "all".
        batch: images at once, also when timed.

    Returns:
        The checker's shares "count", "colour", "shape", "relation", "two_objects" and "correct" in [0, 1];
        "shapes_fd" to real drawings and "shapes_fd_floor", that of as many real drawings of the same captions;
        "images_per_second", and "evaluations", the network evaluations that one image took.
    """
    pipeline = EmbeddedPipeline(lesson=lesson, split=split)
    captions = pipeline.random_prompts(prompts, seed)
    pictures, timed = drawn_and_timed(denoiser, pipeline, sampling, captions, seed=seed, batch=batch)
    return pipeline.judged(pictures, captions) | {
        "images_per_second": timed.images_per_second,
        "evaluations": timed.evaluations,
    }
