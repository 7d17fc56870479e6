"""Candidate -> Evaluation: what it costs, how long it takes, whether it fits the budget, and how well it learns.

Cheap tests come first: cost and latency are known for every candidate from tables, so the proxy run is bought only for
candidates that fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from nas.device import DeviceSheet
from nas.errors import UsageError
from nas.evaluate.budget import Terms, terms, with_pipeline
from nas.evaluate.whole import Breakdown, Share, breakdown
from nas.latency import LatencyPredictor
from nas.network import Scalar
from nas.pricing import PricedBlock, Pricer, Prices, fastest
from nas.proxies import Score
from nas.space import Candidate, SearchSpace

__all__ = ["Breakdown", "Evaluation", "Evaluator", "Share", "Terms", "breakdown", "terms", "with_pipeline"]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One row of a study.

    Latencies are predictions: `latency_low_ms` and `latency_high_ms` bound one image from below and above, each with
    the budget's confidence. `quality` is the proxy's score (higher is better), None where the proxy was not
    run; `text_quality` is its score of the conditional-minus-unconditional prediction, None where it gives none.
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
    """Prices candidates of one space against one budget on one device."""

    space: SearchSpace
    sheet: DeviceSheet
    predictor: LatencyPredictor
    terms: Terms

    @cached_property
    def pricer(self) -> Pricer:
        """The space's block tables at the target's precision."""
        return Pricer(self.space, self.sheet.target.precision)

    def upper_ms(self, features: np.ndarray) -> np.ndarray:
        """[n]: the bound on one image that holds with the budget's confidence."""
        return np.asarray(self.terms.total_high_ms(self.predictor.upper(features, self.terms.confidence)))

    def warnings(self, evaluations: Sequence[Evaluation]) -> tuple[str, ...]:
        """What must be said beside these latencies: how many lie far outside what the predictor was fitted on."""
        if not evaluations:
            return ()
        rows = np.array([self.space.candidate(**dict(e.choices)).row for e in evaluations])
        return self.predictor.warnings(self.pricer.rows(rows).features)

    def block_latencies(self, candidate: Candidate) -> list[tuple[PricedBlock, float]]:
        """Each block with its part of one denoiser call's predicted milliseconds; the parts add up to the whole."""
        blocks = self.pricer.blocks(candidate)
        parts = self.predictor.contributions(np.array([block.features for block in blocks]))
        return list(zip(blocks, (float(ms) for ms in parts), strict=True))

    def feasible_share(self, n: int = 20_000, seed: int = 0) -> float:
        """The share of the space that fits the budget, from `n` candidates drawn uniformly."""
        prices = self.pricer.rows(self.space.sample(n, seed))
        return float(np.mean(self.upper_ms(prices.features) <= self.terms.budget.ms))

    def check_reachable(self) -> None:
        """Refuses a budget that nothing in the space can meet, before any proxy run.

        Raises:
            UsageError: names the fastest candidate, by how much it misses, and what would have to change.
        """
        row, _ = fastest(self.pricer, self.predictor)
        found = self.price([self.space.from_row(row)])[0]
        if found.feasible:
            return
        raise UsageError(
            f"no candidate of {self.space.name} meets {self.terms.budget} with probability {self.terms.confidence:g}:"
            f" the fastest found, {found.key}, takes {found.latency_ms:.0f} ms and is below"
            f" {found.latency_high_ms:.0f} ms with that probability, {found.latency_high_ms - self.terms.budget.ms:.0f}"
            f" ms over ({self.terms.fixed_high_ms:.4g} ms of it fixed parts)",
            hint=f"a budget from {found.latency_high_ms:.0f} ms, a lower --confidence or --resolution, or a space with"
            " smaller networks",
        )

    def price(self, candidates: Sequence[Candidate], source: str = "search") -> list[Evaluation]:
        """Evaluations without quality: cost, latency with its interval, and whether it fits."""
        if not candidates:
            return []
        rows = np.array([candidate.row for candidate in candidates])
        prices = self.pricer.rows(rows)
        step_ms, _, _ = self.predictor.predict(prices.features)
        upper = self.upper_ms(prices.features)
        lower = self.terms.total_low_ms(self.predictor.lower(prices.features, self.terms.confidence))
        within = self.predictor.probability_within(prices.features, self.terms.step_budget_ms)
        return [
            self._evaluation(candidate, i, prices, step_ms, lower, upper, within, source)
            for i, candidate in enumerate(candidates)
        ]

    def _evaluation(
        self,
        candidate: Candidate,
        i: int,
        prices: Prices,
        step_ms: np.ndarray,
        lower: np.ndarray,
        upper: np.ndarray,
        within: np.ndarray,
        source: str,
    ) -> Evaluation:
        over = float(upper[i]) - self.terms.budget.ms
        return Evaluation(
            key=candidate.key,
            choices=candidate.choices,
            params=int(prices.params[i]),
            macs=int(prices.macs[i]),
            weight_bytes=int(prices.weight_bytes[i]),
            peak_activation_bytes=int(prices.peak_activation_bytes[i]),
            step_ms=float(step_ms[i]),
            latency_ms=float(self.terms.total_ms(step_ms[i])),
            latency_low_ms=float(lower[i]),
            latency_high_ms=float(upper[i]),
            meets_budget_probability=float(within[i]),
            feasible=over <= 0,
            reason="" if over <= 0 else f"latency bound {over:.0f} ms over the budget",
            source=source,
        )
