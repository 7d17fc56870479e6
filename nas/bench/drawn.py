"""The bench of drawn images: small copies of candidates and the embedded teacher's answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from nas import teachers
from nas.bench.held import Fidelity, fidelity_of
from nas.bench.settings import ProxySettings
from nas.bench.small import embedded_lesson, small_copy, student, teacher_hash
from nas.diffusion import FlowDenoiser
from nas.network import NetworkSpec
from nas.space import Candidate
from nas.targets import Cached, Lesson, Rows, cached_targets


@dataclass(frozen=True)
class Bench:
    """A teacher and settings, with all that a proxy needs of them; `nas.bench.bench_of` makes the one that fits.

    Attributes:
        teacher: as for `nas.teachers.load_teacher`.
        settings: of the proxy.
        device: where students and teacher run and batches go, as torch names it. It decides the speed alone: rows are
            drawn and students are initialised on the CPU. To try several candidates at once on one GPU, several
            worker processes take the same device; each has its own context (some 0.5 GB), and NVIDIA's MPS daemon lets
            their kernels run side by side rather than by turns.

    Raises:
        NasError: on first use: no such teacher, or one that is not of drawn images.
    """

    teacher: str
    settings: ProxySettings
    device: str = "cpu"

    def __reduce__(self) -> tuple[type[Bench], tuple[str, ProxySettings, str]]:
        """Without what is loaded: a worker loads its own."""
        return type(self), (self.teacher, self.settings, self.device)

    @property
    def digest(self) -> str:
        """Of the teacher's file and the task: what any cache here belongs to."""
        return f"{teacher_hash(self.teacher)}/{self.settings.task}"

    @property
    def lesson(self) -> Lesson:
        """The teacher with the task."""
        return embedded_lesson(self.teacher, self.settings.task, self.device)[1]

    @property
    def embedded(self) -> teachers.EmbeddedTeacher:
        """The teacher, on the device."""
        return embedded_lesson(self.teacher, self.settings.task, self.device)[0]

    @property
    def asked(self) -> nn.Module | None:
        """The teacher where a step must ask it; None, since the rows bring its answers."""
        return None

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
        """Training batches on the device, equal for every candidate."""
        null_every = 0 if self.settings.text_weight > 0 else self.settings.null_every
        device = torch.device(self.device)
        return Cached(rows=self.rows[0], size=self.settings.batch, null_every=null_every, device=device)

    def spec(self, candidate: Candidate) -> NetworkSpec:
        """The candidate's small copy.

        Raises:
            NasError: the candidate cannot be scaled down.
        """
        return small_copy(candidate, self.embedded, self.settings)

    def student(self, spec: NetworkSpec, seed: int) -> FlowDenoiser:
        """A small copy with its own random weights, behind the teacher's preconditioner, on the device."""
        return student(spec, self.embedded, self.settings.patch, seed).to(self.device)

    def judge(self, denoiser: Any) -> Fidelity:
        """How closely a student follows the teacher on the held-out rows."""
        return fidelity_of(denoiser, self.held, device=torch.device(self.device))
