"""LatencyPredictor: features of networks -> milliseconds with intervals. Reading one needs only numpy.

Intervals are jackknife+ (Barber et al. 2021, arXiv 1905.02928) on the log scale with normalised residuals: network i,
left out of the fit, was missed by r_i = log(ms_i / prediction_-i(i)) / spread(i); a new network x is then believed to
take prediction_-i(x) * exp(r_i * spread(x)) for each i alike. `spread` (regression.py) makes the interval wider for
networks that lean on operators the rows say little about. Of many networks a few are left out together (CV+, same
paper): the intervals are as good and a predictor stays small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

from nas.errors import NasError, UsageError
from nas.latency.regression import Place
from nas.op import FEATURES

EMPIRICAL_FROM = 20
FAR = 2.0
_CHUNK = 1 << 15


@dataclass(frozen=True, kw_only=True)
class LatencyPredictor:
    """A fitted latency model of one target.

    With at least `EMPIRICAL_FROM` left-out networks the quantiles are theirs. With fewer (published rows), or beyond
    what that many can say, residuals are taken as Student-t with the scale `sd` and `degrees` of freedom.

    Attributes:
        target: slug of the table it was fitted to.
        place: costs and their covariance at the target.
        without: [K, F] costs at the target with some networks left out of the fit each.
        fold: [N] which of those left out each network.
        residuals: [N] normalised signed log residuals of those networks (their root mean square over a network's rows
            where it has several, with the sign of their mean).
        sd: root mean square of normalised residuals: what one unit of spread is, as a fraction.
        degrees: of freedom that this is known with: one less than there are networks, or more where other targets help.
        range_ms: least and greatest latency of the fitted networks, in ms at the target.
        seen: operator kinds that occur in the fitted rows.
        card: what is known about how good it is (see `nas.latency.fit`).
    """

    target: str
    place: Place
    without: np.ndarray
    fold: np.ndarray
    residuals: np.ndarray
    sd: float
    degrees: int
    range_ms: tuple[float, float]
    seen: tuple[str, ...]
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def coefficients(self) -> np.ndarray:
        """[F] ms per unit of each feature."""
        return self.place.costs

    def predict(
        self, features: np.ndarray, confidence: float = 0.8, *, unseen: str = "error"
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Predicted ms with a central interval.

        Args:
            features: [n, F] of `nas.op.features`.
            confidence: the interval's, within (0, 1).
            unseen: "error" refuses operator kinds that no fitted row has; "prior" prices them by the prior at the
                fitted scale (for testing a fit on what it never saw; the interval knows).

        Returns:
            ms, low, high: [n] each.

        Raises:
            NasError: a network has an operator kind that was never fitted.
        """
        x = self._checked(features, confidence, unseen)
        low, high = self._quantile(x, (1 - confidence) / 2), self._quantile(x, (1 + confidence) / 2)
        return self.place.ms(x), low, high

    def upper(self, features: np.ndarray, confidence: float = 0.8, *, unseen: str = "error") -> np.ndarray:
        """[n] ms that the latency does not exceed with probability `confidence` (one-sided)."""
        return self._quantile(self._checked(features, confidence, unseen), confidence)

    def lower(self, features: np.ndarray, confidence: float = 0.8, *, unseen: str = "error") -> np.ndarray:
        """[n] ms that the latency exceeds with probability `confidence` (one-sided)."""
        return self._quantile(self._checked(features, confidence, unseen), 1 - confidence)

    def probability_within(self, features: np.ndarray, ms: float, *, unseen: str = "error") -> np.ndarray:
        """[n] probability that the latency is at most `ms`: at least c exactly where `upper` at c is within `ms`."""
        x = self._checked(features, 0.5, unseen)
        if ms <= 0:
            return np.zeros(len(x))
        parts = [self._probability(x[i : i + _CHUNK], math.log(ms)) for i in range(0, len(x), _CHUNK)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def ratio(
        self, over: np.ndarray, under: np.ndarray, confidence: float = 0.8, *, unseen: str = "error"
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How many times as long networks `over` [n, F] take as `under` [n, F], with a central interval, [n] each.

        What both lean on alike cancels; each keeps an error of its own, taken as independent of the other's.
        """
        above, below = self._checked(over, confidence, unseen), self._checked(under, confidence, unseen)
        middle = np.log(self.place.ms(above) / self.place.ms(below))
        shares = self.place.shares(above) - self.place.shares(below)
        doubt = np.sqrt(2.0 + self.place.doubt(np.hstack([shares, np.zeros((len(shares), 1))])))
        half = float(stdtrit(self.degrees, (1 + confidence) / 2)) * self.sd * doubt
        return np.exp(middle), np.exp(middle - half), np.exp(middle + half)

    def contributions(self, features: np.ndarray) -> np.ndarray:
        """[n] ms of parts of a network (its blocks); they add up to the prediction for the sum of their features."""
        return np.asarray(features, dtype=float) @ self.place.costs

    def extrapolation(self, features: np.ndarray) -> np.ndarray:
        """[n] True where the prediction is more than a factor `FAR` outside the latencies that were fitted."""
        return self._widening(self.place.ms(np.asarray(features, dtype=float))) > 1.0

    def warnings(self, features: np.ndarray) -> tuple[str, ...]:
        """Sentences to print beside predictions of these networks [n, F]."""
        far = int(self.extrapolation(features).sum())
        if not far:
            return ()
        low, high = self.range_ms
        return (
            f"{far} of {len(features)} networks are more than {FAR:g} times outside the {low:.4g} to {high:.4g} ms that"
            f" {self.target} was fitted on; their intervals are widened",
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` gives the same predictions to the last bit."""
        return {
            "target": self.target,
            "features": list(FEATURES),
            "costs": self.place.costs.tolist(),
            "unit": self.place.unit.tolist(),
            "covariance": self.place.covariance.tolist(),
            "without": self.without.tolist(),
            "fold": self.fold.tolist(),
            "residuals": self.residuals.tolist(),
            "sd": self.sd,
            "degrees": self.degrees,
            "range_ms": list(self.range_ms),
            "seen": list(self.seen),
            "card": dict(self.card),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LatencyPredictor:
        """The inverse of `to_json`.

        Raises:
            NasError: the features are not this code's.
        """
        if data["features"] != list(FEATURES):
            raise NasError(f"the predictor of {data['target']} was fitted on other features than this version computes")
        place = Place(
            costs=np.array(data["costs"]), unit=np.array(data["unit"]), covariance=np.array(data["covariance"])
        )
        residuals = np.array(data["residuals"])
        return cls(
            target=data["target"],
            place=place,
            without=np.array(data["without"]).reshape(-1, len(FEATURES)),
            # Files written before networks were left out together leave out one each.
            fold=np.array(data.get("fold", range(len(residuals))), dtype=int),
            residuals=residuals,
            sd=data["sd"],
            degrees=data.get("degrees", len(residuals) - 1),
            range_ms=(data["range_ms"][0], data["range_ms"][1]),
            seen=tuple(data["seen"]),
            card=data["card"],
        )

    def _checked(self, features: np.ndarray, confidence: float, unseen: str) -> np.ndarray:
        if not 0 < confidence < 1:
            raise UsageError(f"confidence must lie between 0 and 1, got {confidence}")
        x = np.asarray(features, dtype=float)
        if x.ndim != 2 or x.shape[1] != len(FEATURES):
            raise NasError(f"features must be [n, {len(FEATURES)}], got {list(x.shape)}")
        strange = kinds_of(x) - set(self.seen)
        if strange and unseen == "error":
            raise NasError(
                f"{self.target} was fitted without operators of kind {', '.join(sorted(strange))}, so it cannot price"
                " networks that have them",
                hint="measure a network or block that has them, then fit again",
            )
        return x

    def _widening(self, ms: np.ndarray) -> np.ndarray:
        """[n] factor on the interval's half-width: 1 up to FAR times outside the range, 2 at twice that, and so on."""
        outside = np.maximum(ms / self.range_ms[1], self.range_ms[0] / ms)
        return 1.0 + np.log2(np.maximum(outside / FAR, 1.0))

    def _half_width(self, x: np.ndarray) -> np.ndarray:
        return self.place.spread(x) * self._widening(self.place.ms(x))

    def _believed(self, x: np.ndarray) -> np.ndarray:
        """[n, N] log ms as each left-out network would have it."""
        return np.log(x @ self.without.T)[:, self.fold] + self._half_width(x)[:, None] * self.residuals

    def _quantile(self, x: np.ndarray, q: float) -> np.ndarray:
        parts = [np.exp(self._log_quantile(x[i : i + _CHUNK], q)) for i in range(0, len(x), _CHUNK)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _log_quantile(self, x: np.ndarray, q: float) -> np.ndarray:
        n = len(self.residuals)
        tail = np.log(self.place.ms(x)) + float(stdtrit(self.degrees, q)) * self.sd * self._half_width(x)
        if n < EMPIRICAL_FROM:
            return tail
        believed = self._believed(x)
        # Jackknife+ rounds outwards, an upper quantile up, a lower one down; 1e-9 because 0.9 * 30 is not quite 27.
        exact = q * (n + 1)
        rank = math.ceil(exact - 1e-9) if q >= 0.5 else math.floor(exact + 1e-9)
        if rank > n:
            return np.maximum(believed.max(axis=1), tail)
        if rank < 1:
            return np.minimum(believed.min(axis=1), tail)
        return np.partition(believed, rank - 1, axis=1)[:, rank - 1]

    def _probability(self, x: np.ndarray, log_ms: float) -> np.ndarray:
        n = len(self.residuals)
        distance = (log_ms - np.log(self.place.ms(x))) / (self.sd * self._half_width(x))
        tail = stdtr(self.degrees, distance)
        if n < EMPIRICAL_FROM:
            return np.asarray(tail)
        below = (self._believed(x) <= log_ms).sum(axis=1)
        share = below / (n + 1)
        return np.where(below == n, np.maximum(share, tail), np.where(below == 0, np.minimum(1 / (n + 1), tail), share))


def kinds_of(features: np.ndarray) -> set[str]:
    """The operator kinds that occur in feature vectors [n, F]."""
    used = np.flatnonzero((features > 0).any(axis=0))
    return {FEATURES[i].partition(".")[0] for i in used}
