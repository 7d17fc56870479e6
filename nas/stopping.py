"""When a proxy run is not worth finishing: what its learning curve says of where it will end.

Optuna's pruners refuse more than one objective, and what is asked here is another question than theirs: the latency of
a candidate is known before its run, so the run has to reach one value to be worth anything, the best quality that is
known at no more latency. All candidates see the same rows in the same order, so the training loss at a step is paired
between them and predicts the final value far better than its size alone would.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit

from nas.bench import Curve, Point

# With fewer finished runs the interval of a straight line is wider than any gap that matters.
FEWEST = 6
# From here on the look before is taken into the line too: two slopes cost another degree of freedom.
_TWO_LOOKS = 12


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        key: of its candidate.
        latency_ms: of its candidate, as the front has it.
        value: the final score, higher is better.
        curve: its way there, with a point at each look.
        feasible: whether it may stand on the front.
    """

    key: str
    latency_ms: float
    value: float
    curve: Curve
    feasible: bool = True


@dataclass(frozen=True, kw_only=True)
class Line:
    """Final values over the training dB at a look (and the look before), by least squares.

    Attributes:
        steps: the looks it reads, the last being the one at which it is asked.
        centre: mean training dB at each [looks].
        slopes: of each [looks].
        level: mean final value.
        inverse: of the centred inputs' Gram matrix [looks, looks].
        runs: how many it was fitted to.
        sd: of the residuals, with `dof` degrees of freedom.
        dof: runs - looks - 1.
    """

    steps: tuple[int, ...]
    centre: tuple[float, ...]
    slopes: tuple[float, ...]
    level: float
    inverse: tuple[tuple[float, ...], ...]
    runs: int
    sd: float
    dof: int

    def expected(self, train_db: Sequence[float]) -> tuple[float, float]:
        """The final value of a run with this training dB at `steps`, and the standard error of that prediction.

        The error has the spread of single runs and the uncertainty of the line itself, which grows with the distance
        from the runs that it was fitted to (a new observation; Draper and Smith, Applied Regression Analysis, 3rd ed.).
        """
        away = np.asarray(train_db) - np.asarray(self.centre)
        spread = 1 + 1 / self.runs + float(away @ np.asarray(self.inverse) @ away)
        return self.level + float(away @ np.asarray(self.slopes)), self.sd * math.sqrt(spread)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Whether one candidate's run is still worth its time, to be asked at every look; a plain value, fit for a pool.

    The chance that it works with is that of this very run given its curve so far. Of the runs it stops, a share of at
    most 1 - `confidence` is therefore expected to have been worth finishing, however many looks there are.

    Attributes:
        confidence: how sure it must be that the run ends below `goal`.
        goal: the best final value known at no more latency; None where there is none, and nothing is stopped.
        holder: the key of the candidate that has it.
        lines: one for each look at which it may stop.
        steps: of a whole run.
        unit: of the values.
    """

    confidence: float
    goal: float | None = None
    holder: str = ""
    lines: tuple[Line, ...] = ()
    steps: int = 0
    unit: str = "dB"

    def chance(self, points: Sequence[Point]) -> float:
        """The probability that a run with these points ends above the goal; 1 where nothing can be said."""
        found = self._expected(points)
        if found is None or self.goal is None:
            return 1.0
        value, error, dof = found
        return float(stdtr(dof, (value - self.goal) / error))

    def __call__(self, points: Sequence[Point]) -> str | None:
        """Why the run should end here, or None."""
        found = self._expected(points)
        if found is None or self.goal is None or self.chance(points) >= 1 - self.confidence:
            return None
        value, error, dof = found
        most = value + error * float(stdtrit(dof, self.confidence))
        return (
            f"stopped after {points[-1].step} of {self.steps} steps: it would end near {value:.4g} {self.unit}, below"
            f" {most:.4g} with {100 * self.confidence:g} % confidence, and {self.holder} has {self.goal:.4g}"
            f" {self.unit} at no more latency"
        )

    def _expected(self, points: Sequence[Point]) -> tuple[float, float, int] | None:
        """Final value, standard error and degrees of freedom; None where no line speaks of this look."""
        seen = {point.step: point.train_db for point in points}
        line = next((each for each in self.lines if points and each.steps[-1] == points[-1].step), None)
        if line is None or not all(math.isfinite(seen.get(step, math.nan)) for step in line.steps):
            return None
        value, error = line.expected([seen[step] for step in line.steps])
        return value, error, line.dof


def rule(runs: Iterable[Run], latency_ms: float, *, confidence: float, steps: int, unit: str = "dB") -> Rule:
    """The rule for a candidate of known latency, from the runs that are finished.

    Args:
        runs: finished ones, with curves.
        latency_ms: of the candidate.
        confidence: in (0, 1); how sure the rule must be before it stops a run.
        steps: of a whole run.
        unit: of the values.
    """
    finished = list(runs)
    before = [run for run in finished if run.feasible and run.latency_ms <= latency_ms]
    best = max(before, key=lambda run: run.value, default=None)
    return Rule(
        confidence=confidence,
        goal=None if best is None else best.value,
        holder="" if best is None else best.key,
        lines=lines(finished),
        steps=steps,
        unit=unit,
    )


def lines(runs: Sequence[Run]) -> tuple[Line, ...]:
    """A line for each look that at least `FEWEST` of the runs have; those that say nothing are left out."""
    curves = [(run.value, {point.step: point.train_db for point in run.curve[:-1]}) for run in runs]
    looks = sorted({step for _, seen in curves for step in seen})
    found = []
    for i, look in enumerate(looks):
        reads = (*looks[max(0, i - 1) : i], look)
        known = [(value, seen) for value, seen in curves if all(math.isfinite(seen.get(s, math.nan)) for s in reads)]
        if len(known) < _TWO_LOOKS:
            reads = (look,)
            known = [(value, seen) for value, seen in curves if math.isfinite(seen.get(look, math.nan))]
        line = _fitted(reads, known) if len(known) >= FEWEST else None
        if line is not None:
            found.append(line)
    return tuple(found)


def _fitted(steps: tuple[int, ...], known: Sequence[tuple[float, dict[int, float]]]) -> Line | None:
    """The line through some runs; None where their curves do not differ."""
    values = np.array([value for value, _ in known])
    inputs = np.array([[seen[step] for step in steps] for _, seen in known])
    centre, level = inputs.mean(axis=0), float(values.mean())
    away = inputs - centre
    if np.linalg.matrix_rank(away) < len(steps):
        return None
    inverse = np.linalg.inv(away.T @ away)
    slopes = inverse @ away.T @ (values - level)
    dof = len(known) - len(steps) - 1
    residuals = values - level - away @ slopes
    # A perfect line would be sure of everything; values are kept to about this many digits anyway.
    least = 1e-6 * max(1.0, float(np.abs(values).max()))
    return Line(
        steps=steps,
        centre=tuple(centre.tolist()),
        slopes=tuple(slopes.tolist()),
        level=level,
        inverse=tuple(tuple(row) for row in inverse.tolist()),
        runs=len(known),
        sd=max(math.sqrt(float(residuals @ residuals) / dof), least),
        dof=dof,
    )
