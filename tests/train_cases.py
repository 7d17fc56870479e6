"""The smallest runs: a tiny untrained teacher, a tiny candidate, recipes of a few steps."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_lesson import candidate

from nas.checkpoint import load_network
from nas.train import Machine, Recipe, Report, Subject, TrainResult, load_recipe, train_recipe

SMALL = (
    "student.width_divisor=32",
    "student.norm_groups=2",
    "batch=4",
    "checkpoint_every=2",
    "sampling.images=4",
    "sampling.steps=1",
)
# Two stages, the second without a block of the first and with a game that trains a network of its own.
TWO_STAGES = """
[student]
from_teacher = true
[sampling]
steps = 1
images = 2
[[stage]]
name = "distil"
steps = 4
batch = 4
lr = 1e-3
checkpoint_every = 2
[[stage.objective]]
name = "output"
[[stage]]
name = "few"
steps = 4
batch = 4
lr = 1e-4
checkpoint_every = 2
data = "prompts"
null_share = 0.0
remove = ["mid_block.resnets.0"]
[[stage.objective]]
name = "sid_lsg"
fake_lr = 1e-3
t_init = 713
"""


def small(*changes: str, steps: int = 6) -> Recipe:
    """The recipe shapes, tiny."""
    return load_recipe("shapes", [*SMALL, *changes], steps=steps)


def two_stages(folder: Path, *changes: str) -> Recipe:
    """TWO_STAGES, read from a file."""
    path = folder / "two.toml"
    path.write_text(TWO_STAGES)
    return load_recipe(str(path), changes)


def run(
    recipe: Recipe,
    teacher: str,
    out: Path,
    *,
    resume: bool = True,
    seed: int = 0,
    machine: Machine | None = None,
    report: Report | None = None,
) -> TrainResult:
    """Carries a recipe out on the tiny candidate, or on none where the recipe takes the teacher's network."""
    whom = Subject(candidate=None if recipe.student.from_teacher else candidate(), teacher=teacher)
    return train_recipe(recipe, whom, out, resume=resume, seed=seed, machine=machine, report=report)


def weights(result: TrainResult | Path) -> torch.Tensor:
    """All weights of a run's network in one row."""
    path = result.weights if isinstance(result, TrainResult) else result
    return torch.cat([p.flatten() for p in load_network(path).parameters()])
