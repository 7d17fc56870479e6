"""How candidates are tried small: what decides a score, and with it which scores may be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nas.distill import TrainSettings
from nas.errors import NasError
from nas.objectives import Objective, objective
from nas.targets import TargetSettings

LrRule = Literal["fixed", "width"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """How candidates are scored. Scores are comparable only between equal settings and equal teachers.

    The one rule of scale: widths, head width and norm groups are divided, everything else is kept (stages, residual
    blocks, transformer depths, head counts, convolution kinds, attention kinds, FFN ratio).

    Attributes:
        proxy: the plug-in of nas/proxies/ that gives the score.
        task: the plug-in of nas/tasks/ that is drawn.
        width_divisor: what widths and head width are divided by.
        norm_groups: groups of every GroupNorm.
        patch: pixels folded into channels per side: images 3x32x32 become latents 48x8x8 at 4.
        steps: optimiser steps per seed.
        batch: rows per step; no row is seen twice.
        lr: peak learning rate.
        lr_rule: "fixed", or "width" for lr * sqrt(reference width / the candidate's mean width): narrow networks bear
            larger steps (Yang et al. 2022, muP, table 3 has 1 / width for hidden weights under Adam; the square root is
            half-way, since a candidate's embeddings and biases keep theirs).
        null_every: every n-th row is trained without its caption, where the text weight is 0.
        text_weight: weight of the text objective; above 0 every row is asked with and without its caption, which
            doubles the work of a step.
        held_rows: rows the score is read from.
        seeds: one run each; the median counts.
        data_seed: of the rows.
        shared_steps: optimiser steps of what all candidates share (a super-network, a parent), once per space and
            teacher; 0 for proxies that share nothing.
        precision: "fp32", or "bf16" for autocast of students.
        data: the folder of latents that `nas cache` wrote, for the task "latents": candidates are then trained at
            their full size on it.
    """

    proxy: str = "distill"
    task: str = "shapes"
    width_divisor: int = 16
    norm_groups: int = 4
    patch: int = 4
    steps: int = 12
    batch: int = 16
    lr: float = 6e-3
    lr_rule: LrRule = "fixed"
    null_every: int = 4
    text_weight: float = 2.0
    held_rows: int = 256
    seeds: tuple[int, ...] = (0,)
    data_seed: int = 0
    shared_steps: int = 0
    precision: Precision = "fp32"
    data: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch < 1 or not self.seeds:
            raise NasError(f"a proxy needs steps >= 0, batch >= 1 and a seed, got {self}")

    @property
    def targets(self) -> TargetSettings:
        """The cache these settings read."""
        rows = max(self.steps, self.shared_steps, 1) * self.batch
        return TargetSettings(rows=rows, held_rows=self.held_rows, seed=self.data_seed)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """What the students are trained on."""
        text = (objective("text", weight=self.text_weight),) if self.text_weight > 0 else ()
        return (objective("output"), *text)

    def schedule(self, lr: float) -> TrainSettings:
        """How one student is trained, at a peak rate."""
        return TrainSettings(steps=self.steps, batch=self.batch, lr=lr, precision=self.precision)
