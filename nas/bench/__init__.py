"""The bench: small copies of candidates, the embedded teacher's answers about them, and how one is judged.

Every candidate sees the same teacher, rows, order, noise and preconditioning; only the network differs, and between
the seeds of one candidate only its initialisation. As in `nas train`, students are given the caption's tokens and the
layout that the teacher's text part makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from nas import teachers
from nas.bench.held import Fidelity, fidelity_of
from nas.bench.run import Curve, Point, Stop, Stopped, decibels, distilled
from nas.bench.settings import ProxySettings
from nas.bench.small import embedded_lesson, learning_rate, small_copy, student, teacher_hash
from nas.diffusion import FlowDenoiser
from nas.network import NetworkSpec
from nas.space import Candidate
from nas.targets import Cached, Lesson, Rows, cached_targets

__all__ = [
    "Bench",
    "Curve",
    "Fidelity",
    "Point",
    "ProxySettings",
    "Stop",
    "Stopped",
    "decibels",
    "distilled",
    "embedded_lesson",
    "fidelity_of",
    "learning_rate",
    "one_thread",
    "small_copy",
    "student",
    "teacher_hash",
]


@dataclass(frozen=True)
class Bench:
    """A teacher and settings, with all that a proxy needs of them.

    Attributes:
        teacher: as for `nas.teachers.load_teacher`.
        settings: of the proxy.

    Raises:
        NasError: on first use: no such teacher, or one that is not of drawn images.
    """

    teacher: str
    settings: ProxySettings

    def __reduce__(self) -> tuple[type[Bench], tuple[str, ProxySettings]]:
        """Without what is loaded: a worker loads its own."""
        return Bench, (self.teacher, self.settings)

    @property
    def digest(self) -> str:
        """Of the teacher's file and the task: what any cache here belongs to."""
        return f"{teacher_hash(self.teacher)}/{self.settings.task}"

    @cached_property
    def lesson(self) -> Lesson:
        """The teacher with the task."""
        return embedded_lesson(self.teacher, self.settings.task)[1]

    @property
    def embedded(self) -> teachers.EmbeddedTeacher:
        """The teacher."""
        return embedded_lesson(self.teacher, self.settings.task)[0]

    def prepare(self, on_progress: Callable[[int, int], None] | None = None) -> tuple[Rows, Rows]:
        """Training and held-out rows, computed unless they are cached."""
        found = cached_targets(self.digest, lambda: self.lesson, self.settings.targets, on_progress)
        train_rows, held = (replace(rows, complete=self.embedded.placed) for rows in found)
        return train_rows, held

    @cached_property
    def rows(self) -> tuple[Rows, Rows]:
        """Training rows and held-out rows."""
        return self.prepare()

    @property
    def held(self) -> Rows:
        """Rows that no student trains on."""
        return self.rows[1]

    @property
    def data(self) -> Cached:
        """Training batches, equal for every candidate."""
        null_every = 0 if self.settings.text_weight > 0 else self.settings.null_every
        return Cached(rows=self.rows[0], size=self.settings.batch, null_every=null_every)

    def spec(self, candidate: Candidate) -> NetworkSpec:
        """The candidate's small copy.

        Raises:
            NasError: the candidate cannot be scaled down.
        """
        return small_copy(candidate, self.embedded, self.settings)

    def student(self, spec: NetworkSpec, seed: int) -> FlowDenoiser:
        """A small copy with its own random weights, behind the teacher's preconditioner."""
        return student(spec, self.embedded, self.settings.patch, seed)

    def judge(self, denoiser: FlowDenoiser) -> Fidelity:
        """How closely a student follows the teacher on the held-out rows."""
        return fidelity_of(denoiser, self.held)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread per process: networks this small run no faster on two, and the pool has a process per core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
