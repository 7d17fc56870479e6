"""Student and teacher side by side: the same prompts, the same starting noise, at several numbers of steps.

Legend: N images, h w height and width of pictures.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from nas.diffusion import Denoiser
from nas.errors import UsageError
from nas.judge.pipelines import Pipeline
from nas.judge.scoring import BATCH, SEED, drawn_and_timed
from nas.paths import atomic_write
from nas.students import Sampling, TrainedStudent, takes_guidance

Report = Callable[[str, int, int, str], None]  # stage, done, total, note

_GRID_COLUMNS = 8
_SMALL = 128  # pictures narrower than this are enlarged, for eyes


class Metric(Protocol):
    """A score of pictures by some other network."""

    @property
    def name(self) -> str:
        """What its number is called."""
        ...

    @property
    def compares(self) -> bool:
        """Whether it looks at other pictures too."""
        ...

    def score(self, pictures: Tensor, texts: Sequence[str], against: Tensor | None) -> float:
        """The number of pictures [N, 3, h, w] in [-1, 1], one per text.

        Args:
            pictures: what is judged.
            texts: their prompts.
            against: real pictures, or the teacher's where there are none.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network at one number of steps.

    Attributes:
        who: "student", "teacher" or "real".
        steps: denoiser calls per image, 0 of real pictures.
        scores: by name; "teacher_psnr_db" is that of its pictures to the teacher's from the same noise.
        images_per_second: warm, at `batch` images at once; NaN of real pictures.
        batch: of that timing.
        evaluations: network evaluations per image; with guidance each step is two.
    """

    who: str
    steps: int
    scores: dict[str, float]
    images_per_second: float = math.nan
    batch: int = 0
    evaluations: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What was compared, and how it came out.

    Attributes:
        rows: student by rising steps, teacher likewise, real pictures where there are any.
        prompts: the texts.
        seed: of the noise, and of the prompts where they are random.
        teacher_guidance: with which the teacher drew.
        against: what comparing metrics compared with: "given pictures", "real drawings" or "the teacher".
        pictures: of each row, the first few [n, 3, h, w] in [-1, 1].
    """

    rows: tuple[Row, ...]
    prompts: tuple[str, ...]
    seed: int
    teacher_guidance: float
    against: str
    pictures: dict[str, Tensor] = field(repr=False)


def compare(
    student: TrainedStudent,
    pipeline: Pipeline,
    prompts: Sequence[Any],
    *,
    steps: Sequence[int] = (),
    teacher_steps: Sequence[int] = (20,),
    teacher_guidance: float | None = None,
    metrics: Sequence[Metric] = (),
    against: Tensor | None = None,
    seed: int = SEED,
    batch: int = BATCH,
    report: Report | None = None,
) -> Comparison:
    """Draws everything with everyone and judges it.

    Args:
        student: on the pipeline's device.
        pipeline: it was made for.
        prompts: of the pipeline, at least two.
        steps: of the student, each once; by default as many as it wants.
        teacher_steps: of the teacher; the last is whom `teacher_psnr_db` is to.
        teacher_guidance: of the teacher; by default the student's, or the pipeline's usual one where the student has
            learnt its guidance and is sampled without.
        metrics: what else judges the pictures.
        against: real pictures for the metrics; by default the pipeline's own, else the last teacher's.
        seed: of the noise.
        batch: images at once, also when timed.
        report: called with stage, done, total and a note.

    Raises:
        UsageError: fewer than two prompts, no teacher's steps, or steps that the student cannot be sampled in.
        NasError: a network draws what is not finite.
    """
    if len(prompts) < 2:
        raise UsageError(f"a comparison needs at least 2 prompts, got {len(prompts)}")
    if not teacher_steps:
        raise UsageError("a comparison needs the teacher at some number of steps")
    tell = report or (lambda stage, done, total, note: None)
    wanted, own = student.sampling, cast(Denoiser, student.denoiser)
    if teacher_guidance is None:
        learnt = bool(wanted.times) and not takes_guidance(own)
        teacher_guidance = pipeline.guidance if learnt else wanted.guidance
    euler = Sampling(guidance=teacher_guidance)
    asked: list[tuple[str, Denoiser, Sampling]] = [
        ("student", own, wanted.at(count)) for count in dict.fromkeys(steps or (wanted.calls,))
    ]
    asked += [("teacher", pipeline.teacher, euler.at(count)) for count in dict.fromkeys(teacher_steps)]
    found: list[tuple[str, int, Tensor, Any]] = []
    for who, denoiser, sampling in asked:
        stage = f"{who}, {sampling.calls} step{'s' if sampling.calls > 1 else ''}"
        tell(stage, 0, len(prompts), "")
        pictures, timed = drawn_and_timed(
            denoiser,
            pipeline,
            sampling,
            prompts,
            seed=seed,
            batch=batch,
            on_progress=functools.partial(_drawing, tell, stage),
        )
        found.append((who, sampling.calls, pictures, timed))
    teachers = found[-1][2]
    real = pipeline.real(prompts, seed)
    if real is not None:
        found.append(("real", 0, real, None))
    texts = [str(getattr(prompt, "text", prompt)) for prompt in prompts]
    reference = against if against is not None else real if real is not None else teachers
    rows = []
    for number, (who, count, pictures, timed) in enumerate(found):
        tell("judge", number, len(found), who)
        scores = pipeline.judged(pictures, prompts)
        scores |= {
            each.name: each.score(pictures, texts, reference)
            for each in metrics
            if not each.compares or pictures is not reference
        }
        if timed is None:
            rows.append(Row(who=who, steps=0, scores=scores))
            continue
        if pictures is not teachers:
            scores["teacher_psnr_db"] = psnr_db(pictures, teachers)
        rows.append(
            Row(
                who=who,
                steps=count,
                scores=scores,
                images_per_second=timed.images_per_second,
                batch=timed.batch,
                evaluations=timed.evaluations,
            )
        )
    tell("judge", len(found), len(found), "")
    shown = {f"{who} {count}": pictures[:_GRID_COLUMNS] for who, count, pictures, _ in found}
    compared = "given pictures" if against is not None else "the teacher" if real is None else "real drawings"
    return Comparison(
        rows=tuple(rows),
        prompts=tuple(texts),
        seed=seed,
        teacher_guidance=teacher_guidance,
        against=compared,
        pictures=shown,
    )


def _drawing(tell: Report, stage: str, done: int, total: int) -> None:
    tell(stage, done, total, "")


def psnr_db(pictures: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures [N, 3, h, w] in [-1, 1] to others, over all of them; inf where equal."""
    error = float((pictures.clamp(-1, 1) - others.clamp(-1, 1)).double().square().mean())
    return math.inf if error == 0 else 10 * math.log10(4 / error)


def grid(pictures: Tensor, columns: int = _GRID_COLUMNS) -> Tensor:
    """Pictures [N, 3, h, w] in [-1, 1] side by side with a white line between, uint8 [rows, columns, 3].

    Small ones are enlarged by a whole factor.
    """
    pixels = ((pictures.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    count, _, height, width = pixels.shape
    factor = max(1, _SMALL // max(width, 1))
    pixels = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    height, width = height * factor, width * factor
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = torch.full((rows * (height + factor) - factor, columns * (width + factor) - factor, 3), 255)
    canvas = canvas.to(torch.uint8)
    for index, picture in enumerate(pixels.permute(0, 2, 3, 1)):
        top, left = index // columns * (height + factor), index % columns * (width + factor)
        canvas[top : top + height, left : left + width] = picture
    return canvas


def write_png(path: Path, pixels: Tensor) -> Path:
    """Writes uint8 [H, W, 3] as a PNG, whole or not at all."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.numpy())).save(buffer, format="PNG")
    return atomic_write(path, buffer.getvalue())
