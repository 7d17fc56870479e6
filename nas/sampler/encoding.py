"""How candidates look to the surrogate: coordinates for its distances, and columns for its sums."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

# How far an effect of an ordered choice reaches along its range, where effects simply add up.
_REACH = 0.5
_NODES = 65  # effects of an ordered choice of more values are interpolated between so many


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A column of a row: how many values it has, and whether they have an order."""

    size: int
    ordered: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """Candidates as the surrogate takes them, in float32: there may be 100,000 of them.

    Attributes:
        coordinates: [n, C]; the squared distance between two candidates is a weighted sum over the columns.
        additive: [n, A]; their inner product is the covariance of effects that add up over the choices.
        linear: [n, L]; their inner product is the covariance of effects linear in cost and features.
        sizes: [n, 2]: squared norms of the latter two.
    """

    coordinates: np.ndarray
    additive: np.ndarray
    linear: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, coordinates: np.ndarray, additive: np.ndarray, linear: np.ndarray) -> Inputs:
        """From the three."""
        sizes = np.column_stack([np.square(additive).sum(axis=1), np.square(linear).sum(axis=1)])
        arrays = [np.ascontiguousarray(each, dtype=np.float32) for each in (coordinates, additive, linear, sizes)]
        return cls(**{each.name: array for each, array in zip(fields(cls), arrays, strict=True)})

    def __len__(self) -> int:
        return len(self.coordinates)

    def __getitem__(self, keep: np.ndarray | slice) -> Inputs:
        return Inputs(**{each.name: getattr(self, each.name)[keep] for each in fields(self)})

    def joined(self, other: Inputs) -> Inputs:
        """These and the others."""
        both = {each.name: [getattr(self, each.name), getattr(other, each.name)] for each in fields(self)}
        return Inputs(**{name: np.concatenate(pair) for name, pair in both.items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoding:
    """Turns rows with their cost and features into `Inputs`.

    Attributes:
        groups: int [C]: which relevance each coordinate shares: one per choice with several values, one for the cost,
            and one for all features.
        count: how many such groups there are.
    """

    choices: tuple[Choice, ...]
    mean: np.ndarray
    scale: np.ndarray
    groups: np.ndarray
    count: int

    @classmethod
    def of(cls, choices: Sequence[Choice], cost: np.ndarray, features: np.ndarray | None) -> Encoding:
        """For candidates whose cost [n] and features [n, f] are spread as these are."""
        numbers = _numbers(cost, features)
        spread = numbers.std(axis=0)
        groups: list[int] = []
        count = 0
        for choice in choices:
            if choice.size > 1:
                groups += [count] * (1 if choice.ordered else choice.size)
                count += 1
        groups.append(count)
        groups += [count + 1] * (numbers.shape[1] - 1)
        return cls(
            choices=tuple(choices),
            mean=numbers.mean(axis=0),
            scale=np.where(spread > 1e-12 * np.maximum(np.abs(numbers).max(axis=0), 1e-300), spread, np.inf),
            groups=np.array(groups),
            count=count + (2 if numbers.shape[1] > 1 else 1),
        )

    def inputs(self, rows: np.ndarray, cost: np.ndarray, features: np.ndarray | None) -> Inputs:
        """Of rows [n, choices], their cost [n] and features [n, f]."""
        rows = np.asarray(rows)
        numbers = (_numbers(cost, features) - self.mean) / self.scale
        coordinates, additive = [], []
        active = sum(choice.size > 1 for choice in self.choices)
        for column, choice in zip(rows.T, self.choices, strict=True):
            if choice.size > 1:
                coordinates.append(_coordinates(choice)[column])
                additive.append(_effects(choice)[column] / np.sqrt(active))
        # Two standard deviations of a number count as much as the whole range of a choice.
        spread = numbers / 2.0
        spread[:, 1:] /= np.sqrt(max(spread.shape[1] - 1, 1))
        empty = np.zeros((len(rows), 0))
        return Inputs.of(
            np.concatenate([*coordinates, spread], axis=1),
            np.concatenate([*additive, empty], axis=1),
            numbers / np.sqrt(numbers.shape[1]),
        )


def _numbers(cost: np.ndarray, features: np.ndarray | None) -> np.ndarray:
    """Cost and features side by side, [n, 1 + f]."""
    cost = np.asarray(cost, dtype=np.float64)[:, None]
    return cost if features is None else np.concatenate([cost, np.asarray(features, dtype=np.float64)], axis=1)


@functools.cache
def _coordinates(choice: Choice) -> np.ndarray:
    """[values, C]: ordered values lie evenly on [0, 1]; any two categories lie 1 apart."""
    if choice.ordered:
        return np.linspace(0.0, 1.0, choice.size)[:, None]
    return np.eye(choice.size) / np.sqrt(2.0)


@functools.cache
def _effects(choice: Choice) -> np.ndarray:
    """[values, values]: a square root of the covariance of the effects of a choice's values."""
    if not choice.ordered:
        return np.eye(choice.size)
    place = np.linspace(0.0, 1.0, min(choice.size, _NODES))
    covariance = np.exp(-0.5 * np.square((place[:, None] - place) / _REACH))
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0)))[:, values > 1e-8 * values[-1]]
    return np.column_stack([np.interp(np.linspace(0.0, 1.0, choice.size), place, column) for column in root.T])
