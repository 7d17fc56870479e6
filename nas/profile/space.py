"""A whole space: how its costs are spread, and which choices move them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from nas.latency import LatencyPredictor
from nas.pricing import Pricer
from nas.space import SearchSpace

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class SpaceProfile:
    """What a space's candidates cost, from a uniform sample.

    Attributes:
        space: which.
        target: whose latency, None without a predictor.
        precision: what bytes are stated at.
        sampled: number of candidates; seed: of the draw.
        costs: a row per sampled candidate: params, macs, weight_bytes, peak_activation_bytes and, with a predictor,
            step_ms.
        quantiles: the same columns, indexed by `QUANTILES`.
        effects: a row per value of each choice: choice, value, candidates, and per cost the mean effect, as the
            ratio of that value's geometric mean to the geometric mean over all values of the choice.
    """

    space: SearchSpace
    target: str | None
    precision: str
    sampled: int
    seed: int
    costs: pd.DataFrame
    quantiles: pd.DataFrame
    effects: pd.DataFrame

    def importance(self, cost: str) -> pd.Series:
        """How many times more the dearest value of each choice costs than its cheapest, largest first."""
        grouped = self.effects.groupby("choice", sort=False)[cost]
        return (grouped.max() / grouped.min()).sort_values(ascending=False, kind="stable")

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `nas profile --json` prints it."""
        return {
            "space": self.space.name,
            "candidates": self.space.count,
            "combinations": self.space.size,
            "resolution_px": self.space.resolution_px,
            "target": self.target,
            "precision": self.precision,
            "sampled": self.sampled,
            "seed": self.seed,
            "quantiles": {f"{q:g}": row.to_dict() for q, row in self.quantiles.iterrows()},
            "effects": self.effects.to_dict("records"),
        }


def profile_space(
    space: SearchSpace,
    predictor: LatencyPredictor | None = None,
    *,
    precision: str = "fp32",
    n: int = 2000,
    seed: int = 0,
    progress: Progress | None = None,
) -> SpaceProfile:
    """Prices `n` candidates drawn uniformly from a space.

    Args:
        space: whose candidates.
        predictor: adds latency; None leaves it out.
        precision: what weights and activations are held in.
        n: how many; a smaller space gives fewer.
        seed: of the draw.
        progress: called with (stage, done, total, note) while blocks are traced.

    Raises:
        UsageError: unknown precision.
        NasError: the predictor has never seen an operator kind of the space.
    """
    pricer = Pricer(space, precision)
    if progress is not None:
        report = progress
        pricer.prepare(lambda done, total: report("price", done, total, "blocks traced"))
    rows = space.sample(n, seed)
    prices = pricer.rows(rows)
    costs = pd.DataFrame(
        {
            "params": prices.params,
            "macs": prices.macs,
            "weight_bytes": prices.weight_bytes,
            "peak_activation_bytes": prices.peak_activation_bytes,
        }
    )
    if predictor is not None:
        costs["step_ms"] = predictor.predict(prices.features)[0]
    return SpaceProfile(
        space=space,
        target=None if predictor is None else predictor.target,
        precision=precision,
        sampled=len(rows),
        seed=seed,
        costs=costs,
        quantiles=costs.quantile(list(QUANTILES)),
        effects=effects(space, rows, costs),
    )


def effects(space: SearchSpace, rows: np.ndarray, costs: pd.DataFrame) -> pd.DataFrame:
    """The mean effect of each value of each choice on each cost; candidates where a choice is inactive do not count.

    Args:
        space: gives the choices.
        rows: int [n, choices].
        costs: [n] rows of positive costs.
    """
    logs = np.log(costs.to_numpy(dtype=float))
    off = space.inactive(rows)
    found: list[dict[str, Any]] = []
    for column, choice in enumerate(space.choices):
        members = [np.flatnonzero((rows[:, column] == i) & ~off[:, column]) for i in range(len(choice.values))]
        present = [(value, own) for value, own in zip(choice.values, members, strict=True) if len(own)]
        # Every value weighs the same, however often rules let it be drawn.
        middle = np.mean([logs[own].mean(axis=0) for _, own in present], axis=0) if present else 0.0
        for value, own in present:
            ratio = np.exp(logs[own].mean(axis=0) - middle)
            found.append(
                {"choice": choice.name, "value": value, "candidates": len(own)} | dict(zip(costs, ratio, strict=True))
            )
    return pd.DataFrame(found, columns=["choice", "value", "candidates", *costs])
