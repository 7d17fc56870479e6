"""The page of benchmarks/proxy_table.py: a chart and a table for each group of spaces and each truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _proxy_report import GROUPS, TARGETS, known_or

from nas import page
from nas.page import Cell, Section, escape
from nas.page.numbers import significant
from nas.page.plots import axis, layout


def write_table_page(path: Path, found: Mapping[str, Any]) -> Path:
    """The comparison as a page: per group and target a chart and a table that sorts."""
    sections = []
    for group in GROUPS:
        choices = []
        for words in TARGETS.values():
            rows = [row for row in found["rows"] if (row["group"], row["target"]) == (group, words)]
            if rows:
                slug = f"{group}-{words}".replace("+", "-").replace(" ", "-")
                chart = page.figure(slug, chart_of(rows), f"agreement with {words} against seconds, {group}")
                facts = page.facts(
                    (name.replace("_", " "), _plain(v)) for name, v in found["truth"][group][words].items()
                )
                choices.append((words, chart + _table(rows) + facts))
        if choices:
            sections.append(Section(slug=group.replace("+", "-"), title=group, body=page.views(f"v-{group}", choices)))
    made = found["provenance"]
    return page.write_page(
        path,
        title="Which cheap score predicts a long training?",
        lead=page.paragraph(escape(found["note"])),
        sections=sections,
        made_by=f"benchmarks/proxy_table.py, nas {made['nas']}, {made['date']}.",
    )


def chart_of(rows: Sequence[Mapping[str, Any]]) -> page.Figure:
    """Tau within latency bands against seconds per candidate, with intervals."""
    kinds = (
        ("on the Pareto front", "@pick", lambda row: row["pareto"]),
        ("proxy", "@accent", lambda row: not row["pareto"] and not row["free"]),
        ("costs", "@muted", lambda row: not row["pareto"] and row["free"]),
    )
    traces, legend = [], []
    for name, color, belongs in kinds:
        chosen = [row for row in rows if belongs(row) and row["within_band"] is not None]
        if not chosen:
            continue
        legend.append({"name": name, "color": color, "shape": "dot", "traces": [len(traces)]})
        value = np.array([row["within_band"] for row in chosen])
        low, high = (
            np.array([known_or(row[f"within_band_{end}"], row["within_band"]) for row in chosen])
            for end in ("low", "high")
        )
        traces.append(
            {
                # A logarithmic axis has no 0: what costs nothing stands at a hundredth of a second.
                "x": [max(row["seconds"], 0.01) for row in chosen],
                "y": value.tolist(),
                "mode": "markers",
                "marker": {"color": color, "size": 9},
                "text": [
                    f"<b>{escape(row['variant'])}</b><br>tau within bands {row['within_band']:.2f}, overall"
                    f" {known_or(row['kendall'], float('nan')):.2f}<br>{row['seconds']:.1f} s"
                    for row in chosen
                ],
                "hovertemplate": "%{text}<extra></extra>",
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "color": color,
                    "thickness": 1,
                    "width": 3,
                    "array": (high - value).tolist(),
                    "arrayminus": (value - low).tolist(),
                },
            }
        )
    return {
        "data": traces,
        "layout": layout(
            440,
            xaxis=axis("seconds of one thread per candidate (logarithmic; 0 stands at 0.01)", type="log"),
            yaxis=axis("Kendall tau within latency bands"),
            hovermode="closest",
            meta={"legend": legend},
        ),
    }


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    header = ["variant", "tau within bands", "low", "high", "tau", "low", "high", "Spearman", "above parameters", "low"]
    header += ["above MACs", "low", "regret of the top 5", "seconds", "candidates", "front"]
    names = ("within_band", "within_band_low", "within_band_high", "kendall", "kendall_low", "kendall_high", "spearman")
    names += ("above_params_within_band", "above_params_within_band_low")
    names += ("above_macs_within_band", "above_macs_within_band_low", "top5_regret", "seconds", "candidates")
    ordered = sorted(rows, key=lambda row: -known_or(row["within_band"], -2.0))
    cells = [
        [
            row["variant"],
            *(Cell(text=_plain(row[name]), sort=known_or(row[name], -9.0)) for name in names),
            "yes" if row["pareto"] else "",
        ]
        for row in ordered
    ]
    return page.table(header, cells)


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".replace("-", "−")
    return "–" if value is None else significant(value) if isinstance(value, int) and value > 999 else str(value)
