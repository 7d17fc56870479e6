"""Discrete problems of two objectives whose exact front is known, because every candidate is enumerated.

Of each, one objective is a known function of the choices (the cost, minimised) and the other is bought (the quality,
maximised; where the literature minimises it, its negative). Three are subspaces of the search spaces: of one of these
the quality is fitted to reports/proxy/truth.csv, of the others it is planted. The rest are standard test problems on
grids.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from nas.device import find_target
from nas.latency import load_predictor
from nas.pricing import Pricer
from nas.sampler import Problem
from nas.space import SearchSpace, load_space

ROOT = Path(__file__).resolve().parent.parent
TRUTH = ROOT / "reports" / "proxy" / "truth.csv"


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A problem with the answer.

    Attributes:
        quality: [n] of `problem.rows`, higher is better, without noise.
        noise_sd: of one evaluation.
        canonical: rows [n, choices] as the space writes them, where several rows are one candidate.
        known: which objective is taken as known, in words.
        fit: what is known of a fitted quality; empty where it is a formula.
    """

    problem: Problem
    quality: np.ndarray
    noise_sd: float
    known: str
    fit: Mapping[str, float]
    canonical: Callable[[np.ndarray], np.ndarray] = np.asarray


# --------------------------------------------------------------------------------------------------- our own spaces


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sub:
    """A space in which every choice but those of `columns` stands as in `base`."""

    space: SearchSpace
    base: np.ndarray
    columns: list[int]

    def whole(self, rows: np.ndarray) -> np.ndarray:
        """Canonical rows of the space from rows of the free choices."""
        whole = np.tile(self.base, (len(rows), 1))
        whole[:, self.columns] = rows
        return self.space.canonical(whole)

    def canonical(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the free choices as the space writes them."""
        return self.whole(rows)[:, self.columns]


def _distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    return {
        choice.name: IntDistribution(0, len(choice.values) - 1)
        if choice.ordinal
        else CategoricalDistribution(list(choice.values))
        for choice in space.choices
    }


def _priced(space: SearchSpace, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of one call on an iPhone, and the logarithms of parameters and MACs [n, 2]."""
    sheet = find_target("iphone")
    prices = Pricer(space, sheet.target.precision).rows(rows)
    milliseconds = load_predictor(sheet.slug).predict(prices.features)[0]
    return np.asarray(milliseconds), np.log2(np.column_stack([prices.params, prices.macs]).astype(float))


def _own(name: str, free: tuple[str, ...], reference: str) -> tuple[_Sub, Problem]:
    space = load_space(name)
    base = np.array(space.reference(reference).row)
    sub = _Sub(space=space, base=base, columns=[space.column[each] for each in free])
    counts = [len(space.choice(each).values) for each in free]
    rows = sub.whole(np.array(list(itertools.product(*map(range, counts)))))
    rows = np.unique(space.canonical(rows[space.allowed(rows)])[:, sub.columns], axis=0)
    milliseconds, features = _priced(space, sub.whole(rows))
    distributions = _distributions(space)
    problem = Problem(
        distributions={each: distributions[each] for each in free}, rows=rows, cost=milliseconds, features=features
    )
    return sub, problem


def _coded(space: SearchSpace, rows: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Choices and features as standardisable columns: an ordinal as its index, the others one column per value."""
    columns = []
    for choice, column in zip(space.choices, rows.T, strict=True):
        columns += [column] if choice.ordinal else [column == value for value in range(len(choice.values))]
    return np.column_stack([*columns, *features.T]).astype(float)


def _fitted_to_truth(space: SearchSpace, rows: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Quality in dB of rows, by kernel ridge regression on the long runs; its width and penalty by leave-one-out."""
    with TRUTH.open() as file:
        table = [row for row in csv.DictReader(file) if (row["space"], row["space_hash"]) == (space.name, space.hash)]
    digest = max({row["digest"] for row in table}, key=lambda each: sum(row["digest"] == each for row in table))
    table = [row for row in table if row["digest"] == digest]
    scores: dict[str, list[float]] = {}
    for row in table:
        scores.setdefault(row["choices"], []).append(float(row["quality_db"]))
    trained = np.array([space.candidate(**json.loads(choices)).row for choices in scores])
    y = np.array([np.mean(each) for each in scores.values()])
    twice = [np.var(each, ddof=1) for each in scores.values() if len(each) > 1]
    x = _coded(space, trained, _priced(space, trained)[1])
    mean, scale = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1.0)

    def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.maximum(np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T, 0.0)

    z = (x - mean) / scale
    distance = squared(z, z) / z.shape[1]
    choices = {}
    for width, penalty in itertools.product((1.0, 2.0, 4.0, 8.0), (0.01, 0.03, 0.1, 0.3)):
        inverse = np.linalg.inv(np.exp(-0.5 * distance / width**2) + penalty * np.eye(len(y)))
        missed = (inverse @ (y - y.mean())) / np.diag(inverse)
        choices[width, penalty] = float(np.square(missed).mean())
    width, penalty = min(choices, key=lambda each: choices[each])
    weights = np.linalg.solve(np.exp(-0.5 * distance / width**2) + penalty * np.eye(len(y)), y - y.mean())
    new = (_coded(space, rows, features) - mean) / scale
    quality = y.mean() + np.exp(-0.5 * squared(new, z) / z.shape[1] / width**2) @ weights
    return quality, {
        "candidates": len(y),
        "explained_left_out": 1 - choices[width, penalty] / float(y.var()),
        "seed_sd_db": float(np.sqrt(np.mean(twice))),
    }


def snapgen_unet() -> Case:
    """Widths, depths, convolutions and attention of snapgen_unet; quality fitted to the long runs, with their noise."""
    free = ("width_0", "width_1", "width_2", "depth_1", "depth_2", "conv_2", "attention")
    sub, problem = _own("snapgen_unet", free, "snapgen")
    quality, fit = _fitted_to_truth(sub.space, sub.whole(problem.rows), np.asarray(problem.features))
    return Case(
        problem=problem,
        quality=quality,
        noise_sd=fit["seed_sd_db"],
        known="iPhone latency",
        fit=fit,
        canonical=sub.canonical,
    )


def sd_unet() -> Case:
    """Widths, depths and the middle of sd_unet; a planted quality."""
    free = ("width_0", "width_1", "width_2", "width_3", "depth_0", "depth_1", "depth_2", "mid")
    return _of_planted("sd_unet", free, "bk-sdm-base", 5)


def dit() -> Case:
    """Most of dit, of one or three stages; a planted quality."""
    free = ("patch_size", "width", "kv_sharing", "ffn_ratio", "attention", "stages", "depth", "down_depth", "up_depth")
    return _of_planted("dit", free, "pixart-sigma-xl", 7)


def _of_planted(name: str, free: tuple[str, ...], reference: str, seed: int) -> Case:
    """Quality from log parameters, each choice's own effect, and effects of pairs of choices; a little noise."""
    sub, problem = _own(name, free, reference)
    planted = _planted(problem.rows, 0.25, np.random.default_rng(seed))
    quality = 0.5 * np.asarray(problem.features)[:, 0] + planted
    return Case(
        problem=problem,
        quality=quality,
        noise_sd=0.05 * float(quality.std()),
        known="iPhone latency",
        fit={},
        canonical=sub.canonical,
    )


def _planted(rows: np.ndarray, size: float, generator: np.random.Generator) -> np.ndarray:
    """Random effects of every value and of every pair of values of neighbouring columns, [n]."""
    counts = rows.max(axis=0) + 1
    total = np.zeros(len(rows))
    for i, count in enumerate(counts):
        total += size * generator.normal(size=count)[rows[:, i]]
        j = (i + 1) % len(counts)
        total += 0.5 * size * generator.normal(size=(count, counts[j]))[rows[:, i], rows[:, j]]
    return total


# ---------------------------------------------------------------------------------------------------- test problems


def _grid(counts: tuple[int, ...]) -> np.ndarray:
    return np.array(list(itertools.product(*map(range, counts))))


def _ordinals(counts: tuple[int, ...]) -> dict[str, BaseDistribution]:
    return {f"x{i}": IntDistribution(0, count - 1) for i, count in enumerate(counts)}


def _formula(counts: tuple[int, ...], cost: np.ndarray, quality: np.ndarray, known: str) -> Case:
    problem = Problem(distributions=_ordinals(counts), rows=_grid(counts), cost=cost)
    return Case(problem=problem, quality=quality, noise_sd=0.0, known=known, fit={})


def zdt3() -> Case:
    """ZDT3 (Zitzler et al. 2000) with 5 variables on a grid: a front in pieces."""
    counts = (21, 5, 5, 5, 5)
    x = _grid(counts) / (np.array(counts) - 1)
    g = 1 + 9 * x[:, 1:].mean(axis=1)
    f2 = g * (1 - np.sqrt(x[:, 0] / g) - x[:, 0] / g * np.sin(10 * np.pi * x[:, 0]))
    return _formula(counts, x[:, 0], -f2, "f1")


def dtlz2() -> Case:
    """DTLZ2 (Deb et al. 2002) with 2 objectives and 5 variables on a grid: concave front, cost of all variables."""
    counts = (17, 5, 5, 5, 5)
    x = _grid(counts) / (np.array(counts) - 1)
    g = np.square(x[:, 1:] - 0.5).sum(axis=1)
    angle = 0.5 * np.pi * x[:, 0]
    return _formula(counts, (1 + g) * np.cos(angle), -(1 + g) * np.sin(angle), "f1")


def truss() -> Case:
    """Four-bar truss (RE2-4-1, Tanabe & Ishibuchi 2020) with 4 areas on a grid; volume against displacement."""
    counts = (10, 10, 10, 10)
    u, root = _grid(counts) / (np.array(counts) - 1), math.sqrt(2)
    low = np.array([1.0, root, root, 1.0])
    a = low + u * (3.0 - low)
    volume = 200 * (2 * a[:, 0] + root * a[:, 1] + np.sqrt(a[:, 2]) + a[:, 3])
    displacement = 0.01 * (2 / a[:, 0] + 2 * root / a[:, 1] - 2 * root / a[:, 2] + 2 / a[:, 3])
    return _formula(counts, volume, -displacement, "volume")


def knapsack() -> Case:
    """Quadratic knapsack (Gallo et al. 1980): 13 items, profits of each and of a quarter of the pairs."""
    counts, generator = (2,) * 13, np.random.default_rng(11)
    rows = _grid(counts)
    weights = generator.integers(1, 51, size=13)
    pairs = np.triu(generator.integers(1, 101, size=(13, 13)) * (generator.random((13, 13)) < 0.25), 1)
    alone = generator.integers(1, 101, size=13)
    profit = rows @ alone + ((rows @ pairs) * rows).sum(axis=1)
    return _formula(counts, (rows @ weights).astype(float), profit.astype(float), "weight")


def landscape() -> Case:
    """NK landscape (Kauffman 1993) of 8 categories of 3 values, each with 2 others; cost adds up over the choices."""
    count, values, generator = 8, 3, np.random.default_rng(13)
    rows = _grid((values,) * count)
    prices = generator.random((count, values))
    tables = generator.random((count, values, values, values))
    cost, quality = np.zeros(len(rows)), np.zeros(len(rows))
    for i in range(count):
        j, k = generator.choice([each for each in range(count) if each != i], size=2, replace=False)
        cost += prices[i, rows[:, i]]
        quality += tables[i, rows[:, i], rows[:, j], rows[:, k]]
    distributions = {f"x{i}": CategoricalDistribution(list(range(values))) for i in range(count)}
    problem = Problem(distributions=distributions, rows=rows, cost=cost)
    return Case(problem=problem, quality=quality / count, noise_sd=0.0, known="sum of prices", fit={})


CASES: dict[str, Callable[[], Case]] = {
    each.__name__: each for each in (snapgen_unet, sd_unet, dit, zdt3, dtlz2, truss, knapsack, landscape)
}
