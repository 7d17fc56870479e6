"""Candidate -> Evaluation: what it costs, how long it takes, whether it fits the budgets, and how well it learns.

Cheap tests come first: cost and latency are known for every candidate from tables, so the proxy run is bought only for
candidates that fit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from nas.device import DeviceSheet
from nas.evaluate import pool, reach
from nas.evaluate.budget import Terms, terms, with_pipeline
from nas.evaluate.constraints import Constraint, DeviceBudget, Latencies, Limits
from nas.evaluate.pool import Pool
from nas.evaluate.reach import Shares
from nas.evaluate.whole import Breakdown, Share, breakdown
from nas.latency import LatencyPredictor
from nas.network import Scalar, short_hash
from nas.pricing import PricedBlock, Pricer, Prices
from nas.proxies import Score
from nas.space import Candidate, SearchSpace

__all__ = [
    "Breakdown",
    "Constraint",
    "DeviceBudget",
    "Evaluation",
    "Evaluator",
    "Limits",
    "Pool",
    "Share",
    "Shares",
    "Terms",
    "breakdown",
    "terms",
    "with_pipeline",
]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One row of a study.

    Latencies are predictions for the first budget's device: `latency_low_ms` and `latency_high_ms` bound one image from
    below and above, each with the budget's confidence; `others` has `latency_ms`, both bounds and
    `meets_budget_probability` on each further budget's device, by its name. A candidate is feasible where it meets
    every budget and limit; `violated` names those that it does not. `quality` is the proxy's score (higher is better),
    None where the proxy was not run; `text_quality` is its score of the conditional-minus-unconditional prediction,
    None where it gives none.
    """

    key: str
    choices: Mapping[str, Scalar]
    params: int
    macs: int
    weight_bytes: int
    peak_activation_bytes: int
    step_ms: float
    latency_ms: float
    latency_low_ms: float
    latency_high_ms: float
    meets_budget_probability: float
    feasible: bool
    reason: str
    source: str
    quality: float | None = None
    quality_sd: float | None = None
    text_quality: float | None = None
    text_quality_sd: float | None = None
    seconds: float | None = None
    others: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    violated: tuple[str, ...] = ()

    def with_quality(self, score: Score) -> Evaluation:
        """The same row with what the proxy run found."""
        return replace(
            self,
            quality=score.value,
            quality_sd=score.value_sd,
            text_quality=score.text,
            text_quality_sd=score.text_sd,
            seconds=score.seconds,
        )


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Prices candidates of one space against budgets on devices and limits.

    Attributes:
        space: whose candidates.
        budgets: at least one, of different devices; the first one's latency is the front's axis.
        limits: what the network may have at most.
    """

    space: SearchSpace
    budgets: tuple[DeviceBudget, ...]
    limits: Limits = Limits()

    @property
    def sheet(self) -> DeviceSheet:
        """The first budget's device."""
        return self.budgets[0].sheet

    @property
    def predictor(self) -> LatencyPredictor:
        """The first budget's."""
        return self.budgets[0].predictor

    @property
    def terms(self) -> Terms:
        """The first budget's."""
        return self.budgets[0].terms

    @cached_property
    def pricer(self) -> Pricer:
        """The space's block tables at the first target's precision."""
        return Pricer(self.space, self.sheet.target.precision)

    @cached_property
    def constraints(self) -> tuple[Constraint, ...]:
        """Everything that a candidate on the front must meet: the budgets, then the limits."""
        precisions = tuple(dict.fromkeys(budget.sheet.target.precision for budget in self.budgets))
        return (*self.budgets, *self.limits.constraints(self.sheet.target.precision, precisions))

    def identity(self) -> dict[str, Any]:
        """What decides latency and feasibility, as plain data: it may change while scores stay what they are."""
        found = {
            "budgets": [budget.name for budget in self.budgets],
            "targets": [budget.sheet.slug for budget in self.budgets],
            "predictors": [
                short_hash(json.dumps(budget.predictor.to_json(), sort_keys=True)) for budget in self.budgets
            ],
            "confidence": self.terms.confidence,
            "pipeline": None if all(budget.terms.budget.per_step for budget in self.budgets) else _paid_for(self.space),
            "limits": asdict(self.limits),
        }
        return dict(json.loads(json.dumps(found)))

    def warnings(self, evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
        """What must be said beside these latencies: how many lie far outside what a predictor was fitted on."""
        if not evaluations:
            return ()
        rows = np.array([self.space.candidate(**dict(e.choices)).row for e in evaluations])
        features = self.pricer.rows(rows).features
        return tuple(said for budget in self.budgets for said in budget.predictor.warnings(features))

    def block_latencies(self, candidate: Candidate) -> list[tuple[PricedBlock, float]]:
        """Each block with its part of one denoiser call's predicted milliseconds; the parts add up to the whole."""
        blocks = self.pricer.blocks(candidate)
        parts = self.predictor.contributions(np.array([block.features for block in blocks]))
        return list(zip(blocks, (float(ms) for ms in parts), strict=True))

    def shares(self, n: int = 20_000, seed: int = 0) -> Shares:
        """How much of the space each constraint rejects, from `n` candidates drawn uniformly."""
        return reach.shares(self.pricer, self.constraints, n, seed)

    def check_reachable(self) -> None:
        """Refuses constraints that nothing in the space can meet, before any proxy run.

        Raises:
            UsageError: names them, the nearest candidate, by how much it misses, and what would have to change.
        """
        reach.reachable(self.pricer, self.constraints)

    def problem_pool(self, n: int = 100_000, seed: int = 0) -> Pool:
        """Candidates within every constraint, for a sampler to choose from; see `nas.evaluate.pool.drawn`.

        Returns:
            Rows int [m, choices] with m <= n (the whole space where it is small: at most 2 n), predicted latency_ms [m]
            of the first budget, and features float [m, f] of the network (`nas.evaluate.pool.readable`, without
            columns that do not vary in the space).

        Raises:
            UsageError: nothing meets the constraints.
        """
        start = reach.reachable(self.pricer, self.constraints)
        return self._told(pool.drawn(self.pricer, self.budgets[0], self.constraints, n, seed, start))

    def neighbours(self, rows: np.ndarray, seed: int = 0) -> Pool:
        """The same of what differs from some rows [n, choices] in one choice or two; see `nas.evaluate.pool`."""
        return self._told(pool.neighbours(self.pricer, self.budgets[0], self.constraints, rows, seed))

    def features(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predicted latency_ms [n] and features [n, f], as in `problem_pool`, of any canonical rows [n, choices]."""
        prices = self.pricer.rows(rows)
        return self.budgets[0].expected_ms(prices), pool.readable(prices)[:, self._varying]

    @cached_property
    def _varying(self) -> np.ndarray:
        """Which of `nas.evaluate.pool.readable`'s columns differ between candidates of this space."""
        found = pool.readable(self.pricer.rows(self.space.sample(2_000, 0)))
        return np.flatnonzero(np.ptp(found, axis=0) > 0)

    def _told(self, found: Pool) -> Pool:
        rows, latency_ms, features = found
        return rows, latency_ms, features[:, self._varying]

    def price(self, candidates: Sequence[Candidate], source: str = "search") -> list[Evaluation]:
        """Evaluations without quality: cost, latency with its interval, and whether it fits."""
        if not candidates:
            return []
        prices = self.pricer.rows(np.array([candidate.row for candidate in candidates]))
        latencies = [budget.latencies(prices) for budget in self.budgets]
        values = [latency.high_ms for latency in latencies]
        values += [limit.values(prices) for limit in self.constraints[len(self.budgets) :]]
        return [
            self._evaluation(candidate, i, prices, latencies, [float(each[i]) for each in values], source)
            for i, candidate in enumerate(candidates)
        ]

    def _evaluation(
        self,
        candidate: Candidate,
        i: int,
        prices: Prices,
        latencies: Sequence[Latencies],
        values: Sequence[float],
        source: str,
    ) -> Evaluation:
        broken = [(each, value) for each, value in zip(self.constraints, values, strict=True) if value > each.most]
        first = _latency(latencies[0], i)
        return Evaluation(
            key=candidate.key,
            choices=candidate.choices,
            params=int(prices.params[i]),
            macs=int(prices.macs[i]),
            weight_bytes=int(prices.weight_bytes[i]),
            peak_activation_bytes=int(prices.peak_activation_bytes[i]),
            step_ms=float(latencies[0].step_ms[i]),
            latency_ms=first["latency_ms"],
            latency_low_ms=first["latency_low_ms"],
            latency_high_ms=first["latency_high_ms"],
            meets_budget_probability=first["meets_budget_probability"],
            feasible=not broken,
            reason="; ".join(each.broken(value) for each, value in broken),
            source=source,
            others={
                budget.sheet.alias: _latency(latency, i)
                for budget, latency in zip(self.budgets[1:], latencies[1:], strict=True)
            },
            violated=tuple(each.name for each, _ in broken),
        )


def _latency(found: Latencies, i: int) -> dict[str, float]:
    """One candidate's latency under the names that `Evaluation` has for them."""
    return {
        "latency_ms": float(found.ms[i]),
        "latency_low_ms": float(found.low_ms[i]),
        "latency_high_ms": float(found.high_ms[i]),
        "meets_budget_probability": float(found.probability[i]),
    }


def _paid_for(space: SearchSpace) -> dict[str, Any] | None:
    """What a budget for a whole image is charged with; its words on where that comes from decide nothing."""
    if space.pipeline is None:
        return None
    return {key: value for key, value in asdict(space.pipeline).items() if key != "source"}
