"""How a student is trained, and the records of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from torch import nn

from nas.errors import NasError

Student = TypeVar("Student", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a student is trained; two runs of equal settings on equal data give equal weights.

    Attributes:
        steps: optimiser steps.
        batch: examples per step, for whoever makes the batches.
        lr: peak learning rate of AdamW.
        warmup: steps over which it rises linearly; at most a fifth of `steps` is used.
        decay_share: the last share of the steps, over which it falls linearly to 0; 0 keeps it constant.
        clip: largest norm of the gradient, 0 for no limit.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: AdamW's.
        ema_gamma: exponent of the power-function average of the weights: its length is a fixed share of the run so
            far, so that short and long runs are averaged alike (Karras et al. 2024, EDM2, equation 123).
        ema_decay: a constant decay instead, as most published recipes have; 0 averages nothing.
        ema_half_life: a half-life in examples instead (Karras et al. 2022), which grows with the examples seen so far
            until it is reached.
        ema_ramp_up: the share of the examples seen so far that the half-life may have at most.
        accumulate: pieces that a batch is cut into per process, whose gradients are added up.
        precision: "fp32", "bf16" for autocast of the networks, or "fp16" with loss scaling.
        seed: of anything random in the student's forward pass and in games. It does not touch initialisation or data.
    """

    steps: int
    batch: int
    lr: float = 3e-3
    warmup: int = 20
    decay_share: float = 0.4
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    ema_gamma: float = 6.94
    ema_decay: float | None = None
    ema_half_life: float | None = None
    ema_ramp_up: float = 0.05
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.accumulate < 1:
            raise NasError(
                "training needs steps >= 1, batch >= 1 and accumulate >= 1,"
                f" got steps={self.steps}, batch={self.batch}, accumulate={self.accumulate}"
            )

    def learning_rate(self, step: int) -> float:
        """The rate of the step that is `step`-th from 0: linear rise, constant, linear fall to 0."""
        return self.lr * self.rate_share(step)

    def rate_share(self, step: int) -> float:
        """The share of its peak that every learning rate has at that step."""
        warmup = max(1, min(self.warmup, self.steps // 5))
        decay = max(1, round(self.decay_share * self.steps))
        return min(1.0, (step + 1) / warmup, (self.steps - step) / decay)

    def ema_weight(self, step: int) -> float:
        """How much of the old average is kept after that step; 0 at the first, so that there is no start bias."""
        if step == 0:
            return 0.0
        if self.ema_decay is not None:
            return self.ema_decay
        if self.ema_half_life is not None:
            life = min(self.ema_half_life, self.ema_ramp_up * self.batch * (step + 1))
            return float(0.5 ** (self.batch / max(life, 1e-8)))
        return (1 - 1 / (step + 1)) ** (self.ema_gamma + 1)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One line of a run's record: means since the line before.

    Attributes:
        step: steps done.
        steps: steps in all.
        lr: learning rate of the last of them.
        loss: mean weighted loss of the student's turns since the line before.
        terms: mean of each term of the objectives and of their partners.
        seconds: training time so far, earlier runs of a resumed training included.
    """

    step: int
    steps: int
    lr: float
    loss: float
    terms: dict[str, float]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Trained(Generic[Student]):
    """A finished run.

    Attributes:
        average: the student with its averaged weights: what is scored, sampled and exported.
        history: the run's record.
        resumed_from: the step a checkpoint was taken up at, None for a fresh start.
    """

    average: Student
    history: tuple[Progress, ...]
    resumed_from: int | None


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where and how often a run is saved.

    Attributes:
        folder: holds step-<n>.pt; the last two are kept.
        every: steps between checkpoints; the last step is always saved.
        resume: take up the newest one if there is one.
        identity: what else a checkpoint belongs to (recipe, data, teacher); another one is refused on resume.
        on_save: called in every process with the step and the averaged student after each.
    """

    folder: Path
    every: int = 500
    resume: bool = True
    identity: str = ""
    on_save: Callable[[int, Any], None] | None = None
