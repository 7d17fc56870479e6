"""The report's figures, from its data frames to what plotly.js takes (see `nas.page` for colours and legends)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from nas.page import Figure, escape
from nas.page.numbers import duration, milliseconds, percent, significant
from nas.page.plots import axis, layout
from nas.report import data
from nas.report.files import StudyFiles

_STAGE_COLOURS = {
    "down_blocks.0": "@down0",
    "down_blocks.1": "@down1",
    "down_blocks.2": "@down2",
    "mid_block": "@mid",
    "up_blocks.0": "@up2",
    "up_blocks.1": "@up1",
    "up_blocks.2": "@up0",
}
_SMALL_STAGES = ("conv_in", "time_embedding", "head")


def parts(files: StudyFiles, by: str) -> Figure:
    """Stacked bars: where one denoiser call's predicted time goes, one bar per front member, fastest at the top."""
    table = data.latency_parts(files, by)
    names = [_bar_name(files, key) for key in table.index]
    total = table.sum(axis=1)
    traces, legend = [], []
    for i, part in enumerate(table.columns):
        colour = _colour(str(part), by, i)
        share = table[part] / total.where(total > 0, 1.0)
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "y": names,
                "x": table[part].tolist(),
                "ids": list(table.index),
                "marker": {"color": colour, "line": {"width": 0.5, "color": "@bg"}},
                "text": [f"{significant(ms)} ms, {percent(s)}" for ms, s in zip(table[part], share, strict=True)],
                "textposition": "none",
                "hovertemplate": f"{escape(part)}: %{{text}}<extra>%{{y}}</extra>",
            }
        )
        legend.append({"name": str(part), "color": colour, "shape": "square", "traces": [i]})
    budget = float(files.record["budget"]["step_budget_ms"])
    line = {
        "type": "line",
        "xref": "x",
        "yref": "paper",
        "x0": budget,
        "x1": budget,
        "y0": 0,
        "y1": 1,
        "line": {"color": "@ink", "width": 1.5, "dash": "dash"},
    }
    # The line's words stand on its left, above the bars, where they cannot run out of the figure.
    note = {
        "x": budget,
        "xref": "x",
        "xanchor": "right",
        "y": 1,
        "yref": "paper",
        "yanchor": "bottom",
        "showarrow": False,
        "text": f"budget of one call {milliseconds(budget)}",
        "font": {"size": 12},
    }
    farthest = max(float(total.max()) if len(total) else 0.0, budget)
    return {
        "data": traces,
        "layout": layout(
            110 + 34 * max(len(table), 1),
            barmode="stack",
            bargap=0.3,
            margin={"l": 90, "r": 16, "t": 30, "b": 52},
            xaxis=axis("predicted latency of one denoiser call (ms)", range=[0, 1.03 * farthest]),
            yaxis=axis(autorange="reversed", showgrid=False, ticksuffix=" "),
            shapes=[line],
            annotations=[note],
            meta={"legend": legend, "narrow": {"xaxis.title.text": "one denoiser call (ms)", "margin.l": 80}},
        ),
    }


def _bar_name(files: StudyFiles, key: str) -> str:
    return f"{key} ★" if key == files.recommended else key


def _colour(part: str, by: str, i: int) -> str:
    """Stages in the order of the paths: blue going down, grey at the bottom, orange coming up. Kinds by Okabe-Ito."""
    if by == "stage":
        if part in _STAGE_COLOURS:
            return _STAGE_COLOURS[part]
        if part in _SMALL_STAGES:
            return "@edge"
    return f"@k{i % 8}"


def choices(files: StudyFiles) -> Figure:
    """Parallel coordinates lying down: an axis per row, a line per candidate, the front in colour by quality."""
    lines = data.choice_lines(files)
    axes = list(dict.fromkeys(lines["axis"]))
    depth = {name: i for i, name in enumerate(axes)}
    # The recommended one last, on top of the others.
    front_keys = sorted(data.front_table(files)["key"], key=lambda key: key == files.recommended)
    others = lines[~lines["key"].isin(front_keys)]
    traces: list[dict[str, Any]] = [_bundle(others, depth)]
    for i, key in enumerate(front_keys):
        line = lines[lines["key"] == key]
        colour, width = ("@pick", 3.5) if key == files.recommended else ("@accent", 1.75)
        traces.append(
            {
                "x": line["position"].tolist(),
                "y": [depth[a] for a in line["axis"]],
                "mode": "lines+markers",
                "line": {"color": colour, "width": width, "shape": "linear"},
                "marker": {"color": colour, "size": 5},
                "opacity": 1.0 if key == files.recommended else 0.35 + 0.5 * (i + 1) / len(front_keys),
                "meta": {"key": key},
                "text": [
                    f"<b>{key}</b><br>{_axis_name(a, files.unit)} {v}"
                    for a, v in zip(line["axis"], line["value"], strict=True)
                ],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    chosen = [i + 1 for i, key in enumerate(front_keys) if key == files.recommended]
    rest = [i + 1 for i in range(len(front_keys)) if i + 1 not in chosen]
    legend = [
        {"name": "recommended", "color": "@pick", "shape": "line", "traces": chosen},
        {"name": "front (the slower, the stronger)", "color": "@accent", "shape": "line", "traces": rest},
        {"name": "other scored candidates", "color": "@faint", "shape": "line", "traces": [0]},
    ]
    return {
        "data": traces,
        "layout": layout(
            60 + 46 * len(axes),
            margin={"l": 120, "r": 24, "t": 12, "b": 16},
            xaxis={"visible": False, "range": [-0.1, 1.1], "fixedrange": True},
            yaxis=axis(
                tickvals=list(depth.values()),
                ticktext=[_axis_name(a, files.unit) for a in axes],
                range=[len(axes) - 0.4, -0.7],
                fixedrange=True,
                gridcolor="@line",
                ticksuffix="  ",
            ),
            annotations=_axis_values(lines, depth),
            hovermode="closest",
            meta={"legend": [item for item in legend if item["traces"]]},
        ),
    }


def _bundle(lines: pd.DataFrame, depth: Mapping[str, int]) -> dict[str, Any]:
    """Many lines as one trace, with a gap after each."""
    x: list[float | None] = []
    y: list[float | None] = []
    for _, line in lines.groupby("key", sort=False):
        x += [*line["position"].tolist(), None]
        y += [*(depth[a] for a in line["axis"]), None]
    return {
        "x": x,
        "y": y,
        "mode": "lines",
        "hoverinfo": "skip",
        "line": {"color": "@faint", "width": 1},
        "opacity": 0.45,
    }


def _axis_name(name: str, unit: str) -> str:
    return {"latency_ms": "latency (ms)", "quality": f"quality ({unit})"}.get(name, name.replace("_", " "))


def _axis_values(lines: pd.DataFrame, depth: Mapping[str, int]) -> list[dict[str, Any]]:
    """Each axis' values, written above it where they stand; of latency and quality the two ends."""
    notes = []
    for name, rows in lines.groupby("axis", sort=False):
        rows = rows[rows["position"].notna()]
        if name in ("latency_ms", "quality"):
            ends = rows.loc[[rows["position"].idxmin(), rows["position"].idxmax()]]
            marks = list(zip(ends["position"], ends["value"], strict=True))
        else:
            values = data.ordered(set(rows["value"]))
            marks = list(zip(np.linspace(0, 1, len(values)), values, strict=True))
        notes += [
            {
                "x": float(at),
                "y": depth[str(name)],
                "xref": "x",
                "yref": "y",
                "text": escape(text),
                "showarrow": False,
                "yshift": 12,
                "font": {"size": 11, "color": "@ink"},
                "bgcolor": "@bg",
                "borderpad": 0,
            }
            for at, text in marks
        ]
    return notes


def hypervolume(files: StudyFiles, over: str) -> Figure:
    """How much of the space between the fixed corner and the front was covered, over "seconds" or over each "trial"."""
    curve = data.hypervolume_curve(files)
    unit = str(files.record["hypervolume"].get("unit", "ms·dB"))
    scale, time_unit = _time_scale(float(curve["seconds"].max()))
    title = "candidates scored" if over == "trial" else f"proxy time, all workers together ({time_unit})"
    x = curve["trial"] if over == "trial" else curve["seconds"] / scale
    better = curve["improved"]
    return {
        "data": [
            {
                "x": x.tolist(),
                "y": curve["value"].tolist(),
                "mode": "lines",
                "line": {"shape": "hv", "color": "@accent", "width": 2},
                "hoverinfo": "skip",
            },
            {
                "x": x[better].tolist(),
                "y": curve.loc[better, "value"].tolist(),
                "mode": "markers",
                "marker": {"color": "@accent", "size": 7},
                "text": [
                    f"candidate {row['trial']:.0f}, after {duration(row['seconds'])} of proxy time:"
                    f"<br>improved to {significant(row['value'])} {unit}"
                    for row in curve[better].to_dict("records")
                ],
                "hovertemplate": "%{text}<extra></extra>",
            },
        ],
        "layout": layout(
            300,
            xaxis=axis(title, rangemode="tozero"),
            yaxis=axis(f"hypervolume ({unit})", rangemode="tozero"),
            hovermode="closest",
        ),
    }


def _time_scale(seconds: float) -> tuple[float, str]:
    """Seconds per unit, and the unit that suits a time of this length."""
    return (3600.0, "h") if seconds > 3 * 3600 else (60.0, "min") if seconds > 180 else (1.0, "s")
