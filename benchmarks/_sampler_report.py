"""What the rows of benchmarks/sampler_front.py say: a JSON summary, a figure, and the sentences to print."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _sampler_problems import Case
from screenshot import screenshot

from nas import page
from nas.page.plots import axis, layout
from nas.paths import atomic_write
from nas.provenance import provenance

COMPARED = (25, 50, 100)
_DRAWS = 10_000
_COLOURS = {
    "front": "#d1495b",
    "gp": "#00798c",
    "tpe": "#edae49",
    "tpe-univariate": "#a37c27",
    "nsga2": "#66a182",
    "random": "#8d96a3",
}
_COLUMNS = 2
_FLOOR = 1e-3  # percent: where the exact front is drawn on a logarithmic axis


def interval(values: np.ndarray) -> list[float]:
    """The 95 % bootstrap interval of the mean of values [n]."""
    draws = np.random.default_rng(0).choice(values, size=(_DRAWS, len(values))).mean(axis=1)
    return [round(float(each), 5) for each in np.quantile(draws, [0.025, 0.975])]


def averages(rows: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """By sampler: number of seeds, and the mean share with its interval at each mark that it has."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in rows.groupby("sampler", sort=False):
        marks = {mark: own[f"share_{mark}"].dropna().to_numpy() for mark in COMPARED}
        found[str(name)] = {
            "seeds": len(own),
            "seconds_per_run": round(float(own["seconds"].mean()), 1),
            **{
                f"share_{mark}": {"mean": round(float(values.mean()), 5), "interval": interval(values)}
                for mark, values in marks.items()
                if len(values)
            },
        }
    return found


def ahead(rows: pd.DataFrame, mark: int) -> dict[str, Any] | None:
    """How far `front` is ahead of the best of the others after `mark` evaluations, on the seeds that both have.

    The best is the one with the greatest mean.
    """
    shares = rows.pivot_table(index="seed", columns="sampler", values=f"share_{mark}")
    others = [name for name in shares.columns if name != "front"]
    if "front" not in shares or not others:
        return None
    best = str(shares[others].mean().idxmax())
    paired = (shares["front"] - shares[best]).dropna().to_numpy()
    if not len(paired):
        return None
    low, high = interval(paired)
    return {
        "best_other": best,
        "seeds": len(paired),
        "difference": round(float(paired.mean()), 5),
        "interval": [low, high],
        "excludes_zero": bool(low > 0 or high < 0),
    }


def summary(rows: pd.DataFrame, cases: Mapping[str, Case]) -> dict[str, Any]:
    """Everything, by problem."""
    found = {}
    for name, case in cases.items():
        own = rows[rows["problem"] == name]
        found[name] = {
            "candidates": len(case.problem.rows),
            "known_objective": case.known,
            "noise_sd": round(case.noise_sd, 5),
            "quality_sd": round(float(case.quality.std()), 5),
            "fit": {key: round(value, 4) for key, value in case.fit.items()},
            "samplers": averages(own),
            "front_minus_best_other": {str(mark): ahead(own, mark) for mark in COMPARED},
        }
    return found


def figure(rows: pd.DataFrame, names: list[str], marks: list[int]) -> page.Figure:
    """A panel per problem: what is missing of the exact hypervolume over evaluations, one line per sampler."""
    traces: list[dict[str, Any]] = []
    axes: dict[str, Any] = {}
    lines = -(-len(names) // _COLUMNS)
    shown = [name for name in _COLOURS if (rows["sampler"] == name).any()]
    for i, name in enumerate(names):
        down, across = divmod(i, _COLUMNS)
        suffix = "" if i == 0 else str(i + 1)
        left, top = across / _COLUMNS, 1 - down / lines
        domain = [left + 0.07 * (across > 0), left + 0.93 / _COLUMNS]
        axes[f"xaxis{suffix}"] = axis(f"evaluations: {name}", domain=domain, anchor=f"y{suffix}")
        axes[f"yaxis{suffix}"] = axis(
            "hypervolume missing (%)", domain=[top - 0.74 / lines, top], anchor=f"x{suffix}", type="log", dtick=1
        )
        for sampler in shown:
            own = rows[(rows["problem"] == name) & (rows["sampler"] == sampler)]
            means = [float(own[f"share_{mark}"].mean()) for mark in marks]
            known = [(mark, max(100 * (1 - mean), _FLOOR)) for mark, mean in zip(marks, means, strict=True) if mean > 0]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "x": [mark for mark, _ in known],
                    "y": [missing for _, missing in known],
                    "name": sampler,
                    "line": {"color": _COLOURS[sampler], "width": 3 if sampler == "front" else 1.5},
                    "marker": {"size": 5},
                    "xaxis": f"x{suffix}",
                    "yaxis": f"y{suffix}",
                    "showlegend": i == 0,
                }
            )
    legend = {"orientation": "h", "x": 0, "y": 1.06}
    return {"data": traces, "layout": layout(280 * lines, **axes, showlegend=True, legend=legend)}


def report(table: Path, cases: Mapping[str, Case], digests: Mapping[str, str], marks: list[int]) -> None:
    """Writes the summary and the figure beside the table, and prints the comparison at 50 evaluations last."""
    rows = pd.read_csv(table, dtype={"problem_digest": str})
    rows = rows[rows["problem_digest"] == rows["problem"].map(dict(digests))]
    rows = rows.sort_values("evaluations").drop_duplicates(["problem", "sampler", "seed"], keep="last")
    found = summary(rows, cases)
    made = provenance(seed=0, identity={"problems": dict(digests)})
    atomic_write(table.with_suffix(".json"), json.dumps({"problems": found, "provenance": made}, indent=1) + "\n")
    names = [name for name in cases if (rows["problem"] == name).any()]
    words = "what is missing of the exact hypervolume over evaluations"
    with tempfile.TemporaryDirectory() as folder:
        body = page.figure("figure-samplers", figure(rows, names, marks), words)
        page.write_page(
            Path(folder) / "page.html",
            title="Hypervolume per evaluation",
            lead=page.paragraph(
                "Mean over seeds; lower is better, 0.001 % is the exact front. Every candidate's cost is known."
            ),
            sections=[page.Section(slug="samplers", title="Samplers", body=body)],
            made_by="benchmarks/sampler_front.py",
        )
        lines = -(-len(names) // _COLUMNS)
        screenshot(Path(folder) / "page.html", table.with_suffix(".png"), width=1100, height=340 + 280 * lines)
    for mark in (25, 100, 50):
        print(
            f"\nhypervolume after {mark} evaluations, % of the exact front's, and front's lead with its 95 % interval:"
        )
        for name in names:
            print(_line(name, found[name], mark))


def _line(name: str, found: Mapping[str, Any], mark: int) -> str:
    shares = [
        f"{sampler} {100 * own[f'share_{mark}']['mean']:.2f} ({own['seeds']})"
        for sampler, own in found["samplers"].items()
        if f"share_{mark}" in own
    ]
    lead = found["front_minus_best_other"][str(mark)]
    if lead is None:
        return f"{name}: {', '.join(shares)}"
    low, high = lead["interval"]
    points = f"{100 * lead['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}] over {lead['best_other']}"
    return f"{name}: {', '.join(shares)}; front {points}, {lead['seeds']} seeds"
