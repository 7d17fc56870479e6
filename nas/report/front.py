"""The main figure: latency against quality, with the budget, the references and what was over the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nas.page import Figure, escape
from nas.page.numbers import decibels, exact, known, milliseconds, percent, scaled, significant
from nas.page.plots import axis, layout, rings
from nas.report import analysis, data
from nas.report.files import DECIBELS, StudyFiles


def scored(value: float | None, spread: float | None, unit: str) -> str:
    """A score with its unit; of dB two decimals."""
    if unit == DECIBELS:
        return f"{decibels(value, spread)} {unit}"
    around = f" ± {significant(spread)}" if known(spread) and spread else ""
    return f"{significant(value, 4)}{around} {unit}"


def hover(row: Mapping[str, Any], name: str = "", unit: str = DECIBELS) -> str:
    """A point in words: figures, then the whole configuration; why there is no score, where that is so."""
    lines = [f"<b>{escape(name or row['key'])}</b>" + (f" {escape(row['key'])}" if name else "")]
    lines.append(
        f"{milliseconds(row['latency_ms'])}"
        f" [{milliseconds(row['latency_low_ms'])}, {milliseconds(row['latency_high_ms'])}]"
    )
    if known(row.get("quality")):
        lines.append(f"quality {scored(row['quality'], row.get('quality_sd'), unit)}")
    elif row.get("reason"):
        lines.append(escape(str(row["reason"])))
    lines.append(f"within the budget: {percent(row['meets_budget_probability'])}")
    if known(row.get("published_ms")):
        lines.append(
            f"published: {milliseconds(row['published_ms'])} ({milliseconds(row['published_step_ms'])} a call)"
        )
    lines.append(f"{scaled(row['params'])} parameters, {scaled(row['macs'])} MACs a call")
    choices = row.get("choices") or data.choices_of(row)
    lines += [f"{escape(k)} {escape(v)}" for k, v in data.describe(choices)]
    return "<br>".join(lines)


def elsewhere(files: StudyFiles, row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A row's latency on the device of each further budget, with its bounds: (what, figure)."""
    return [
        (
            f"latency on {device}",
            f"{milliseconds(row[f'latency_ms@{device}'])}, {milliseconds(row[f'latency_low_ms@{device}'])} to"
            f" {milliseconds(row[f'latency_high_ms@{device}'])}",
        )
        for device in files.elsewhere
    ]


def front(files: StudyFiles) -> Figure:
    """Latency against quality, with the budget; over it and without quality: ticks along the bottom."""
    points, references = data.points(files), data.references(files)
    budget = float(files.record["budget"]["ms"])
    bounds = ["latency_ms", "latency_low_ms", "latency_high_ms"]
    low, high = _x_range(pd.concat([f.loc[f["quality"].notna(), bounds] for f in (points, references)]), budget)
    layers = _layers(files, points, high)
    legend = [
        {"name": layer.name, "color": layer.color, "shape": layer.shape, "traces": [i]}
        for i, layer in enumerate(layers)
        if layer.name and layer.trace["x"]
    ]
    what = "denoiser call" if files.record["budget"]["per_step"] else "image"
    return {
        "data": [layer.trace for layer in layers],
        "layout": layout(
            500,
            xaxis=axis(f"predicted latency of one {what} (ms)", range=[low, high], anchor="y2"),
            yaxis=axis(_quality_axis(files), domain=[0.12, 1.0]),
            yaxis2={"domain": [0.0, 0.07], "range": [-1, 1], "visible": False, "fixedrange": True},
            shapes=[*_budget_shapes(budget, high), *rings()],
            annotations=[_budget_note(budget)],
            hovermode="closest",
            # Shapes that the page moves: the slider's budget, and the rings around what it chose.
            meta={
                "legend": legend[::-1],
                "cursor": 2,
                "rings": [3, 4],
                "narrow": {"yaxis.title.text": f"quality ({files.unit})", "margin.l": 48},
            },
        ),
    }


def _quality_axis(files: StudyFiles) -> str:
    what = "fidelity to the teacher" if files.unit == DECIBELS else f"score of {files.record['proxy'].get('proxy')}"
    return f"quality: {what} ({files.unit})"


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A trace and its place in the legend; without a name it has none."""

    trace: dict[str, Any]
    name: str = ""
    color: str = ""
    shape: str = "dot"


def _layers(files: StudyFiles, points: pd.DataFrame, high: float) -> list[_Layer]:
    """What is drawn, from the back to the front."""
    table, references = data.front_table(files), data.references(files)
    references = references[references["quality"].notna()]
    unscored, stopped, untrainable, over, dominated = (
        points[points["standing"] == standing]
        for standing in (data.UNPROXIED, data.STOPPED, data.UNTRAINABLE, data.OVER, data.DOMINATED)
    )
    unit = files.unit
    farther = int((unscored["latency_ms"] > high).sum())
    beyond = f" ({farther} of {len(unscored)} are farther right)" if farther else ""
    cross = {"color": "@faint", "size": 9, "symbol": "x-thin", "line": {"width": 2, "color": "@muted"}}
    limit = "a budget or limit" if files.limited else "the budget"
    square = {"color": "@reference", "size": 18, "symbol": "square-open", "line": {"width": 2.5}}
    bend = {"color": "@ink", "size": 15, "symbol": "diamond-open", "line": {"width": 1.8}}
    names = references["name"].tolist()
    early = [
        _Layer(trace=_ticks(frame, unit, colour), name=words, color=colour, shape="tick")
        for frame, words, colour in (
            (stopped, "stopped early: would not have reached the front", "@accent"),
            (untrainable, "infeasible: could not be trained", "@reference"),
        )
        if len(frame)
    ]
    return [
        *early,
        _Layer(trace=_ticks(unscored, unit), name=f"over {limit}, not scored{beyond}", color="@muted", shape="tick"),
        _Layer(
            trace=_markers(over, cross, unit),
            name=f"over {limit}, scored all the same",
            color="@muted",
            shape="cross",
        ),
        _Layer(
            trace=_markers(dominated, {"color": "@faint", "size": 8, "opacity": 0.75}, unit),
            name="another point is better in both",
            color="@faint",
        ),
        _Layer(trace=_staircase(table)),
        _Layer(
            trace=_markers(references, square, unit, bars="@reference", names=names),
            name="published reference",
            color="@reference",
            shape="ring",
        ),
        _Layer(
            trace=_markers(table, {"color": "@accent", "size": 11}, unit, bars="@accent"),
            name="front, with latency interval and quality spread",
            color="@accent",
        ),
        _Layer(
            trace=_markers(table[(table["key"] == analysis.knee(files)) & ~table["recommended"]], bend, unit),
            name="knee",
            color="@ink",
            shape="diamond",
        ),
        _Layer(
            trace=_markers(table[table["recommended"]], {"color": "@pick", "size": 17, "symbol": "star"}, unit),
            name="recommended",
            color="@pick",
            shape="star",
        ),
    ]


def _staircase(table: pd.DataFrame) -> dict[str, Any]:
    """The best quality to be had at each latency."""
    return {
        "x": table["latency_ms"].tolist(),
        "y": table["quality"].tolist(),
        "mode": "lines",
        "hoverinfo": "skip",
        "line": {"shape": "hv", "color": "@accent", "width": 1.5, "dash": "dot"},
        "opacity": 0.6,
    }


def _x_range(shown: pd.DataFrame, budget: float) -> tuple[float, float]:
    """From the fastest bound to a little beyond the budget and the slowest scored bound."""
    if shown.empty:
        return 0.0, 1.5 * budget
    low = min(float(shown["latency_low_ms"].min()), budget)
    high = max(float(shown["latency_ms"].max()), min(float(shown["latency_high_ms"].max()), 2.0 * budget), budget)
    pad = 0.06 * (high - low)
    return max(0.0, low - pad), high + pad


def _markers(
    frame: pd.DataFrame, marker: dict[str, Any], unit: str, bars: str = "", names: list[str] | None = None
) -> dict[str, Any]:
    rows = frame.to_dict("records")
    trace: dict[str, Any] = {
        "x": frame["latency_ms"].tolist(),
        "y": frame["quality"].tolist(),
        "ids": frame["key"].tolist(),
        "mode": "markers",
        "marker": marker,
        "text": [hover(r, n, unit) for r, n in zip(rows, names or [""] * len(rows), strict=True)],
        "hovertemplate": "%{text}<extra></extra>",
    }
    if bars:
        trace["error_x"] = {
            "type": "data",
            "symmetric": False,
            "color": bars,
            "thickness": 1.2,
            "width": 3,
            "array": (frame["latency_high_ms"] - frame["latency_ms"]).tolist(),
            "arrayminus": (frame["latency_ms"] - frame["latency_low_ms"]).tolist(),
        }
        trace["error_y"] = {
            "type": "data",
            "color": bars,
            "thickness": 1.2,
            "width": 3,
            "array": frame["quality_sd"].fillna(0.0).tolist(),
        }
    return trace


def _ticks(frame: pd.DataFrame, unit: str, color: str = "@muted") -> dict[str, Any]:
    trace = _markers(
        frame, {"symbol": "line-ns", "size": 16, "color": color, "line": {"width": 1.5, "color": color}}, unit
    )
    return {**trace, "y": [0.0] * len(frame), "yaxis": "y2"}


def _budget_shapes(budget: float, high: float) -> list[dict[str, Any]]:
    shared = {"xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    return [
        {**shared, "type": "rect", "x0": budget, "x1": 100 * high, "fillcolor": "@over", "line": {"width": 0}},
        {**shared, "type": "line", "x0": budget, "x1": budget, "line": {"color": "@ink", "width": 1.5, "dash": "dash"}},
        {**shared, "type": "line", "x0": budget, "x1": budget, "line": {"color": "@pick", "width": 1.5}},
    ]


def _budget_note(budget: float) -> dict[str, Any]:
    return {
        "x": budget,
        "xref": "x",
        "xanchor": "right",
        "y": 1,
        "yref": "paper",
        "yanchor": "top",
        "showarrow": False,
        "text": f"budget {exact(budget)} ",
        "font": {"color": "@ink", "size": 12},
        "bgcolor": "@bg",
    }
