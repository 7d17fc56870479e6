"""The page of a whole space: how costs are spread and what moves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nas import __version__, page
from nas.page import Cell, Figure, Section, escape
from nas.page.numbers import label, plain, significant
from nas.page.plots import axis, layout
from nas.profile.space import SpaceProfile
from nas.profile.words import NAMES, shown


def space_page(profile: SpaceProfile, path: Path) -> Path:
    """Writes a space's profile as one offline page."""
    space = profile.space
    words = (
        f"{space.summary}. {space.extent}; {profile.sampled:,} of them drawn uniformly"
        f" (seed {profile.seed}), one denoiser call each at {space.resolution_px} × {space.resolution_px} pixels."
        + (f" Latency on {profile.target}." if profile.target else "")
    )
    return page.write_page(
        path,
        title=f"{space.name}: the whole space",
        lead=page.paragraph(escape(words), "lead"),
        sections=[
            Section(slug="spread", title="What candidates cost", body=_spread(profile)),
            Section(slug="effects", title="Which choices move it", body=_effects(profile)),
            Section(slug="sources", title="Sources", body=page.bullets(space.sources)),
        ],
        made_by=f"Made by nas {__version__}.",
    )


def _effects(profile: SpaceProfile) -> str:
    first = "step_ms" if "step_ms" in profile.costs else "macs"
    strongest = profile.importance(first)
    words = (
        f"{label(str(strongest.index[0]))} moves {NAMES[first]} most: its dearest value costs"
        f" {significant(float(strongest.iloc[0]))} times its cheapest, all else drawn at random. A point is a value's"
        " geometric mean over the sample, as a ratio to the mean over the choice's values."
    )
    shown_costs = dict.fromkeys([first, "macs", "params", "peak_activation_bytes"])
    views = [
        (
            f"on {NAMES[cost]}",
            page.figure(
                f"figure-effect-{cost}", effect_figure(profile, cost), f"effect of each value on {NAMES[cost]}"
            ),
        )
        for cost in shown_costs
    ]
    return page.paragraph(escape(words), "note") + page.views("views-effects", views)


_UNITS = {
    "step_ms": ("latency (ms)", 1.0),
    "macs": ("GMACs", 1e9),
    "params": ("million parameters", 1e6),
    "peak_activation_bytes": ("peak activations (MB)", 1e6),
}


def _spread(profile: SpaceProfile) -> str:
    columns = list(profile.quantiles.columns)
    header = ["", *(_name(q) for q in profile.quantiles.index)]
    rows: list[list[Cell | str]] = [
        [NAMES[c], *(Cell(text=shown(c, float(v)), sort=float(v)) for v in profile.quantiles[c])] for c in columns
    ]
    return page.table(header, rows) + page.figure("figure-spread", spread_figure(profile), "distributions of the costs")


def _name(quantile: float) -> str:
    return {0.0: "least", 0.5: "median", 1.0: "most"}.get(quantile, f"{100 * quantile:g} %")


def spread_figure(profile: SpaceProfile) -> Figure:
    """Histograms of the costs, one under the other, on logarithmic axes."""
    columns = [c for c in _UNITS if c in profile.costs]
    height = 1.0 / len(columns)
    content = layout(170 * len(columns), margin={"l": 56, "r": 24, "t": 12, "b": 12})
    traces = []
    for i, column in enumerate(columns):
        name, unit = _UNITS[column]
        edges = np.geomspace(profile.costs[column].min() / unit, profile.costs[column].max() / unit * (1 + 1e-9), 41)
        counts, _ = np.histogram(profile.costs[column] / unit, edges)
        suffix = "" if i == 0 else str(i + 1)
        traces.append(
            {
                "type": "bar",
                "x": (np.sqrt(edges[1:] * edges[:-1])).tolist(),
                "y": counts.tolist(),
                "width": (0.96 * np.diff(edges)).tolist(),
                "marker": {"color": "@accent"},
                "xaxis": f"x{suffix}",
                "yaxis": f"y{suffix}",
                "hovertemplate": f"%{{x:.3g}} {name}: %{{y}} candidates<extra></extra>",
            }
        )
        top = 1 - i * height
        content[f"xaxis{suffix}"] = axis(name, type="log", anchor=f"y{suffix}", **log_ticks(edges[0], edges[-1]))
        content[f"yaxis{suffix}"] = axis("", domain=[top - 0.62 * height, top], anchor=f"x{suffix}", nticks=4)
    return {"data": traces, "layout": content}


def effect_figure(profile: SpaceProfile, cost: str) -> Figure:
    """Each choice a row, each value a point at its mean effect; the choices that matter most at the top."""
    order = profile.importance(cost).index.tolist()
    rows = profile.effects.assign(rank=profile.effects["choice"].map({name: i for i, name in enumerate(order)}))
    ranges = rows.groupby("rank")[cost].agg(["min", "max"])
    lines: list[dict[str, Any]] = [
        {
            "type": "line",
            "x0": float(r["min"]),
            "x1": float(r["max"]),
            "y0": int(str(i)),
            "y1": int(str(i)),
            "line": {"color": "@faint", "width": 2},
            "layer": "below",
        }
        for i, r in ranges.iterrows()
    ]
    points = {
        "type": "scatter",
        "mode": "markers+text",
        "x": rows[cost].tolist(),
        "y": rows["rank"].tolist(),
        "text": [plain(v) for v in rows["value"]],
        "textposition": [
            _label_side(int(place), int(count)) for place, count in zip(*_places(rows, cost), strict=True)
        ],
        "textfont": {"size": 10, "color": "@muted"},
        "marker": {"color": "@accent", "size": 9},
        "hovertemplate": "%{text}: %{x:.3g} times the mean<extra></extra>",
        "cliponaxis": False,
    }
    low, high = float(rows[cost].min()), float(rows[cost].max())
    content = layout(90 + 34 * len(order))
    content["xaxis"] = axis(
        f"{NAMES[cost]} relative to the mean of the choice (ratio)",
        type="log",
        range=[float(np.log10(low)) - 0.05, float(np.log10(high)) + 0.05],
        **log_ticks(low, high, _FINE),
    )
    content["yaxis"] = axis(
        tickvals=list(range(len(order))),
        ticktext=[label(n) for n in order],
        range=[len(order) - 0.4, -0.7],
        showgrid=False,
        ticksuffix="  ",
    )
    content["shapes"] = lines
    content["meta"] = {"narrow": {"xaxis.title.text": "ratio to the choice's mean"}}
    return {"data": [points], "layout": content}


_COARSE, _FINE = (1.0, 2.0, 5.0), (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)


def log_ticks(low: float, high: float, steps: tuple[float, ...] = _COARSE) -> dict[str, Any]:
    """Ticks of a logarithmic axis, each written out: plotly writes 200 and 500 as a bare 2 and 5."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    values = [step * 10.0**power for power in powers for step in steps]
    kept = [v for v in values if low * 0.95 <= v <= high * 1.05]
    return {"tickvals": kept, "ticktext": [plain(v) for v in kept]}


def _places(rows: pd.DataFrame, cost: str) -> tuple[pd.Series, pd.Series]:
    """Where each value stands among its choice's values by cost, from 0, and how many there are."""
    grouped = rows.groupby("choice")[cost]
    return grouped.rank(method="first") - 1, grouped.transform("size")


def _label_side(place: int, count: int) -> str:
    """The ends are labelled outwards and those between above and below in turn, so that near ones stay apart."""
    if place == count - 1:
        return "middle right"
    return "middle left" if place == 0 else ("top center", "bottom center")[place % 2]
