"""What a run would take: parameters, memory and time, from a few real steps that leave nothing behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nas.build import build
from nas.distill.run import STUDENT, Run, start
from nas.distill.turns import line, step
from nas.train.accelerated import AccelerateEngine
from nas.train.recipe import Recipe
from nas.train.run import Course, Machine, Report, course, prepared
from nas.train.sources import Subject
from nas.train.starting import first_network

_STEPS, _SECONDS = 10, 10.0  # of a stage's probe, whichever is over first; a warm-up step comes before
_WEIGHT, _ADAM = 4, 8  # bytes per parameter: float32; AdamW's two averages


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process, estimated.

    With W the parameters of the networks that learn (student, projections, partners with a learning rate), N those of
    them that have gradients, E the parameters of the average and of partners that do not learn, T the teacher's, and A
    what autograd keeps of the activations of one piece of a batch (counted in a real step: every tensor saved for the
    gradients once, weights left out):

        weights 4 W + gradients 4 N + AdamW 8 N + averages 4 E + teacher 4 T + activations A

    W, N and E are divided by the processes where networks are sharded. Not counted: what the libraries need for
    themselves, the workspace of kernels, the fragments of the allocator, and copies in lower precision that autocast
    makes.

    Attributes:
        weights, gradients, optimiser, averages, teacher, activations: in bytes.
        measured: the largest that the device's allocator held in the probe; None on a CPU.
    """

    weights: int
    gradients: int
    optimiser: int
    averages: int
    teacher: int
    activations: int
    measured: int | None

    @property
    def total(self) -> int:
        """Their sum."""
        return self.weights + self.gradients + self.optimiser + self.averages + self.teacher + self.activations


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one stage would take.

    Attributes:
        name: of the stage.
        steps: in all.
        params: of the student's network.
        teacher_params: of its teacher.
        data: its examples in words.
        compiled: whether its networks are compiled.
        memory: per process.
        steps_per_second: in the probe, after a warm-up step.
        loss: of the probe's last student turn; None if the student rested in all of them.
    """

    name: str
    steps: int
    params: int
    teacher_params: int
    data: str
    compiled: bool
    memory: Memory
    steps_per_second: float
    loss: float | None

    @property
    def seconds(self) -> float:
        """Of the whole stage at that speed."""
        return self.steps / self.steps_per_second


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """What a run would take.

    Attributes:
        recipe: resolved.
        inherited: share of the first student's parameters that are the teacher's; None where the recipe inherits none.
        stages: in order.
    """

    recipe: Recipe
    inherited: float | None
    stages: tuple[Forecast, ...]

    @property
    def seconds(self) -> float:
        """Of training, all stages."""
        return sum(stage.seconds for stage in self.stages)


def dry_run(
    recipe: Recipe,
    subject: Subject,
    *,
    seed: int = 0,
    machine: Machine | None = None,
    report: Report | None = None,
) -> DryRun:
    """Puts the run together and takes a few steps of every stage, from new weights where a stage before would train.

    Raises:
        NasError: what `train_recipe` would refuse before its first step, or a loss that is not finite.
    """
    found = []
    cuda = list(range(torch.cuda.device_count())) if machine is not None and machine.device == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        run = course(recipe, subject, seed=seed, machine=machine)
        for number, stage in enumerate(recipe.stages):
            if report is not None:
                report("dry run", number, len(recipe.stages), stage.name)
            found.append(_forecast(run, number))
    inherited = None
    if recipe.student.inherit or recipe.student.from_teacher:
        told = first_network(recipe, run.planned, run.source, seed)[1]
        assert told is not None  # it inherits
        new = told.params("new")
        inherited = 1 - new / (told.params("copied") + told.params("sliced") + new)
    return DryRun(recipe=recipe, inherited=inherited, stages=tuple(found))


def _forecast(run: Course, number: int) -> Forecast:
    stage, spec = run.recipe.stages[number], run.planned.specs[number]
    teacher = run.source.teacher(run.teacher_name(number))
    student = run.source.denoiser(build(spec, seed=run.seed), run.recipe.student)
    data = run.source.batches(stage, teacher, run.stage_seed(number))
    engine = AccelerateEngine(run.accelerator, stage.train.precision)
    cuda = run.accelerator.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with prepared(run.machine, stage, student, teacher) as compiled:
        state = start(student, data, stage.objectives, replace(stage.train, seed=run.seed), teacher, engine)
        student.train()
        with _counted(state) as kept:
            records = [step(state)]
        began, taken = time.perf_counter(), 0
        while taken < _STEPS and time.perf_counter() - began < _SECONDS:
            records.append(step(state))
            taken += 1
        last = line(state, records)  # reads the losses, and so waits for the device
        seconds = time.perf_counter() - began
    return Forecast(
        name=stage.name,
        steps=stage.train.steps,
        params=_count(build(spec, "meta")),
        teacher_params=_count(teacher),
        data=run.source.statement(stage, teacher),
        compiled=compiled,
        memory=_memory(state, teacher, engine, kept.peak, torch.cuda.max_memory_allocated() if cuda else None),
        steps_per_second=taken / seconds,
        loss=None if last.loss != last.loss else last.loss,
    )


def _memory(run: Run, teacher: nn.Module, engine: AccelerateEngine, activations: int, measured: int | None) -> Memory:
    share = engine.world if engine.shards else 1
    players = [player.module for player in run.players.values()]
    weights = sum(map(_count, players)) // share
    learning = sum(p.numel() for module in players for p in module.parameters() if p.requires_grad) // share
    resting = [partner.module for name, partner in run.partners.items() if name not in run.players]
    still = (_count(run.average) + sum(_count(module) for module in resting)) // share
    return Memory(
        weights=_WEIGHT * weights,
        gradients=_WEIGHT * learning,
        optimiser=_ADAM * learning,
        averages=_WEIGHT * still,
        teacher=sum(tensor.numel() * tensor.element_size() for tensor in teacher.parameters()),
        activations=activations,
        measured=measured,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass
class _Kept:
    """Counts what autograd keeps: the largest sum between two backward passes."""

    weights: set[int]
    peak: int = 0
    now: dict[int, int] = field(default_factory=dict)
    released: bool = False

    def pack(self, tensor: Tensor) -> Any:
        if self.released:
            self.now, self.released = {}, False
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.now[storage.data_ptr()] = storage.nbytes()
            self.peak = max(self.peak, sum(self.now.values()))
        return tensor

    def unpack(self, tensor: Any) -> Any:
        self.released = True
        return tensor


@contextmanager
def _counted(run: Run) -> Iterator[_Kept]:
    """Counts the activations that are kept for the gradients of one step."""
    modules = [player.module for player in run.players.values()] + ([run.teacher] if run.teacher is not None else [])
    weights = {
        parameter.untyped_storage().data_ptr()
        for module in [*modules, run.players[STUDENT].module]
        for parameter in module.parameters()
    }
    kept = _Kept(weights=weights)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        yield kept
