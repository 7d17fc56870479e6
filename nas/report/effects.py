"""Figures of what lies behind the front: which choices matter, what each value goes with, how sure the front is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from nas.page import Figure, escape
from nas.page.numbers import label, milliseconds, percent, significant
from nas.page.plots import axis, layout, rings
from nas.report import analysis, data
from nas.report.files import StudyFiles

_OBJECTIVES = (("quality", "@accent"), ("latency", "@pick"))


def importance(found: Mapping[str, Any]) -> Figure:
    """Bars per choice, for quality and for latency; a tick on each marks what chance alone reaches."""
    names = list(dict.fromkeys(name for objective, _ in _OBJECTIVES for name in found.get(objective) or {}))
    names.sort(key=lambda n: -max(_share(found, objective, n, "share") for objective, _ in _OBJECTIVES))
    traces, legend = [], []
    drawn = [(objective, color) for objective, color in _OBJECTIVES if found.get(objective)]
    for i, (objective, color) in enumerate(drawn):
        shares, chances = ([_share(found, objective, n, part) for n in names] for part in ("share", "chance"))
        words = [
            f"{escape(label(n))}: {percent(share)} of what decides {objective}"
            + ("" if share > chance else ", no more than chance")
            for n, share, chance in zip(names, shares, chances, strict=True)
        ]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "y": [label(n) for n in names],
                "x": [100 * share for share in shares],
                "offsetgroup": objective,
                # What chance could have done alone is drawn pale.
                "marker": {
                    "color": color,
                    "opacity": [1.0 if s > c else 0.35 for s, c in zip(shares, chances, strict=True)],
                },
                "text": words,
                "textposition": "none",
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
        legend.append({"name": f"for {objective}", "color": color, "shape": "square", "traces": [i]})
    return {
        "data": traces,
        "layout": layout(
            80 + 34 * max(len(names), 1),
            barmode="group",
            bargap=0.3,
            margin={"l": 130, "r": 16, "t": 8, "b": 52},
            xaxis=axis("share of all importance (%)", rangemode="tozero"),
            yaxis=axis(autorange="reversed", showgrid=False, ticksuffix=" "),
            meta={"legend": legend},
        ),
    }


def _share(found: Mapping[str, Any], objective: str, name: str, part: str) -> float:
    return float(((found.get(objective) or {}).get(name) or {}).get(part, 0.0))


def values(files: StudyFiles, figures: pd.Series, title: str) -> Figure:
    """A row per value of each choice: every candidate with it, their mean with its 95 % interval, and the best.

    Args:
        files: the study.
        figures: what is drawn, by key, in the score's unit.
        title: of the axis.
    """
    lines = analysis.by_value(files, figures)
    labels: dict[tuple[str, str], float] = {}
    heads: dict[str, float] = {}
    row = 0.0
    for (choice, value), _ in lines.groupby(["choice", "value"], sort=False):
        if choice not in heads:
            row += 1.2 if heads else 0.6
            heads[choice] = row
        row += 1.0
        labels[(choice, value)] = row
    at = [labels[pair] for pair in zip(lines["choice"], lines["value"], strict=True)]
    lines = lines.assign(at=at)
    rows = [_row(files, name, frame) for name, frame in lines.groupby("at", sort=True)]
    # Points of one row lie a little apart, always in the same way.
    shift = np.random.default_rng(0).uniform(-0.22, 0.22, len(lines))
    traces = [
        {
            "x": [float(f"{y:.5g}") for y in lines["y"]],
            "y": (lines["at"] + shift).round(3).tolist(),
            "customdata": lines["key"].tolist(),
            "mode": "markers",
            "marker": {"color": "@faint", "size": 5, "opacity": 0.6},
            "hovertemplate": f"<b>%{{customdata}}</b><br>%{{x:.3f}} {escape(files.unit)}<extra></extra>",
        },
        {
            "x": [each["mean"] for each in rows],
            "y": [each["at"] for each in rows],
            "mode": "markers",
            "marker": {"color": "@accent", "size": 9, "symbol": "line-ns", "line": {"width": 3, "color": "@accent"}},
            "error_x": {
                "type": "data",
                "array": [each["half"] for each in rows],
                "color": "@accent",
                "thickness": 2,
                "width": 0,
            },
            "text": [each["words"] for each in rows],
            "hovertemplate": "%{text}<extra></extra>",
        },
        {
            "x": [each["best"] for each in rows],
            "y": [each["at"] for each in rows],
            "customdata": [each["key"] for each in rows],
            "mode": "markers",
            "marker": {"color": "@pick", "size": 8, "symbol": "diamond"},
            "text": [each["words"] for each in rows],
            "hovertemplate": "%{text}<extra></extra>",
        },
    ]
    legend = [
        {"name": "best with this value", "color": "@pick", "shape": "dot", "traces": [2]},
        {"name": "mean and its 95 % interval", "color": "@accent", "shape": "line", "traces": [1]},
        {"name": "each candidate", "color": "@faint", "shape": "dot", "traces": [0]},
    ]
    return {
        "data": traces,
        "layout": layout(
            int(80 + 21 * (row + 1)),
            margin={"l": 110, "r": 16, "t": 8, "b": 52},
            xaxis=axis(title, zeroline=True, zerolinecolor="@faint"),
            yaxis=axis(
                tickvals=list(labels.values()),
                ticktext=[escape(value) for _, value in labels],
                range=[row + 0.7, 0.0],
                fixedrange=True,
                ticksuffix=" ",
            ),
            annotations=[_head(choice, at) for choice, at in heads.items()],
            hovermode="closest",
            meta={
                "legend": legend,
                "narrow": {"xaxis.title.text": title.replace("what is usual at its latency", "the usual")},
            },
        ),
    }


def _head(choice: str, at: float) -> dict[str, Any]:
    """A choice's name above its values, at the left end of the figure."""
    return {
        "x": 0,
        "xref": "paper",
        "xanchor": "left",
        "xshift": 4,
        "y": at,
        "yref": "y",
        "showarrow": False,
        "text": f"<b>{escape(label(choice))}</b>",
        "font": {"size": 12, "color": "@ink"},
        "bgcolor": "@bg",
    }


def _row(files: StudyFiles, at: float, frame: pd.DataFrame) -> dict[str, Any]:
    """One value's candidates in figures and words."""
    mean, count = float(frame["y"].mean()), len(frame)
    half = 1.96 * float(frame["y"].std()) / count**0.5 if count > 2 else 0.0
    best = frame.loc[frame["y"].idxmax()]
    words = (
        f"{escape(label(best['choice']))} {escape(best['value'])}, {count} candidate{'s' if count > 1 else ''}"
        f"<br>mean {significant(mean)}" + (f" ± {significant(half)}" if half else "") + f" {escape(files.unit)}"
        f"<br>best {significant(float(best['y']))} {escape(files.unit)}: {best['key']}"
    )
    return {"at": at, "mean": mean, "half": half, "best": float(best["y"]), "key": best["key"], "words": words}


def stability(files: StudyFiles, chance: pd.Series) -> Figure:
    """How likely each candidate is truly on the front, over its latency."""
    frame = data.scored(files).set_index("key").loc[chance.index]
    on_front = (frame["standing"] == data.FRONT).to_numpy()
    traces, legend = [], []
    for chosen, name, color in ((~on_front, "measured behind the front", "@faint"), (on_front, "front", "@accent")):
        part, found = frame[chosen], chance[chosen]
        traces.append(
            {
                "x": part["latency_ms"].tolist(),
                "y": (100 * found).tolist(),
                "ids": part.index.tolist(),
                "mode": "markers",
                "marker": {"color": color, "size": 9 if color == "@accent" else 7},
                "text": [
                    f"<b>{key}</b><br>{milliseconds(ms)}<br>on the front: {percent(p)}"
                    for key, ms, p in zip(part.index, part["latency_ms"], found, strict=True)
                ],
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
        legend.append({"name": name, "color": color, "shape": "dot", "traces": [len(traces) - 1]})
    what = "denoiser call" if files.record["budget"]["per_step"] else "image"
    return {
        "data": traces,
        "layout": layout(
            300,
            xaxis=axis(f"predicted latency of one {what} (ms)"),
            yaxis=axis("chance to be on the front (%)", range=[-6, 112], tickvals=[0, 25, 50, 75, 100]),
            hovermode="closest",
            shapes=rings(),
            meta={"legend": legend[::-1], "rings": [0, 1]},
        ),
    }
