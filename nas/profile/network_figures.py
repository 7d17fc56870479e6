"""The figures of a network's page as data: shares, icicle, roofline, and times side by side."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from nas.page import Figure
from nas.page.numbers import milliseconds, percent, significant
from nas.page.plots import axis, layout
from nas.profile.network import Profile
from nas.profile.operators import PARTS, group
from nas.profile.shares import by
from nas.profile.words import NAMES, shown

PART_COLOURS = dict(zip(PARTS, ("@k0", "@k1", "@k2", "@k7"), strict=True))
GROUP_COLOURS = {"convolution": "@k4", "linear": "@k3", "attention": "@k5", "data and norms": "@k6"}
_STAGE_COLOURS = ("@down0", "@down1", "@down2", "@mid", "@up2", "@up1", "@up0", "@edge")
_SHOWN = {"params": "parameters", "macs": "MACs", "step_ms": "time"}
_ROOT = "the whole network"
_LEAST = 1e-4  # of the whole: what is smaller has no area on a screen


def _legend(colours: dict[str, str], traces: dict[str, list[int]] | None = None) -> list[dict[str, Any]]:
    traces = traces or {}
    return [{"name": n, "color": c, "shape": "square", "traces": traces.get(n, [])} for n, c in colours.items()]


def shares_figure(found: pd.DataFrame, column: str) -> Figure:
    """Parameters, MACs and time as three bars of 100 %, divided by stage or by part.

    Args:
        found: `Profile.shares`.
        column: "stage" or "part".
    """
    table = by(found, column)
    measures = [m for m in ("step_ms", "macs", "params") if table[m].notna().all()]
    order = [part for part in PARTS if part in table.index] if column == "part" else table.index
    names = [str(name) for name in order]
    palette = PART_COLOURS if column == "part" else _stage_colours(names)
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": [_SHOWN[m] for m in measures],
            "x": [100 * float(table.loc[name, m]) for m in measures],
            "text": [f"{name} {percent(float(table.loc[name, m]))}" for m in measures],
            "textposition": "inside",
            "insidetextanchor": "middle",
            "textangle": 0,
            "marker": {"color": palette[name], "line": {"width": 1, "color": "@bg"}},
            "hovertemplate": "<b>%{text}</b> of %{y}<extra></extra>",
        }
        for name in names
    ]
    legend = _legend({n: palette[n] for n in names}, {n: [i] for i, n in enumerate(names)})
    return {
        "data": data,
        "layout": layout(
            60 + 58 * len(measures),
            barmode="stack",
            bargap=0.25,
            margin={"l": 84, "r": 8, "t": 4, "b": 30},
            xaxis=axis(range=[0, 100], ticksuffix=" %", fixedrange=True),
            yaxis=axis(fixedrange=True, automargin=True),
            uniformtext={"minsize": 10, "mode": "hide"},
            meta={"legend": legend},
        ),
    }


def _stage_colours(names: list[str]) -> dict[str, str]:
    """Down blocks blue, the middle grey, up blocks orange, others pale; a fourth of a kind takes the third's colour."""
    found = {}
    for name in names:
        head, _, number = name.partition(".")
        at = min(int(number), 2) if number.isdigit() else 0
        colour = {"down_blocks": f"@down{at}", "up_blocks": f"@up{2 - at}", "mid_block": "@mid"}.get(head, "@edge")
        found[name] = colour
    return found


def icicle(profile: Profile, measure: str) -> Figure:
    """Stage, block and kind of operator, as wide as their share of one column of a profile's operators.

    Args:
        profile: of one network.
        measure: "step_ms", "macs", "params" or "bytes".
    """
    table = profile.operators
    whole = float(table[measure].sum())
    # id, parent, label, value, colour, what it is
    nodes: list[tuple[str, str, str, float, str, str]] = [(_ROOT, "", profile.name, whole, "@raised", "network")]
    for stage, of_stage in table.groupby("stage", sort=False):
        # A stage of one block that bears its name is that block.
        inner = _ROOT if set(of_stage["block"]) == {stage} else str(stage)
        if inner != _ROOT:
            nodes.append((str(stage), _ROOT, str(stage), float(of_stage[measure].sum()), "@raised", "stage"))
        for block, of_block in of_stage.groupby("block", sort=False):
            part, value = str(of_block["part"].iloc[0]), float(of_block[measure].sum())
            label = str(block).removeprefix(f"{stage}.")
            nodes.append((str(block), inner, label, value, PART_COLOURS[part], part))
            seen = of_block[of_block[measure] > _LEAST * whole].sort_values(measure, ascending=False)
            for row in seen.to_dict("records"):
                kind, value = row["operator"], float(row[measure])
                words = f"{row['count']} operator{'s' if row['count'] > 1 else ''} of kind {kind}"
                nodes.append((f"{block}/{kind}", str(block), kind, value, GROUP_COLOURS[group(kind)], words))
    ids, parents, labels, values, colours, words_of = (list(column) for column in zip(*nodes, strict=True))
    unit = "activation_bytes" if measure == "bytes" else measure
    return {
        "data": [
            {
                "type": "icicle",
                "branchvalues": "total",
                "ids": ids,
                "parents": parents,
                "labels": labels,
                "values": values,
                "text": [f"{100 * v / whole:.1f}" for v in values],
                "customdata": [f"{words}<br>{shown(unit, v)}" for words, v in zip(words_of, values, strict=True)],
                "hovertemplate": "<b>%{id}</b><br>%{customdata}, %{text} %<extra></extra>",
                # The outer two columns are tall enough for two lines, and must be narrow on a phone.
                "texttemplate": [
                    "%{label}<br>%{text} %" if what in ("network", "stage") else "%{label} %{text}" for what in words_of
                ],
                "textposition": "middle left",
                "sort": False,
                "root": {"color": "rgba(0,0,0,0)"},
                "tiling": {"orientation": "h", "pad": 1},
                "pathbar": {"visible": True, "thickness": 22},
                "marker": {"colors": colours, "line": {"width": 1, "color": "@bg"}},
                "leaf": {"opacity": 0.85},
            }
        ],
        "layout": layout(
            max(560, min(1500, 30 * profile.blocks.shape[0])),
            margin={"l": 0, "r": 0, "t": 4, "b": 4},
            uniformtext={"minsize": 10, "mode": "hide"},
            meta={"legend": _legend(PART_COLOURS) + _legend(GROUP_COLOURS)},
        ),
    }


def roofline_figure(profile: Profile) -> Figure:
    """Blocks by how many MACs they do per byte and per second, under the device's roof; areas are shares of the time.

    Raises:
        AssertionError: the profile has no roof.
    """
    roof, rates = profile.roof, profile.rates
    assert roof is not None
    bases = [b for b in ("predicted", "measured") if rates[f"{b}_ms"].notna().any()]
    rates = rates[rates["macs"] > 0]
    low, high = float(rates["intensity"].min()) / 2, max(float(rates["intensity"].max()), roof.ridge) * 2
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [low, roof.ridge, high],
            "y": [low * roof.gb_s, roof.gmac_s, roof.gmac_s],
            "line": {"color": "@pick", "width": 2},
            "hovertemplate": f"roof: {significant(roof.gb_s)} GB/s, {significant(roof.gmac_s)} GMAC/s<extra></extra>",
        }
    ]
    traces: dict[str, list[int]] = {}
    for basis in bases:
        for part in PARTS:
            found = rates[(rates["part"] == part) & rates[f"{basis}_ms"].notna()]
            if len(found):
                traces.setdefault(part, []).append(len(data))
                data.append(_points(found, basis, part, float(rates[f"{basis}_ms"].sum())))
    legend = _legend({p: PART_COLOURS[p] for p in traces}, traces)
    legend.append({"name": "the sheet's roof", "color": "@pick", "shape": "line", "traces": [0]})
    return {
        "data": data,
        "layout": layout(
            460,
            hovermode="closest",
            xaxis=axis("MACs per byte moved", type="log", range=[math.log10(low), math.log10(high)], dtick="D2"),
            yaxis=axis("GMAC/s", type="log", dtick="D2"),
            meta={"legend": legend},
        ),
    }


def _points(found: pd.DataFrame, basis: str, part: str, whole_ms: float) -> dict[str, Any]:
    ms = found[f"{basis}_ms"]
    filled = basis == "measured"
    return {
        "type": "scatter",
        "mode": "markers",
        "ids": [f"{name} {basis}" for name in found.index],
        "x": found["intensity"].tolist(),
        "y": found[f"{basis}_gmac_s"].tolist(),
        "customdata": [
            f"<b>{name}</b>, {basis}<br>{milliseconds(float(ms[name]))}, {percent(float(ms[name]) / whole_ms)} of the"
            f" time<br>{significant(float(found[f'{basis}_gmac_s'][name]))} GMAC/s,"
            f" {percent(float(found[f'{basis}_of_roof'][name]))} of the roof"
            for name in found.index
        ],
        "hovertemplate": "%{customdata}<extra></extra>",
        "marker": {
            "symbol": "circle" if filled else "circle-open",
            "size": [6 + 40 * math.sqrt(v / whole_ms) for v in ms],
            "color": PART_COLOURS[part],
            "opacity": 0.75 if filled else 1.0,
            "line": {"width": 1.5, "color": "@bg" if filled else PART_COLOURS[part]},
        },
    }


def times_figure(profile: Profile) -> Figure:
    """Each block's time: predicted, measured alone, and inside the network, where these are known."""
    measured = profile.measured
    assert measured is not None
    names = profile.blocks["name"].tolist()
    series = {"predicted": dict(zip(names, profile.blocks["step_ms"], strict=True))}
    series |= {"measured alone": dict(measured.blocks_ms), "measured in the network": measured.in_network_ms}
    colours = {"predicted": "@faint", "measured alone": "@k4", "measured in the network": "@k0"}
    # Inside a group plotly draws upwards, so the last series is the topmost.
    drawn = [(n, v) for n, v in series.items() if v and not all(math.isnan(x) for x in v.values())][::-1]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": names,
            "x": [values.get(block) for block in names],
            "text": [milliseconds(values.get(block)) for block in names],
            "textposition": "none",
            "marker": {"color": colours[name]},
            "hovertemplate": f"<b>%{{y}}</b><br>{name}: %{{text}}<extra></extra>",
        }
        for name, values in drawn
    ]
    shape = {name: [i] for i, (name, _) in enumerate(drawn)}
    return {
        "data": data,
        "layout": layout(
            90 + (10 + 9 * len(drawn)) * len(names),
            barmode="group",
            bargap=0.3,
            margin={"l": 64, "r": 12, "t": 4, "b": 44},
            xaxis=axis(f"{NAMES['step_ms']} in ms", fixedrange=True),
            yaxis=axis(autorange="reversed", tickfont={"size": 11}, fixedrange=True, dtick=1),
            meta={"legend": _legend({n: colours[n] for n, _ in reversed(drawn)}, shape)},
        ),
    }
