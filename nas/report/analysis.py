"""What the trials say together: how sure the front is, where it bends, where it ends, what each choice goes with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from nas import pareto
from nas.report import data
from nas.report.files import StudyFiles

_DRAWS = 4000
# A trend over latency has three coefficients; below this many candidates it would follow each of them.
_TREND_AT_LEAST = 8


def front_probability(files: StudyFiles) -> pd.Series:
    """How likely each candidate is truly on the front, as far as the scores' spread tells.

    Every score is drawn 4,000 times from a normal distribution around what was found, with its own standard deviation
    (the median one where a score has none), and it is counted how often the candidate is on the front. Latencies stay
    as predicted. The seed is fixed: the same study gives the same figures.

    Returns:
        Probabilities by key, fastest first, of the feasible scored candidates; empty where no score has a spread.
    """
    frame = data.points(files)
    frame = frame[frame["standing"].isin([data.FRONT, data.DOMINATED])].sort_values("latency_ms", kind="stable")
    known = frame["quality_sd"].dropna()
    if known.empty or not (known > 0).any():
        return pd.Series(dtype=float)
    spread = frame["quality_sd"].fillna(known.median()).to_numpy()
    noise = np.random.default_rng(0).normal(size=(_DRAWS, len(frame)))
    drawn = frame["quality"].to_numpy() + spread * noise
    return pd.Series(_on_front(frame["latency_ms"].to_numpy(), drawn).mean(axis=0), index=frame["key"].tolist())


def _on_front(latency_ms: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Who is on the front in each draw.

    Args:
        latency_ms: [n], ascending.
        quality: [draws, n].

    Returns:
        bool [draws, n].
    """
    first = np.flatnonzero(np.diff(latency_ms, prepend=-np.inf))  # where each group of equal latencies begins
    group = np.repeat(np.arange(len(first)), np.diff(first, append=len(latency_ms)))
    best = np.maximum.reduceat(quality, first, axis=1)
    faster = np.maximum.accumulate(best, axis=1)
    before = np.concatenate([np.full((len(quality), 1), -np.inf), faster[:, :-1]], axis=1)
    return (quality > before[:, group]) & (quality >= best[:, group])


def knee(files: StudyFiles) -> str:
    """The key of the front member after which more latency buys the least quality; "" where the front does not bend."""
    table = data.front_table(files)
    if len(table) < 3:
        return ""
    at = pareto.knee(np.column_stack([table["latency_ms"], -table["quality"]]))
    return "" if at in (0, len(table) - 1) else str(table["key"].iloc[at])


def relative_quality(files: StudyFiles) -> pd.Series:
    """Quality of each scored candidate less what is usual at its latency.

    What is usual is a parabola in the logarithm of latency, fitted to the scored candidates by least squares.

    Returns:
        In the score's unit, by key; empty where there are fewer than eight candidates.
    """
    frame = data.scored(files)
    if len(frame) < _TREND_AT_LEAST or frame["latency_ms"].nunique() < 4:
        return pd.Series(dtype=float)
    at = np.log(frame["latency_ms"].to_numpy())
    at = (at - at.mean()) / at.std()
    trend = np.polynomial.Polynomial.fit(at, frame["quality"].to_numpy(), 2)
    return pd.Series(frame["quality"].to_numpy() - trend(at), index=frame["key"].tolist())


def by_value(files: StudyFiles, figures: pd.Series) -> pd.DataFrame:
    """A figure of each scored candidate, listed under each value that the candidate chose.

    Args:
        files: the study.
        figures: by key.

    Returns:
        One row per candidate and varied choice that is active in it: choice, value (text), key, y. Choices are in the
        space's order, values in order of size.
    """
    frame = data.scored(files)
    frame = frame[frame["key"].isin(figures.index)]
    parts = []
    for choice in data.varied_choices(files):
        values = frame[f"choice.{choice}"].map(data.tidy)
        rows = pd.DataFrame({"choice": choice, "value": values, "key": frame["key"], "y": frame["key"].map(figures)})
        rows = rows[rows["value"] != ""]
        order = {value: i for i, value in enumerate(data.ordered(set(rows["value"])))}
        parts.append(rows.sort_values("value", key=lambda v, order=order: v.map(order), kind="stable"))
    empty = pd.DataFrame(columns=["choice", "value", "key", "y"])
    return pd.concat(parts, ignore_index=True) if parts else empty


def edges(files: StudyFiles) -> pd.DataFrame:
    """Where the recommended point stands at the end of a choice's list, and whether the front crowds there too.

    Returns:
        Columns choice, value (text), end ("low" or "high"), members (front members with that value), of (front members
        in which the choice is active), crowded (bool: at least half of them, and at least two).
    """
    rows: list[dict[str, Any]] = []
    front = data.front_table(files)
    for edge in files.record["edges"]:
        name, value = str(edge["choice"]), data.tidy(edge["value"])
        column = f"choice.{name}"
        chosen = front[column].map(data.tidy) if column in front else pd.Series(dtype=str)
        active = int((chosen != "").sum())
        members = int((chosen == value).sum())
        end = "low" if str(edge["at"]).startswith("low") else "high"
        crowded = members >= 2 and 2 * members >= active
        rows.append({"choice": name, "value": value, "end": end, "members": members, "of": active, "crowded": crowded})
    return pd.DataFrame(rows, columns=["choice", "value", "end", "members", "of", "crowded"])
