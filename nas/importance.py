"""Which choices decide: PED-ANOVA (arXiv 2304.10255) through Optuna, once for quality and once for latency."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial

if TYPE_CHECKING:
    from nas.space import SearchSpace

# PED-ANOVA asks what sets the best trials apart; below ten of them it mostly tells which ten they happened to be.
_BEST_SHARE, _BEST_AT_LEAST = 0.1, 10
_TRIALS_AT_LEAST = 2 * _BEST_AT_LEAST
_SHUFFLES, _CHANCE = 20, 0.95


def importances(
    trials: pd.DataFrame, space: SearchSpace, *, priced: tuple[np.ndarray, np.ndarray] | None = None, seed: int = 0
) -> dict[str, Any]:
    """How far each choice sets the best candidates apart from the others.

    Args:
        trials: as `nas.record.trials_frame` makes it.
        space: whose choices they are.
        priced: rows [n, choices] drawn from the whole space (500 will do) and their latencies [n] in ms: then latency's
            figures are the space's own. Without them they are of the trials, which a search does not spread evenly.
        seed: of the shuffles.

    Returns:
        "quality" and "latency", each {choice: {"share": its part of all importance, "chance": the part that 95 % of
        shuffled studies stay below}} in the order of the space, or {} where there are fewer than 20 candidates;
        "scored" and "priced", the candidates behind each; "method".
    """
    distinct = trials[trials["state"] != "failed"].drop_duplicates("key", keep="first")
    scored = distinct[(distinct["state"] == "proxied") & distinct["quality"].notna()]
    if priced is None:
        latency, priced_params = distinct["latency_ms"], _params(distinct, space)
    else:
        rows, latency = priced
        off = space.inactive(rows)
        priced_params = [_of_row(space, row, idle) for row, idle in zip(rows, off, strict=True)]
    return {
        "quality": _importance(_params(scored, space), -scored["quality"].to_numpy(dtype=float), space, seed),
        "latency": _importance(priced_params, np.asarray(latency, dtype=float), space, seed),
        "scored": len(scored),
        "priced": len(priced_params),
        "method": "PED-ANOVA (arXiv 2304.10255): what sets the best tenth, but at least ten, apart from the others",
    }


def _of_row(space: SearchSpace, row: np.ndarray, inactive: np.ndarray) -> dict[str, int]:
    """The active choices of one row, as indices of their values."""
    return {c.name: int(i) for c, i, off in zip(space.choices, row, inactive, strict=True) if not off}


def _params(frame: pd.DataFrame, space: SearchSpace) -> list[dict[str, int]]:
    """The active choices of each row of a trials frame, as indices of their values."""
    found: list[dict[str, int]] = [{} for _ in range(len(frame))]
    for choice in space.choices:
        for params, value in zip(found, frame[f"choice.{choice.name}"], strict=True):
            if not pd.isna(value):
                params[choice.name] = choice.index(value)
    return found


def _importance(
    params: list[dict[str, int]], losses: np.ndarray, space: SearchSpace, seed: int
) -> dict[str, dict[str, float]]:
    """Shares for one objective, lower is better; {} where there are too few candidates to tell anything."""
    if len(losses) < _TRIALS_AT_LEAST or np.ptp(losses) == 0:
        return {}
    best = max(_BEST_SHARE, _BEST_AT_LEAST / len(losses))
    divergences = _measure(params, space, best)
    found = divergences(losses)
    generator = np.random.default_rng(seed)
    shuffled = [divergences(generator.permutation(losses)) for _ in range(_SHUFFLES)]
    total = sum(found.values())
    if total <= 0:
        return {}
    return {
        c.name: {
            "share": found.get(c.name, 0.0) / total,
            "chance": float(np.quantile([each.get(c.name, 0.0) for each in shuffled], _CHANCE)) / total,
        }
        for c in space.choices
        if len(c.values) > 1
    }


def _measure(params: list[dict[str, int]], space: SearchSpace, best: float) -> Callable[[np.ndarray], dict[str, float]]:
    """A function from losses [n] to PED-ANOVA's divergence per choice, for the same candidates each time."""
    distributions: dict[str, BaseDistribution] = {
        c.name: IntDistribution(0, len(c.values) - 1)
        if c.ordinal
        else CategoricalDistribution(list(range(len(c.values))))
        for c in space.choices
    }
    study = optuna.create_study()
    study.add_trials(
        [
            optuna.trial.create_trial(value=0.0, params=row, distributions={name: distributions[name] for name in row})
            for row in params
        ]
    )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=best)

    def divergences(losses: np.ndarray) -> dict[str, float]:
        def loss(trial: FrozenTrial) -> float:
            return float(losses[trial.number])

        with warnings.catch_warnings():
            # Said of every `target`: that low ones are sought. They are.
            warnings.filterwarnings("ignore", message="PedAnovaImportanceEvaluator computes", category=UserWarning)
            return evaluator.evaluate(study, target=loss)

    return divergences
