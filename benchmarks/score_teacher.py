"""How well the shipped teacher draws, on more prompts than its training record has, at several strengths of guidance.

    python benchmarks/score_teacher.py [--prompts 2048] [--guidance 2 3]

Captions and starting noise come from one seed that training never used. Writes reports/teacher/scores.csv; prints the
shares of held-out captions that are drawn all-correct last.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path

import torch

from nas.diffusion import sample
from nas.paths import atomic_write
from nas.tasks.shapes import Task
from nas.teachers import EmbeddedTeacher, load_teacher

SEED = 4242
BATCH = 128
OUT = Path("reports/teacher/scores.csv")


@torch.no_grad()
def score(teacher: EmbeddedTeacher, prompts: int, guidance: float) -> dict[str, float]:
    """The checker's means over random held-out captions (Euler, 20 steps)."""
    task, generator = Task(), torch.Generator().manual_seed(SEED)
    captions, images = [], []
    for _ in range(0, prompts, BATCH):
        drawn = task.sample(BATCH, "held-out", generator)
        text = teacher.encode(task.tokens(drawn))
        shape = task.image_shape
        images.append(sample(teacher, text, teacher.null_text(), shape=shape, generator=generator, guidance=guidance))
        captions += drawn
    return {"prompts": len(captions), "guidance": guidance, **task.check(torch.cat(images), captions).means()}


def main() -> None:
    """Scores each guidance and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0, 3.0])
    options = parser.parse_args()
    teacher = load_teacher("embedded")
    assert isinstance(teacher, EmbeddedTeacher)
    rows = [score(teacher, options.prompts, guidance) for guidance in options.guidance]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(OUT, text.getvalue())
    for row in rows:
        print(f"guidance {row['guidance']:g}: {row['correct']:.1%} of {row['prompts']} held-out captions all-correct")


if __name__ == "__main__":
    main()
