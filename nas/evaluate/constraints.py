"""What a candidate must meet: latency budgets on devices, and limits on parameters, memory and size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nas.cost import bytes_per_element
from nas.device import DeviceSheet
from nas.errors import UsageError
from nas.evaluate.budget import Terms
from nas.latency import LatencyPredictor
from nas.pricing import Prices

_AMOUNT = re.compile(r"^\s*(?P<value>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)\s*$")
# Ascending; what is typed in any case is printed in this one.
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_TYPED = {**_BYTES, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Constraint(Protocol):
    """One thing that every candidate on the front meets."""

    @property
    def name(self) -> str:
        """As a person asked for it: "0.9s@galaxy-s24", "--max-params 400M"."""
        ...

    @property
    def most(self) -> float:
        """The greatest value that is allowed."""
        ...

    def values(self, prices: Prices) -> np.ndarray:
        """[n]: what must not exceed `most`."""
        ...

    def words(self, value: float) -> str:
        """A value in its unit: "1212 ms"."""
        ...

    @property
    def cause(self) -> str:
        """Why a candidate that breaks it is infeasible, without a figure: for counts."""
        ...

    def broken(self, value: float) -> str:
        """By how much a value exceeds `most`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """Predicted milliseconds of n candidates: one denoiser call, one image with its bounds, each [n].

    `probability` is that of being within the budget.
    """

    step_ms: np.ndarray
    ms: np.ndarray
    low_ms: np.ndarray
    high_ms: np.ndarray
    probability: np.ndarray


@dataclass(frozen=True, kw_only=True)
class DeviceBudget:
    """A latency budget on one device: what predicts there, and what an image is charged beside the denoiser.

    It is met where the latency lies within the budget with the confidence of the terms. Several budgets are met each
    by itself: the probability that all of them hold at once may be lower.
    """

    sheet: DeviceSheet
    predictor: LatencyPredictor
    terms: Terms

    @property
    def name(self) -> str:
        """The budget as it is written: "1.4s@iphone"."""
        return str(self.terms.budget)

    @property
    def most(self) -> float:
        """Milliseconds."""
        return self.terms.budget.ms

    def values(self, prices: Prices) -> np.ndarray:
        """[n]: the bound on one image, in ms, that holds with the confidence."""
        return np.asarray(self.terms.total_high_ms(self.predictor.upper(prices.features, self.terms.confidence)))

    def words(self, value: float) -> str:
        """Milliseconds."""
        return f"{value:.0f} ms"

    @property
    def cause(self) -> str:
        """That the bound is over the budget."""
        return f"latency bound over {self.name}"

    def broken(self, value: float) -> str:
        """The bound against the budget."""
        return f"latency bound {value - self.most:.0f} ms over {self.name}"

    def expected_ms(self, prices: Prices) -> np.ndarray:
        """[n]: one image's predicted latency, in ms."""
        return np.asarray(self.terms.total_ms(self.predictor.contributions(prices.features)))

    def latencies(self, prices: Prices) -> Latencies:
        """Everything that is told of a candidate's latency on this device."""
        terms = self.terms
        step_ms, _, _ = self.predictor.predict(prices.features)
        return Latencies(
            step_ms=step_ms,
            ms=np.asarray(terms.total_ms(step_ms)),
            low_ms=np.asarray(terms.total_low_ms(self.predictor.lower(prices.features, terms.confidence))),
            high_ms=self.values(prices),
            probability=self.predictor.probability_within(prices.features, terms.step_budget_ms),
        )


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a network may have, on every device that is budgeted; None for no limit.

    Attributes:
        max_params: parameters.
        max_memory_bytes: weights and the peak of its activations, at a target's precision.
        max_weight_bytes: weights on disk, at a target's precision.
    """

    max_params: int | None = None
    max_memory_bytes: int | None = None
    max_weight_bytes: int | None = None

    @classmethod
    def parse(cls, *, params: str | None = None, memory: str | None = None, size: str | None = None) -> Limits:
        """Reads what is typed: "400M" parameters, "1.2GB" of memory, "800MB" on disk.

        Raises:
            UsageError: a text of another form, or nothing is left by it.
        """
        return cls(
            max_params=_amount("--max-params", params, _COUNTS, "a count such as 400M"),
            max_memory_bytes=_amount("--max-memory", memory, _TYPED, "a size such as 1.2GB"),
            max_weight_bytes=_amount("--max-size", size, _TYPED, "a size such as 800MB"),
        )

    def constraints(self, priced_at: str, precisions: tuple[str, ...]) -> tuple[Limit, ...]:
        """The limits that were set.

        Args:
            priced_at: the precision of the prices that they will be shown.
            precisions: of the targets; a limit holds at each of them.
        """
        asked = {
            "--max-params": self.max_params,
            "--max-memory": self.max_memory_bytes,
            "--max-size": self.max_weight_bytes,
        }
        return tuple(
            Limit(option=option, most=most, priced_at=priced_at, precisions=precisions)
            for option, most in asked.items()
            if most is not None
        )


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The most parameters or bytes that a network may have.

    Attributes:
        option: "--max-params", "--max-memory" or "--max-size".
        most: parameters, or bytes.
        priced_at: the precision of the prices' bytes.
        precisions: at which the limit holds; of bytes the most of them counts.
    """

    option: str
    most: int
    priced_at: str
    precisions: tuple[str, ...]

    @property
    def name(self) -> str:
        """The option as it would be typed."""
        return f"{self.option} {self._text(self.most)}"

    def values(self, prices: Prices) -> np.ndarray:
        """[n]: parameters, or bytes at the precision that takes most."""
        if self.option == "--max-params":
            return prices.params
        return np.max([self._bytes_at(prices, precision) for precision in self.precisions], axis=0)

    def words(self, value: float) -> str:
        """With its unit: 7.2M parameters, 812MB."""
        return self._text(value) + (" parameters" if self.option == "--max-params" else "")

    @property
    def cause(self) -> str:
        """That the value is over the limit."""
        return f"over {self.name}"

    def broken(self, value: float) -> str:
        """The value against the limit."""
        return f"{self.words(value)}, over {self.name}"

    def _bytes_at(self, prices: Prices, precision: str) -> np.ndarray:
        weight, activation = bytes_per_element(precision)
        weights = prices.params * weight
        if self.option == "--max-size":
            return weights
        return weights + prices.peak_activation_bytes // bytes_per_element(self.priced_at)[1] * activation

    def _text(self, value: float) -> str:
        units = _COUNTS if self.option == "--max-params" else _BYTES
        unit = next((unit for unit, size in reversed(units.items()) if size <= value), next(iter(units)))
        return f"{value / units[unit]:.4g}{unit}"


def _amount(option: str, text: str | None, units: dict[str, int], form: str) -> int | None:
    """A whole number of what `units` scale; None where nothing was asked for.

    Raises:
        UsageError: another form, or less than one.
    """
    if text is None:
        return None
    match, sizes = _AMOUNT.match(text), {unit.upper(): size for unit, size in units.items()}
    if match is None or match["unit"].upper() not in sizes:
        raise UsageError(f"{option} {text!r} is not {form} (units: {', '.join(filter(None, units))})")
    found = round(float(match["value"]) * sizes[match["unit"].upper()])
    if found < 1:
        raise UsageError(f"{option} {text!r} leaves nothing: it must be at least 1")
    return found
