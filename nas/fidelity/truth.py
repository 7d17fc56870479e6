"""What a candidate really comes to: a long training, and how well its samples follow their captions."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nas.batches import stream
from nas.bench import Bench, distilled, one_thread
from nas.diffusion import Denoiser, sample
from nas.space import Candidate

JUDGED = 3  # points of a curve on the held-out rows: a quarter, half and all of the steps
_PROMPTS_SEED = 30_011
# Settings that came after the first tables, and the value that those tables had without saying so.
_LATER = {"precision": "fp32", "data": None}


@dataclass(frozen=True, kw_only=True)
class Samples:
    """How samples are drawn for the checker.

    Attributes:
        prompts: held-out captions, always the same.
        steps: Euler steps.
        guidance: classifier-free.
    """

    prompts: int = 64
    steps: int = 8
    guidance: float = 2.0


def long_run(candidate: Candidate, bench: Bench, seed: int, samples: Samples) -> dict[str, Any]:
    """One long training of a candidate's small copy, in one thread.

    Returns:
        quality_db, text_db, loss (held-out), the checker's shares (count, colour, shape, relation, all in [0, 1]),
        curve (JSON of points [step, seconds, train_db, quality_db, text_db]), params of the small copy, and seconds.

    Raises:
        NasError: the candidate cannot be scaled down, or its training diverged.
    """
    began = time.process_time()
    with one_thread():
        fresh = bench.student(bench.spec(candidate), seed)
        points = _points(bench.settings.steps)
        trained, found, curve = distilled(fresh, bench, judged_at=points)
        shares = checked(trained, bench, samples)
    way = [[p.step, round(p.seconds, 1), *(_short(v) for v in (p.train_db, p.quality_db, p.text_db))] for p in curve]
    return {
        "quality_db": round(found.quality_db, 4),
        "text_db": round(found.text_db, 4),
        "loss": round(found.loss, 6),
        **{name: round(value, 4) for name, value in shares.items()},
        "curve": json.dumps(way),
        "small_params": sum(each.numel() for each in trained.parameters()),
        "cpu_s": round(time.process_time() - began, 1),
    }


def checked(denoiser: Denoiser, bench: Bench, samples: Samples) -> dict[str, float]:
    """The checker's shares of samples of held-out captions: count, colour, shape, relation, all."""
    lesson = bench.lesson
    captions = lesson.task.sample(samples.prompts, "held-out", stream(_PROMPTS_SEED))
    images = sample(
        denoiser,
        lesson.text(captions),
        lesson.teacher.null_text(),
        shape=lesson.task.image_shape,
        generator=stream(_PROMPTS_SEED, 1),
        steps=samples.steps,
        guidance=samples.guidance,
    )
    right = lesson.task.check(images.clamp(-1.5, 1.5), captions)
    means = right.means()
    shares = {name: float(means[name]) for name in ("count", "colour", "shape", "relation")}
    return {**shares, "all": float(right.correct.mean())}


def settings_key(bench: Bench, samples: Samples | None = None) -> str:
    """What a row of a table belongs to: everything but the candidate and the seed."""
    settings = asdict(bench.settings)
    for name, neutral in _LATER.items():
        if settings[name] == neutral:
            del settings[name]
    return json.dumps([bench.digest, settings, None if samples is None else asdict(samples)], sort_keys=True)


def _points(steps: int) -> tuple[int, ...]:
    doubled: Sequence[int] = [steps >> power for power in range(JUDGED)]
    return tuple(sorted({step for step in doubled if step >= 10}))


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
