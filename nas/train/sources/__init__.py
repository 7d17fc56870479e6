"""Where a run's teachers and examples come from: drawn by the embedded task, or read from a folder of latents.

`open_source` chooses by what the command names; decoders have a source of their own (`nas.train.decoding`).
"""

from __future__ import annotations

from pathlib import Path

import torch

from nas import registry
from nas.errors import NasError, UsageError
from nas.teachers import EmbeddedTeacher, load_teacher
from nas.train.recipe import Recipe
from nas.train.sources.drawn import GRID_IMAGES, Drawn
from nas.train.sources.source import Source, Subject
from nas.train.sources.stored import Stored

__all__ = ["GRID_IMAGES", "Drawn", "Source", "Stored", "Subject", "open_source"]

EMBEDDED_TASK = "shapes"
_LATENTS = "latents"  # the plug-in of nas/tasks/ that draws nothing, but reads folders
_MAKE = "make some with nas cache, and give it by --data"


def open_source(recipe: Recipe, subject: Subject, device: torch.device) -> Source:
    """The source that a run's teacher and data name.

    Raises:
        UsageError: no data where some are needed, or neither a task nor a folder.
        NasError: the teacher or the data cannot be read, or do not go together.
    """
    drawn = tuple(name for name in registry.plugins("nas.tasks") if name != _LATENTS)
    data = subject.data
    if data is not None and data not in drawn and not Path(data).is_dir():
        raise UsageError(f"no data at {data!r}: it is neither a folder nor a task that is drawn", hint=_MAKE)
    teacher = load_teacher(subject.teacher)
    if data is None and not isinstance(teacher, EmbeddedTeacher):
        raise UsageError(f"the teacher {subject.teacher} needs data of its own", hint=_MAKE)
    if data is None or data in drawn:
        task = data or EMBEDDED_TASK
        if not isinstance(teacher, EmbeddedTeacher):
            raise NasError(
                f"teacher {subject.teacher!r} cannot teach the task {task}: it has no text encoder for its captions",
                hint="use the teacher 'embedded', or a .safetensors file that benchmarks/train_teacher.py wrote",
            )
        return Drawn(teacher, subject.teacher, task, device)
    if isinstance(teacher, EmbeddedTeacher):
        raise NasError(
            f"teacher {subject.teacher!r} draws pictures of the task {EMBEDDED_TASK}, and {data} has latents",
            hint="leave --data out, or give a diffusers teacher",
        )
    return Stored(teacher.to(device), subject.teacher, data, recipe.sampling, device)
