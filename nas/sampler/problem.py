"""Problem: what is known about every candidate before any is tried, as plain arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from nas.errors import UsageError
from nas.sampler.encoding import Choice, Encoding, Inputs

More = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray | None]]
Price = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]

_MISSING = object()


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """Rows with what is known of them; element i of each belongs to row i.

    Attributes:
        rows: int [n, choices].
        keys: int64 [n], as of `Problem.row_keys`.
        cost: float64 [n].
        inputs: of the surrogate.
    """

    rows: np.ndarray
    keys: np.ndarray
    cost: np.ndarray
    inputs: Inputs

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, keep: np.ndarray) -> Candidates:
        return Candidates(rows=self.rows[keep], keys=self.keys[keep], cost=self.cost[keep], inputs=self.inputs[keep])

    def joined(self, other: Candidates) -> Candidates:
        """These and the others."""
        return Candidates(
            rows=np.concatenate([self.rows, other.rows]),
            keys=np.concatenate([self.keys, other.keys]),
            cost=np.concatenate([self.cost, other.cost]),
            inputs=self.inputs.joined(other.inputs),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Two objectives over discrete choices, of which one is known exactly.

    A row holds one index per choice: into the categories, or how many steps above the lowest number.

    Attributes:
        distributions: the choices by name, in the order of a row's columns: categories, integers, or floats with a
            step.
        rows: int [n, choices]: the candidates that may be proposed, each once.
        cost: float [n]: the known objective, less is better.
        features: float [n, f]: more that is known of each candidate and may bear on its quality; None for nothing.
        references: rows to try first; those that are not among `rows` are left out.
        more: rows near given ones that may be proposed too, as (rows, cost, features), where `rows` are only a part of
            them; None where `rows` are all. It needs `price` too.
        price: (cost, features) of any rows, by which trials outside `rows` teach the surrogate; None: they do not.

    Raises:
        UsageError: a distribution that is not discrete, arrays that do not belong together, or a number that is not
            finite.
    """

    distributions: Mapping[str, BaseDistribution]
    rows: np.ndarray
    cost: np.ndarray
    features: np.ndarray | None = None
    references: tuple[tuple[int, ...], ...] = ()
    more: More | None = None
    price: Price | None = None

    def __post_init__(self) -> None:
        sizes = np.array([_size(name, each) for name, each in self.distributions.items()], dtype=np.int64)
        rows = np.asarray(self.rows)
        if rows.ndim != 2 or rows.shape[1] != len(sizes) or not len(rows) or rows.dtype.kind not in "iu":
            raise UsageError(
                f"rows must be integers [n, {len(sizes)}], one column per choice and n at least 1,"
                f" got {rows.dtype} {list(rows.shape)}"
            )
        if (rows < 0).any() or (rows >= sizes).any():
            name = list(self.distributions)[int(np.argmax(((rows < 0) | (rows >= sizes)).any(axis=0)))]
            raise UsageError(f"a row's index of {name} is outside its distribution {self.distributions[name]}")
        for what, array in (("cost", self.cost), ("features", self.features)):
            if array is not None and (len(array) != len(rows) or not np.isfinite(array).all()):
                raise UsageError(f"{what} must hold one finite number or line for each of the {len(rows)} rows")
        if np.ndim(self.cost) != 1 or (self.features is not None and np.ndim(self.features) != 2):
            raise UsageError("cost must be an array [n], and features one [n, f]")
        if self.more is not None and self.price is None:
            raise UsageError(
                "a problem with `more` needs `price` too: what is found beyond `rows` must be priced again"
            )

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Each column's number of values, and whether they have an order."""
        return tuple(
            Choice(size=_size(name, each), ordered=not isinstance(each, CategoricalDistribution))
            for name, each in self.distributions.items()
        )

    @cached_property
    def encoding(self) -> Encoding:
        """How rows look to the surrogate."""
        return Encoding.of(self.choices, self.cost, self.features)

    @cached_property
    def pool(self) -> Candidates:
        """`rows` as candidates."""
        return self.candidates(self.rows, self.cost, self.features)

    def candidates(self, rows: np.ndarray, cost: np.ndarray, features: np.ndarray | None) -> Candidates:
        """Rows [n, choices] with their cost [n] and features [n, f]."""
        return Candidates(
            rows=np.asarray(rows, dtype=np.int64).reshape(-1, len(self.choices)),
            keys=self.row_keys(rows),
            cost=np.asarray(cost, dtype=np.float64),
            inputs=self.encoding.inputs(rows, cost, features),
        )

    @cached_property
    def _place(self) -> dict[int, int]:
        return {key: i for i, key in enumerate(self.pool.keys.tolist())}

    def row_keys(self, rows: np.ndarray) -> np.ndarray:
        """One number per row [n, choices]; rows that differ have different ones (but for one chance in 2^64)."""
        factors = np.random.default_rng(0).integers(1, 2**62, size=len(self.choices), dtype=np.int64) * 2 + 1
        return np.asarray(rows, dtype=np.int64).reshape(-1, len(self.choices)) @ factors

    def find(self, row: np.ndarray) -> int | None:
        """Where a row [choices] is in `rows`, or None."""
        return self._place.get(int(self.row_keys(row)[0]))

    def lists(self, keys: np.ndarray) -> np.ndarray:
        """Which of these are keys of `rows`, bool [n]."""
        return np.array([key in self._place for key in keys.tolist()], dtype=bool)

    def known(self, rows: np.ndarray) -> tuple[Candidates, np.ndarray]:
        """Of rows [n, choices], those whose cost is known, and which those are: bool [n]."""
        places = np.array([self._place.get(key, -1) for key in self.row_keys(rows).tolist()], dtype=np.int64)
        found = self.pool[np.maximum(places, 0)]
        outside = places < 0
        if outside.any() and self.price is not None:
            priced = self.candidates(rows[outside], *self.price(rows[outside]))
            found = found[~outside].joined(priced)[np.argsort(np.argsort(outside, kind="stable"), kind="stable")]
            outside[:] = False
        return found[~outside] if outside.any() else found, ~outside

    def params(self, row: np.ndarray) -> dict[str, Any]:
        """A row as Optuna parameters."""
        return {
            name: _value(distribution, int(index))
            for (name, distribution), index in zip(self.distributions.items(), row, strict=True)
        }

    def row(self, params: Mapping[str, Any]) -> np.ndarray | None:
        """Optuna parameters as a row, int64 [choices]; None where one is missing or is no value of its distribution."""
        row = [index(params.get(name, _MISSING)) for name, index in self._indices.items()]
        return None if None in row else np.array(row, dtype=np.int64)

    @cached_property
    def _indices(self) -> dict[str, Callable[[Any], int | None]]:
        """How each choice's value becomes its index."""
        return {name: _indexer(name, each) for name, each in self.distributions.items()}


def among(keys: np.ndarray, few: np.ndarray) -> np.ndarray:
    """Which keys [n] are among a few others, bool [n]; it takes a tenth of the time of `np.isin`."""
    if not len(few):
        return np.zeros(len(keys), dtype=bool)
    few = np.sort(few)
    found: np.ndarray = few[np.minimum(np.searchsorted(few, keys), len(few) - 1)] == keys
    return found


def _size(name: str, distribution: BaseDistribution) -> int:
    """How many values a distribution has."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    low, high, step = _steps(distribution)
    if step is None or getattr(distribution, "log", False):
        raise UsageError(f"choice {name} must be categories, or numbers with an even step, got {distribution}")
    return round((high - low) / step) + 1


def _value(distribution: BaseDistribution, index: int) -> Any:
    low, _, step = _steps(distribution)
    value = distribution.to_external_repr(low + index * (step or 1))
    return float(value) if isinstance(distribution, FloatDistribution) else value


def _indexer(name: str, distribution: BaseDistribution) -> Callable[[Any], int | None]:
    """A function from a value to its index, or None where it is no value of the distribution."""
    if isinstance(distribution, CategoricalDistribution):
        places = {choice: i for i, choice in reversed(list(enumerate(distribution.choices)))}
        return places.get
    low, _, step = _steps(distribution)
    size = _size(name, distribution)

    def index(value: Any) -> int | None:
        if not isinstance(value, int | float | np.number):
            return None
        steps = (value - low) / (step or 1)
        return round(steps) if -0.5 < steps < size - 0.5 and abs(steps - round(steps)) < 1e-6 else None

    return index


def _steps(distribution: BaseDistribution) -> tuple[float, float, float | None]:
    """Lowest and highest value in Optuna's own numbers, and what lies between two values; None for anything."""
    if isinstance(distribution, CategoricalDistribution):
        return 0, len(distribution.choices) - 1, 1
    if isinstance(distribution, IntDistribution | FloatDistribution):
        return distribution.low, distribution.high, distribution.step
    return 0, 0, None
