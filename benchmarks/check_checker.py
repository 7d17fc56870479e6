"""Validates the checker of the task shapes and writes one row per condition.

    python benchmarks/check_checker.py --out reports/teacher/checker.csv

Each row: how many of the scenes the checker calls correct, and what it should say. Four relations are used, so that
every caption of the task is covered.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from scipy import ndimage
from torch import Tensor

from nas.tasks.shapes import Caption, Task
from nas.tasks.shapes.captions import COLOURS, RELATIONS, SHAPES

COLUMNS = ("condition", "images", "should_accept", "count", "colour", "shape", "relation", "correct")


def blurred(images: Tensor, sd: float) -> Tensor:
    """Gaussian blur of `sd` pixels."""
    return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, sd, sd)))


def degraded(images: Tensor, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """The same scenes, clean and worse and worse."""
    noise = torch.randn(images.shape, generator=generator)
    yield "clean", images
    for sd in (0.1, 0.2, 0.3, 0.4):
        yield f"noise sd {sd} (images in [-1, 1])", images + sd * noise
    for sd in (0.5, 0.8, 1.2, 1.6):
        yield f"Gaussian blur sd {sd} px", blurred(images, sd)
    yield "blur sd 0.8 px and noise sd 0.2", blurred(images, 0.8) + 0.2 * noise


def other(options: tuple[str, ...], *, than: str) -> str:
    """The next of `options` after `than`, cyclically."""
    return options[(options.index(than) + 1) % len(options)]


def recoloured(caption: Caption) -> Caption:
    """The first object in another colour (one that keeps the two objects different)."""
    colour = other(COLOURS, than=caption.first.colour)
    if caption.second and caption.second.colour == colour:
        colour = other(COLOURS, than=colour)
    return dataclasses.replace(caption, first=dataclasses.replace(caption.first, colour=colour))


def reshaped(caption: Caption) -> Caption:
    """The first object in another shape (one that keeps the two objects different)."""
    first = dataclasses.replace(caption.first, shape=other(SHAPES, than=caption.first.shape))
    if first == caption.second:
        first = dataclasses.replace(first, shape=other(SHAPES, than=first.shape))
    return dataclasses.replace(caption, first=first)


def reversed_order(caption: Caption) -> Caption:
    """The two objects exchanged, the relation kept."""
    assert caption.second is not None
    return Caption(first=caption.second, relation=caption.relation, second=caption.first)


def other_axis(caption: Caption) -> Caption:
    """The next relation in the list, which lies along the other axis."""
    return dataclasses.replace(caption, relation=other(RELATIONS, than=caption.relation))


def mirrored(caption: Caption) -> Caption:
    """The same scene said from the other object: must be accepted."""
    relation = RELATIONS[(RELATIONS.index(caption.relation) + 2) % 4]
    assert caption.second is not None
    return Caption(first=caption.second, relation=relation, second=caption.first)


CHANGES: tuple[tuple[str, Callable[[Caption], Caption]], ...] = (
    ("one colour changed", recoloured),
    ("one shape changed", reshaped),
    ("objects exchanged", reversed_order),
    ("relation along the other axis", other_axis),
    ("same scene said from the other object", mirrored),
)


def rows(count: int, seed: int) -> Iterator[tuple[object, ...]]:
    """One row per condition."""
    task, generator = Task(relations=4), torch.Generator().manual_seed(seed)
    captions = task.sample(count, "all", generator)
    images = task.render(captions, generator)
    for name, worse in degraded(images, generator):
        yield row(task, name, worse, captions, accept="yes")
    pool = task.captions("all")
    order = torch.randint(len(pool), (count,), generator=generator).tolist()
    pairs = [(i, pool[o]) for i, o in enumerate(order) if pool[o].reading_order != captions[i].reading_order]
    yield row(task, "random other caption", images[[i for i, _ in pairs]], [c for _, c in pairs], accept="no")
    two = [i for i, caption in enumerate(captions) if caption.second is not None]
    for name, change in CHANGES:
        accept = "yes" if change is mirrored else "no"
        yield row(task, name, images[two], [change(captions[i]) for i in two], accept=accept)


def row(task: Task, name: str, images: Tensor, captions: list[Caption], *, accept: str) -> tuple[object, ...]:
    """The checker's means for one condition."""
    means = task.check(images, captions).means()
    shares = [f"{means[key]:.4f}" for key in ("count", "colour", "shape", "relation", "correct")]
    return (name, len(captions), accept, *shares)


def main() -> None:
    """Writes the table and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reports/teacher/checker.csv"))
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start, made = time.process_time(), []
    for values in rows(options.count, options.seed):
        made.append(values)
        print(*values, sep=", ")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([COLUMNS, *made])
    total = sum(int(str(values[1])) for values in made)
    print(f"{total / (time.process_time() - start):.0f} images checked per CPU second (noise and blur included)")


if __name__ == "__main__":
    main()
