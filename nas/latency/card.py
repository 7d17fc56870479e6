"""The card of a predictor: what it was fitted on, how wrong it is on networks it has not seen, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nas.errors import NasError
from nas.latency.calibration import FEW, LEVELS, HeldOut, held_out
from nas.latency.predictor import EMPIRICAL_FROM, LatencyPredictor
from nas.latency.problem import Problem
from nas.latency.spread import Borrowed
from nas.op import KINDS
from nas.tables import Measurement


@dataclass(frozen=True, kw_only=True)
class Residual:
    """A row of a table beside what a fit that had not seen its network said of it.

    Attributes:
        subject: its key; name: what it is.
        error: signed, relative (0.05: predicted 5 % too slow).
        intervals: nominal level ("0.8") -> (low, high) in ms.
        source: of the row; several are joined.
    """

    subject: str
    name: str
    chip: str
    ms: float
    predicted: float
    error: float
    intervals: Mapping[str, tuple[float, float]]
    source: str


def card(posed: Problem, predictor: LatencyPredictor, measurements: Sequence[Measurement]) -> dict[str, Any]:
    """What is known about a predictor of a `chosen` problem, as plain data; errors are fractions (0.018 = 1.8 %).

    Raises:
        NasError: no network could be held out, so that nothing at all is known about its error.
    """
    rows = list(held_out(posed))
    if not rows:
        raise NasError(
            f"{posed.target}: no network can be predicted from the others, so nothing tells how wrong a fit is"
        )
    blocks = posed.networks == ""
    solution = posed.solve()
    dates = [row.measured_at for row in measurements if row.used and row.measured_at]
    return {
        "target": posed.target,
        "rows": int((~blocks).sum()),
        "networks": len(posed.groups),
        "blocks": int(blocks.sum()),
        "ratios": len(posed.ratios.log_ratio),
        "held_out": summary(rows, "each network in turn" if len(posed.groups) <= FEW else "five-fold"),
        "residuals": [_residual(row, measurements) for row in rows],
        "never_seen": [kind for kind in KINDS if kind not in predictor.seen],
        "fitted_range_ms": list(predictor.range_ms),
        "ridge": posed.shrinkage.ridge,
        "block_scale": float(np.exp(solution.effects[-1])) if blocks.any() else None,
        "chips": chip_factors(posed),
        "interval": _interval(predictor, posed.borrowed.get(len(posed.groups))),
        "newest": max(dates, default=None),
    }


def _interval(predictor: LatencyPredictor, few: Borrowed | None) -> dict[str, Any]:
    n = len(predictor.residuals)
    student = f"Student-t with {predictor.degrees} degrees of freedom"
    together = "CV+" if len(predictor.without) < n else "jackknife+"
    found: dict[str, Any] = {
        "method": student if n < EMPIRICAL_FROM else together,
        "networks": n,
        "sd": predictor.sd,
    }
    if few is not None:
        others = len(few.targets)
        found["method"] += f"; {n} networks, spread taken from {others} other targets"
        found["borrowed"] = {"sd": few.sd, "degrees": few.degrees, "targets": list(few.targets)}
    return found


def chip_factors(posed: Problem) -> dict[str, float]:
    """How many times longer each chip takes than the target's; empty where chips are not pooled."""
    found = posed.solve()
    factors: dict[str, float] = {}
    if len(set(posed.chips)) > 1:
        for i in np.flatnonzero(posed.networks != ""):
            log = (posed.rows.effects[i] - posed.target_effects) @ found.effects
            factors[str(posed.chips[i])] = float(np.exp(log))
    return dict(sorted(factors.items()))


def _residual(row: HeldOut, measurements: Sequence[Measurement]) -> dict[str, Any]:
    sources = dict.fromkeys(m.source for m in measurements if m.used and (m.subject, m.chip) == (row.subject, row.chip))
    return {
        "subject": row.subject,
        "name": row.name,
        "chip": row.chip,
        "ms": row.ms,
        "predicted": row.predicted,
        "error": row.error,
        "intervals": {f"{level:g}": list(span) for level, span in row.intervals.items()},
        "source": "; ".join(sources),
    }


def residuals_of(about: Mapping[str, Any]) -> list[Residual]:
    """The held-out rows that a card keeps."""
    spans = [{level: (low, high) for level, (low, high) in row["intervals"].items()} for row in about["residuals"]]
    return [Residual(**{**row, "intervals": span}) for row, span in zip(about["residuals"], spans, strict=True)]


def summary(rows: Sequence[HeldOut], method: str) -> dict[str, Any]:
    """Errors and measured coverage of held-out rows."""
    errors = np.array([row.error for row in rows])
    worst = rows[int(np.argmax(np.abs(errors)))]
    coverage = {}
    for level in LEVELS:
        inside = [row.intervals[level][0] <= row.ms <= row.intervals[level][1] for row in rows]
        below = [row.ms <= row.uppers[level] for row in rows]
        coverage[f"{level:g}"] = {"nominal": level, "measured": float(np.mean(inside)), "rows": len(rows)}
        coverage[f"upper {level:g}"] = {"nominal": level, "measured": float(np.mean(below)), "rows": len(rows)}
    spearman, kendall = _rank([row.ms for row in rows], [row.predicted for row in rows])
    return {
        "method": method,
        "rows": len(rows),
        "mape": float(np.mean(np.abs(errors))),
        "within_5": float(np.mean(np.abs(errors) <= 0.05)),
        "within_10": float(np.mean(np.abs(errors) <= 0.10)),
        "spearman": spearman,
        "kendall": kendall,
        "worst": {"subject": worst.name, "chip": worst.chip, "error": worst.error},
        "coverage": coverage,
    }


def _rank(truth: Sequence[float], predicted: Sequence[float]) -> tuple[float | None, float | None]:
    """Spearman's and Kendall's rank correlation; none of fewer than three rows, which say nothing about a rank."""
    # Only a fit needs these, and they take longer to import than a predictor takes to load.
    from scipy.stats import kendalltau, spearmanr

    if len(truth) < 3 or len(set(truth)) < 2 or len(set(predicted)) < 2:
        return None, None
    return float(spearmanr(truth, predicted).statistic), float(kendalltau(truth, predicted).statistic)
