"""What a run asks of whoever brings teachers and examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from nas.batches import Batches
from nas.build import Network
from nas.network import NetworkSpec
from nas.space import Candidate
from nas.students import Sampling
from nas.times import Times
from nas.train.recipe import Stage, StudentSettings


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a recipe is applied to.

    Attributes:
        candidate: the student's structure; None where the recipe takes the teacher's own.
        teacher: as for `nas.teachers.load_teacher`; of a decoder's recipe, as for `nas.teachers.decoders.load_decoder`.
        data: the name of a drawn task, or a folder that nas cache made; None takes the embedded task for an embedded
            teacher.
    """

    candidate: Candidate | None
    teacher: str
    data: str | None = None


class Source(Protocol):
    """Teachers and examples of one run."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the examples, as plain data; a trained network's file says it too."""
        ...

    def teacher(self, name: str) -> nn.Module:
        """A teacher on the device, checked against the data and the run's first teacher.

        Raises:
            NasError: it cannot teach this.
        """
        ...

    def network(self) -> Network:
        """The first teacher's own network with its weights.

        Raises:
            NasError: it is of a class that this project does not describe.
        """
        ...

    def spec(self, candidate: Candidate, settings: StudentSettings) -> NetworkSpec:
        """A candidate's network at the size that is trained here.

        Raises:
            NasError: it does not fit the data.
        """
        ...

    def denoiser(self, network: Network, settings: StudentSettings) -> nn.Module:
        """A student's network as the objectives ask it, on the device."""
        ...

    def batches(self, stage: Stage, teacher: nn.Module, seed: int) -> Batches:
        """A stage's examples, for that teacher."""
        ...

    def statement(self, stage: Stage, teacher: nn.Module) -> str:
        """A stage's examples in words."""
        ...

    def grid(self, denoiser: nn.Module, sampling: Sampling) -> Tensor | None:
        """Samples side by side as uint8 [rows, columns, 3]; None where nothing here can show them."""
        ...


def times_of(stage: Stage, teacher: Any) -> Times:
    """The noise levels of a stage's examples."""
    return Times(kind=stage.times, out_of_range=stage.out_of_range, schedule=teacher.schedule)
