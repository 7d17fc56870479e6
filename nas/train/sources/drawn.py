"""The embedded task: every example is drawn, and the teacher's text encoder reads its caption."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nas import registry
from nas.batches import Batches
from nas.bench import ProxySettings, small_copy
from nas.build import Network
from nas.diffusion import FlowDenoiser
from nas.errors import NasError
from nas.features import body
from nas.judge import EmbeddedPipeline, drawn, grid
from nas.judge.scoring import SEED
from nas.network import NetworkSpec
from nas.space import Candidate
from nas.students import Sampling
from nas.targets import Fresh, Lesson, Prompted
from nas.teachers import EmbeddedTeacher, load_teacher
from nas.train.recipe import Stage, StudentSettings
from nas.train.sources.source import times_of

GRID_IMAGES = 32


class Drawn:
    """See `nas.train.sources.source.Source`.

    Args:
        teacher: the first.
        name: its, as for `nas.teachers.load_teacher`.
        task: the plug-in of nas/tasks/.
        device: to train on.
    """

    def __init__(self, teacher: EmbeddedTeacher, name: str, task: str, device: torch.device) -> None:
        self.first = teacher.to(device)
        self.name = name
        self.task_name = task
        self.task = registry.load("nas.tasks", task).Task()
        self.device = device

    @property
    def identity(self) -> dict[str, Any]:
        """The task's name: what it draws is decided by the seed."""
        return {"task": self.task_name}

    def teacher(self, name: str) -> nn.Module:
        """A teacher of drawings.

        Raises:
            NasError: it reads captions otherwise than the first one, whose text the student is given.
        """
        if name == self.name:
            return self.first
        loaded = load_teacher(name)
        if not isinstance(loaded, EmbeddedTeacher):
            raise NasError(f"teacher {name!r} cannot teach the task {self.task_name}: it has no text encoder for it")
        loaded.to(self.device)
        for part in ("encoder", "layout"):
            ours, theirs = getattr(self.first, part).state_dict(), getattr(loaded, part).state_dict()
            if ours.keys() != theirs.keys() or any(not torch.equal(ours[key], theirs[key]) for key in ours):
                raise NasError(
                    f"teacher {name!r} reads captions with another text {part} than the first teacher, whose text the"
                    " student is given",
                    hint="successive teachers must share it: train the denoiser alone further",
                )
        return loaded

    def network(self) -> Network:
        """The teacher's UNet."""
        network = body(self.first)
        assert isinstance(network, Network)  # an embedded teacher is made of our blocks
        return network

    def spec(self, candidate: Candidate, settings: StudentSettings) -> NetworkSpec:
        """The candidate by the proxy's rule of scale."""
        scale = ProxySettings(
            task=self.task_name,
            width_divisor=settings.width_divisor,
            norm_groups=settings.norm_groups,
            patch=self.first.settings.patch,
        )
        return small_copy(candidate, self.first, scale)

    def denoiser(self, network: Network, settings: StudentSettings) -> nn.Module:
        """The network behind the teacher's preconditioner."""
        return FlowDenoiser(network, self.first.preconditioner, patch=self.first.settings.patch).to(self.device)

    def lesson(self, teacher: nn.Module | None = None) -> Lesson:
        """A teacher with what it teaches; the first by default."""
        asked: Any = self.first if teacher is None else teacher
        return Lesson(teacher=asked, task=self.task)

    def batches(self, stage: Stage, teacher: nn.Module, seed: int) -> Batches:
        """Drawings with captions, or captions alone."""
        lesson, size, every = self.lesson(teacher), stage.train.batch, stage.null_every
        if stage.data == "prompts":
            return Prompted(lesson=lesson, size=size, seed=seed, null_every=every)
        times = times_of(stage, teacher)
        return Fresh(lesson=lesson, size=size, seed=seed, null_every=every, device=self.device, times=times)

    def statement(self, stage: Stage, teacher: nn.Module) -> str:
        """What is drawn, and at which times."""
        what = f"{stage.data} of the task {self.task_name}, drawn at every step"
        return what if stage.data == "prompts" else f"{what}; {times_of(stage, teacher).statement()}"

    @property
    def pipeline(self) -> EmbeddedPipeline:
        """Captions of the held-out set, and pictures as they are drawn."""
        return EmbeddedPipeline(lesson=self.lesson(), task_name=self.task_name)

    def grid(self, denoiser: nn.Module, sampling: Sampling) -> Tensor:
        """Images of held-out captions, always the same."""
        asked: Any = denoiser
        captions = self.pipeline.random_prompts(GRID_IMAGES, SEED)
        return grid(drawn(asked, self.pipeline, sampling, captions, seed=SEED))
