"""A teacher's answers about cached latents, computed once so that a training need not ask it.

Each row gets one time and one noise of its own, at which the teacher is asked with the row's caption and with none.
Legend: R rows, C channels, H W height and width of the latent.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nas.batches import stream
from nas.cache.ledger import Ledger, claimed
from nas.diffusion import noised
from nas.errors import NasError
from nas.paths import atomic_write
from nas.tasks.latents.manifest import check_fit
from nas.tasks.latents.shards import ShardWriter
from nas.tasks.latents.store import TARGETS_FORMAT, Store, Targets, targets_file
from nas.teachers import Teacher, load_teacher, teacher_digest
from nas.times import Kind, OutOfRange, Times

_NOISE, _TIMES = 7_201, 7_202  # first number of each random stream


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """How a teacher's answers are cached.

    Attributes:
        teacher: as for `nas.teachers.load_teacher`.
        times: at which noise levels it is asked.
        out_of_range: what is done about those that its schedule does not know.
        seed: of times and noise.
        batch: rows asked at once, each twice.
        device: where the teacher runs.
        dtype: of its weights.
    """

    teacher: str
    times: Kind = "uniform"
    out_of_range: OutOfRange = "clamp"
    seed: int = 0
    batch: int = 8
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


def cache_targets(
    folder: Path, settings: TargetSettings, report: Callable[[str, int, int, str], None] | None = None
) -> Targets:
    """Writes a teacher's answers beside the data they are about; unfinished ones are taken up.

    Args:
        folder: finished data of `nas.cache.cache_images`.
        settings: whom to ask, and where.
        report: called with stage, rows done, rows in all and a note.

    Raises:
        NasError: data that the teacher cannot be asked about, prompts only, answers that are not finite, answers of
            other settings, or a disk that is full.
    """
    tell = report or (lambda stage, done, total, note: None)
    store, digest = Store.open(folder), teacher_digest(settings.teacher)
    path = targets_file(folder, digest)
    identity = {
        "data": store.digest,
        "teacher": digest,
        "times": settings.times,
        "out_of_range": settings.out_of_range,
        "seed": settings.seed,
        "precision": str(settings.dtype).removeprefix("torch."),
    }
    with claimed(folder):
        ledger = Ledger(folder, path.stem, identity)
        if path.is_file() and len(ledger.shards()) == len(store.manifest.shards):
            return Targets.read(path, store.digest, digest)
        tell("load", 0, 1, settings.teacher)
        teacher = load_teacher(settings.teacher, device=settings.device, dtype=settings.dtype)
        check_fit(store.manifest, teacher, f"the teacher {settings.teacher}")
        store.latents([0])  # says that there are prompts only
        times = Times(kind=settings.times, out_of_range=settings.out_of_range, schedule=teacher.schedule)
        total, first = len(store), 0
        for number, shard in enumerate(store.manifest.shards):
            rows = range(first, first + shard.rows)

            def write(writer: ShardWriter, rows: range = rows) -> list[str]:
                return _ask(
                    writer, store, teacher, times, settings, rows, lambda done: tell("targets", done, total, "")
                )

            tell("targets", first, total, "")
            ledger.shard(number, write)
            first += shard.rows
        about = {
            "format": TARGETS_FORMAT,
            "data": store.digest,
            "teacher": settings.teacher,
            "teacher_digest": digest,
            "times": {"kind": settings.times, "statement": times.statement()},
            "shards": [asdict(shard) for shard in ledger.shards()],
        }
        atomic_write(path, json.dumps(about, indent=1) + "\n")
        tell("targets", total, total, "")
    return Targets.read(path, store.digest, digest)


@torch.no_grad()
def _ask(
    writer: ShardWriter,
    store: Store,
    teacher: Teacher,
    times: Times,
    settings: TargetSettings,
    rows: range,
    tick: Callable[[int], None],
) -> list[str]:
    """Writes the answers about some rows; noise and times are a function of the row alone."""
    device = torch.device(settings.device)
    null = store.null(device)
    t_all = times.draw(len(rows), stream(_TIMES, settings.seed, rows.start + 1))
    for start in range(0, len(rows), settings.batch):
        own = rows[start : start + settings.batch]
        clean, text = store.latents(own, device), store.conditions(own, device)
        drawn = [torch.randn(clean.shape[1:], generator=stream(_NOISE, settings.seed, row + 1)) for row in own]
        # Rounded first: the teacher must answer what the student will be asked.
        noise = torch.stack(drawn).half().float().to(device)
        t = t_all[start : start + len(own)].to(device)
        x = noised(clean, noise, t)
        velocity = teacher.velocity(x, t, text)
        null_velocity = teacher.velocity(x, t, null.like(text))
        for i, row in enumerate(own):
            fields = {
                "noise": _half(noise[i]),
                "t": t[i].cpu().numpy(),
                "velocity": _half(velocity[i], row),
                "null_velocity": _half(null_velocity[i], row),
            }
            writer.add(f"{row:09d}", fields)
        tick(own[-1] + 1)
    return []


def _half(values: Tensor, row: int = 0) -> NDArray[np.float16]:
    half = values.detach().to("cpu", torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise NasError(
            f"the teacher's answer about row {row} is not finite",
            hint="ask it in fp32, or keep to its own noise levels",
        )
    return half.numpy()
