"""The one training loop: proxy runs of forty steps and full runs of thousands are the same code.

Everything random or scheduled is a function of the step, and a checkpoint holds the rest, so a run that was killed and
resumed ends in the same bits as one that was not. Legend: B batch, C channels, H W height and width, T text tokens,
D text width.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from nas.diffusion import FlowDenoiser
from nas.errors import NasError
from nas.objectives import Objective, Outputs, total
from nas.paths import atomic_write

_KEPT = 2  # checkpoints: the newest, and the one before it


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a student is trained; two runs of equal settings on equal data give equal weights.

    Attributes:
        steps: optimiser steps.
        batch: examples per step, for whoever makes the batches.
        lr: peak learning rate of AdamW.
        warmup: steps over which it rises linearly; at most a fifth of `steps` is used.
        decay_share: the last share of the steps, over which it falls linearly to 0.
        clip: largest norm of the gradient.
        betas: AdamW's.
        weight_decay: AdamW's.
        ema_gamma: exponent of the power-function average of the weights: its length is a fixed share of the run so
            far, so that short and long runs are averaged alike (Karras et al. 2024, EDM2, equation 123).
        precision: "fp32", or "bf16" for autocast of the network.
        seed: of anything random in the student's forward pass. It does not touch initialisation or data.
    """

    steps: int
    batch: int
    lr: float = 3e-3
    warmup: int = 20
    decay_share: float = 0.4
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    ema_gamma: float = 6.94
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise NasError(f"training needs steps >= 1 and batch >= 1, got steps={self.steps}, batch={self.batch}")

    def learning_rate(self, step: int) -> float:
        """The rate of the step that is `step`-th from 0: linear rise, constant, linear fall to 0."""
        warmup = max(1, min(self.warmup, self.steps // 5))
        decay = max(1, round(self.decay_share * self.steps))
        return self.lr * min(1.0, (step + 1) / warmup, (self.steps - step) / decay)

    def ema_weight(self, step: int) -> float:
        """How much of the old average is kept after that step; 0 at the first, so that there is no start bias."""
        return (1 - 1 / (step + 1)) ** (self.ema_gamma + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One step's examples and what the teacher says about them.

    Attributes:
        x: noised images x_t [B, C, H, W].
        t: times [B] in (0, 1).
        text: [B, T, D].
        null_text: [1, T, D], the text of no caption, where the teacher's answer without one is given.
        teacher: its outputs at x, t.
    """

    x: Tensor
    t: Tensor
    text: Tensor
    teacher: Outputs
    null_text: Tensor | None = None


class Batches(Protocol):
    """Training data as a function of the step, so that the position in it needs no saving."""

    def batch(self, step: int) -> Batch:
        """The examples of that step, the same at every call."""
        ...


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One line of a run's record: means since the line before.

    Attributes:
        step: steps done.
        steps: steps in all.
        lr: learning rate of the last of them.
        loss: mean weighted loss since the line before.
        terms: mean of each term of the objectives.
        seconds: training time so far, earlier runs of a resumed training included.
    """

    step: int
    steps: int
    lr: float
    loss: float
    terms: dict[str, float]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished run.

    Attributes:
        average: the student with its averaged weights: what is scored, sampled and exported.
        history: the run's record.
        resumed_from: the step a checkpoint was taken up at, None for a fresh start.
    """

    average: FlowDenoiser
    history: tuple[Progress, ...]
    resumed_from: int | None


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where and how often a run is saved.

    Attributes:
        folder: holds step-<n>.pt; the last two are kept.
        every: steps between checkpoints; the last step is always saved.
        resume: take up the newest one if there is one.
    """

    folder: Path
    every: int = 500
    resume: bool = True


@dataclass
class _Run:
    """A run's state between two steps: all that a checkpoint holds."""

    student: FlowDenoiser
    average: FlowDenoiser
    optimiser: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    history: list[Progress] = field(default_factory=list)
    random: Tensor | None = None


def train(
    student: FlowDenoiser,
    data: Batches,
    objectives: Sequence[Objective],
    settings: TrainSettings,
    *,
    checkpoints: Checkpoints | None = None,
    on_progress: Callable[[Sequence[Progress]], None] | None = None,
    report_every: int = 20,
) -> Trained:
    """Trains `student` in place and returns its averaged copy.

    Args:
        student: on the device to train on; its weights are the starting point.
        data: batches on that device.
        objectives: their weighted terms are summed.
        settings: the schedule.
        checkpoints: where to save and resume; None saves nothing.
        on_progress: called with the record so far at each new line of it.
        report_every: steps per line.

    Raises:
        NasError: a loss that is not finite, no objectives, or a checkpoint of other settings.
    """
    if not objectives:
        raise NasError("training needs at least one objective")
    run = _start(student, settings)
    resumed_from = None
    if checkpoints is not None and checkpoints.resume:
        resumed_from = _resume(run, settings, checkpoints.folder)
    pending: list[tuple[Tensor, dict[str, Tensor]]] = []
    began = time.perf_counter() - run.seconds
    cuda = [p.device for p in student.parameters() if p.device.type == "cuda"][:1]
    # The caller's own random state is left as it was.
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(settings.seed)
        if run.random is not None:
            torch.set_rng_state(run.random)
        student.train()
        while run.step < settings.steps:
            pending.append(_step(run, data.batch(run.step), tuple(objectives), settings))
            last = run.step == settings.steps
            save = checkpoints is not None and (last or run.step % checkpoints.every == 0)
            if last or save or run.step % report_every == 0:
                run.seconds = time.perf_counter() - began
                run.history.append(_line(run, pending, settings))
                pending.clear()
                if on_progress is not None:
                    on_progress(run.history)
            if save and checkpoints is not None:
                _save(run, settings, checkpoints.folder)
    run.average.eval()
    return Trained(average=run.average, history=tuple(run.history), resumed_from=resumed_from)


def predict(student: FlowDenoiser, batch: Batch, *, with_null: bool) -> Outputs:
    """The student's outputs on a batch; with `with_null` both texts go through it in one pass of 2 B."""
    if not with_null or batch.null_text is None:
        return Outputs(velocity=student.velocity(batch.x, batch.t, batch.text))
    text = torch.cat([batch.text, batch.null_text.expand_as(batch.text)])
    both = student.velocity(torch.cat([batch.x, batch.x]), torch.cat([batch.t, batch.t]), text)
    velocity, null_velocity = both.chunk(2)
    return Outputs(velocity=velocity, null_velocity=null_velocity)


def _start(student: FlowDenoiser, settings: TrainSettings) -> _Run:
    optimiser = torch.optim.AdamW(
        student.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )
    average = copy.deepcopy(student)
    average.requires_grad_(False)
    return _Run(student=student, average=average, optimiser=optimiser)


def _step(
    run: _Run, batch: Batch, objectives: tuple[Objective, ...], settings: TrainSettings
) -> tuple[Tensor, dict[str, Tensor]]:
    """One optimiser step; returns the loss and its terms without waiting for the device."""
    for group in run.optimiser.param_groups:
        group["lr"] = settings.learning_rate(run.step)
    with _autocast(settings, batch.x):
        outputs = predict(run.student, batch, with_null=any(o.needs_null for o in objectives))
    loss, terms = total(objectives, outputs, batch.teacher)
    run.optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(run.student.parameters(), settings.clip)
    run.optimiser.step()
    _average(run, settings.ema_weight(run.step))
    run.step += 1
    return loss.detach(), {name: term.detach() for name, term in terms.items()}


def _autocast(settings: TrainSettings, like: Tensor) -> AbstractContextManager[Any]:
    if settings.precision == "fp32":
        return nullcontext()
    return torch.autocast(like.device.type, dtype=torch.bfloat16)


@torch.no_grad()
def _average(run: _Run, kept: float) -> None:
    averaged: list[Tensor] = list(run.average.parameters())
    live: list[Tensor] = list(run.student.parameters())
    torch._foreach_lerp_(averaged, live, 1 - kept)
    for old, new in zip(run.average.buffers(), run.student.buffers(), strict=True):
        old.copy_(new)


def _line(run: _Run, pending: Sequence[tuple[Tensor, dict[str, Tensor]]], settings: TrainSettings) -> Progress:
    loss = float(torch.stack([loss for loss, _ in pending]).mean())
    if not math.isfinite(loss):
        raise NasError(
            f"the loss is {loss} after step {run.step} of {settings.steps} at learning rate {settings.lr:g}",
            hint="train with a lower learning rate",
        )
    names = pending[0][1]
    terms = {name: float(torch.stack([terms[name] for _, terms in pending]).mean()) for name in names}
    rate = settings.learning_rate(run.step - 1)
    return Progress(step=run.step, steps=settings.steps, lr=rate, loss=loss, terms=terms, seconds=run.seconds)


# ----------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first."""
    return sorted(folder.glob("step-*.pt"), reverse=True)


def _save(run: _Run, settings: TrainSettings, folder: Path) -> None:
    state = {
        "settings": asdict(settings),
        "step": run.step,
        "seconds": run.seconds,
        "student": run.student.state_dict(),
        "average": run.average.state_dict(),
        "optimiser": run.optimiser.state_dict(),
        "random": torch.get_rng_state(),
        "history": [asdict(line) for line in run.history],
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    atomic_write(folder / f"step-{run.step:08d}.pt", buffer.getvalue())
    for old in checkpoint_files(folder)[_KEPT:]:
        old.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    """A checkpoint's content, None where the file cannot be read as one."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError):
        return None
    return state


def _newest(folder: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint; an unreadable one costs the steps since the one before, never a number.

    Raises:
        NasError: there are checkpoints and none can be read.
    """
    files = checkpoint_files(folder)
    for path in files:
        state = _read(path)
        if state is not None:
            return state
    if files:
        raise NasError(f"none of the checkpoints in {folder} can be read", hint="remove that folder to start afresh")
    return None


def _resume(run: _Run, settings: TrainSettings, folder: Path) -> int | None:
    """Puts the newest checkpoint's state into `run`; returns its step, None where there is no checkpoint."""
    state = _newest(folder)
    if state is None:
        return None
    _check_settings(state["settings"], asdict(settings), folder)
    try:
        run.student.load_state_dict(state["student"])
        run.average.load_state_dict(state["average"])
    except RuntimeError as error:
        raise NasError(f"the checkpoint in {folder} is of another network", hint="choose another folder") from error
    run.optimiser.load_state_dict(state["optimiser"])
    run.step, run.seconds = state["step"], state["seconds"]
    run.history = [Progress(**line) for line in state["history"]]
    run.random = state["random"]
    return run.step


def _check_settings(saved: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    changed = [
        f"{name} was {saved.get(name)} and is now {asked[name]}" for name in asked if saved.get(name) != asked[name]
    ]
    if changed:
        raise NasError(
            f"the training in {folder} cannot be resumed with other settings: {'; '.join(changed)}",
            hint="resume with the same settings, or choose another folder",
        )
