"""Samplers: which candidate a search tries next.

`front` is this package's own and exploits that latency is known before a candidate is tried. The others are Optuna's,
unchanged, for comparison.
"""

from __future__ import annotations

from typing import Final

import optuna

from nas.errors import UsageError, unknown
from nas.sampler.front import Exhausted, FrontSampler
from nas.sampler.problem import Problem

__all__ = ["NAMES", "Exhausted", "FrontSampler", "Problem", "make"]

NAMES: Final = ("front", "gp", "tpe", "nsga2", "random")


def make(
    name: str, *, seed: int, problem: Problem | None = None, noise_sd: float | None = None
) -> optuna.samplers.BaseSampler:
    """The sampler `name`.

    Args:
        name: one of `NAMES`: `front`; or Optuna's Gaussian process, multivariate TPE, NSGA-II and random sampler.
        seed: of its draws.
        problem: what `front` exploits; the others do without. The study's first objective is the problem's cost.
        noise_sd: of one evaluation of quality, for `front`; None where it is to be learned.

    Raises:
        UsageError: unknown name, or `front` without a problem.
    """
    if name == "front":
        if problem is None:
            raise UsageError("the sampler front needs a problem: candidates with their cost")
        return FrontSampler(problem, seed=seed, noise_sd=noise_sd)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed)
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    raise unknown("sampler", name, NAMES)
