"""One optimisation step here and in a plain training loop: python benchmarks/train_step.py [--steps 30].

The same student (benchmarks/embedded_student.py), the same batch size, AdamW, clipping and averaged weights. Here: the
loop of nas.distill with the teacher's answers from the cache. Plain: what a diffusers training script does: draw the
images' noise and times, ask the teacher, the loss, backward, clip, step, and an `EMAModel` step; the teacher is asked
anew at every step. The two take turns, `--rounds` times, in one process and one thread. With --device cuda both run
there.

Prints how many times as fast a step here is (median of the rounds' ratios) last, and writes
reports/benchmarks/train_step.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import embedded_student as es
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional

from nas.bench import embedded_lesson, teacher_hash
from nas.diffusion import noised, sample_times
from nas.distill import TrainSettings, train
from nas.objectives import objective
from nas.paths import atomic_write
from nas.provenance import provenance
from nas.targets import Cached, Lesson, TargetSettings, cached_targets


def here(lesson: Lesson, settings: TrainSettings, rows: Any) -> Callable[[], None]:
    """Our loop on cached answers; each call trains a fresh student for all the steps."""
    data = Cached(rows=rows, size=settings.batch)

    def run() -> None:
        train(es.student(lesson, 0), data, (objective("output"),), settings, report_every=settings.steps)

    return run


def plain(lesson: Lesson, settings: TrainSettings, images: Tensor, captions: list[Any]) -> Callable[[], None]:
    """A plain loop: images and captions at hand, the teacher asked at every step."""
    teacher: Any = lesson.teacher

    def run() -> None:
        student = es.student(lesson, 0).train()
        optimiser = torch.optim.AdamW(student.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=0.0)
        average = EMAModel(student.parameters(), decay=0.999)
        generator = torch.Generator().manual_seed(0)
        for step in range(settings.steps):
            first = step * settings.batch % (len(images) - settings.batch + 1)
            clean = images[first : first + settings.batch]
            text = lesson.text(captions[first : first + settings.batch])
            noise = torch.randn(clean.shape, generator=generator)
            t = sample_times(settings.batch, generator)
            x = noised(clean, noise, t)
            with torch.no_grad():
                wanted = teacher.velocity(x, t, text)
            loss = functional.mse_loss(student.velocity(x, t, text), wanted)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), settings.clip)
            optimiser.step()
            average.step(student.parameters())
            float(loss.detach())

    return run


def seconds(run: Callable[[], None]) -> float:
    """Process CPU time of a run."""
    began = time.process_time()
    run()
    return time.process_time() - began


def main() -> None:
    """Lets both take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("reports/benchmarks/train_step.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    _, lesson = embedded_lesson("embedded", "shapes")
    settings = TrainSettings(steps=options.steps, batch=options.batch, lr=1e-3)
    target = TargetSettings(rows=options.steps * options.batch, held_rows=64)
    rows, _ = cached_targets(f"{teacher_hash('embedded')}/shapes", lambda: lesson, target)
    generator = torch.Generator().manual_seed(1)
    captions = lesson.task.sample(options.steps * options.batch, "train", generator)
    images = lesson.task.render(captions, generator)
    ours, theirs = here(lesson, settings, rows), plain(lesson, settings, images, captions)
    ours(), theirs()
    rounds = [(seconds(ours), seconds(theirs)) for _ in range(options.rounds)]
    ratios = [their / our for our, their in rounds]
    found = {
        "command": f"python benchmarks/train_step.py --steps {options.steps} --batch {options.batch}",
        "clock": "process CPU time, one thread, the two in turns; the caching of the answers is not in it",
        "step_s": statistics.median(our for our, _ in rounds) / options.steps,
        "plain_step_s": statistics.median(their for _, their in rounds) / options.steps,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "provenance": provenance(seed=0),
    }
    atomic_write(options.out, json.dumps(found, indent=1) + "\n")
    print(f"{found['ratio']:.2f} times as fast ({found['ratio_low']:.2f} to {found['ratio_high']:.2f})")


if __name__ == "__main__":
    main()
