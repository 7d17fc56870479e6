"""A small problem with everything in it, and studies over it."""

from __future__ import annotations

import itertools

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from nas.sampler import Problem

DISTRIBUTIONS = {
    "depth": IntDistribution(0, 4),
    "width": IntDistribution(64, 256, step=64),
    "kind": CategoricalDistribution(["plain", "light", None]),
    "ratio": FloatDistribution(0.5, 1.5, step=0.5),
}
ROWS = np.array(list(itertools.product(range(5), range(4), range(3), range(3))))


def cost(rows):
    """Falls with kind 1, rises with the rest."""
    return 1.0 + rows[:, 0] * (1.0 + rows[:, 1]) + 0.3 * rows[:, 3] - 0.4 * (rows[:, 2] == 1)


def quality(rows):
    """Saturates in depth and width; kind 2 is worst; higher is better."""
    effect = np.array([0.0, -0.2, -1.5])
    return 2.0 * np.sqrt(rows[:, 0]) + np.sqrt(rows[:, 1]) + effect[rows[:, 2]] - np.square(rows[:, 3] - 1)


def features(rows):
    return np.log1p(rows[:, :2].astype(float))


def problem(**changes):
    return Problem(**{"distributions": DISTRIBUTIONS, "rows": ROWS, "cost": cost(ROWS), **changes})


def study(sampler, directions=("minimize", "maximize")):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(directions=list(directions), sampler=sampler)


def row_of(trial, of):
    return of.row(trial.params)


def objective(of):
    """For `study.optimize`: cost minimised, quality maximised."""

    def called(trial):
        for name, distribution in of.distributions.items():
            trial._suggest(name, distribution)
        row = of.row(trial.params)[None]
        return float(cost(row)[0]), float(quality(row)[0])

    return called


def searched(sampler, count):
    """A study of `count` evaluations, and their rows [count, choices]."""
    found = study(sampler)
    found.optimize(objective(sampler.problem), n_trials=count)
    return found, np.array([sampler.problem.row(trial.params) for trial in found.trials])
