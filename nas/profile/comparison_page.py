"""The page of networks side by side: totals, stages and kinds of operation."""

from __future__ import annotations

from pathlib import Path

from nas import __version__, page
from nas.page import Cell, Figure, Section, escape
from nas.page.numbers import UNKNOWN, known, significant
from nas.page.plots import axis, layout
from nas.profile.comparison import Comparison
from nas.profile.operators import OPERATIONS
from nas.profile.words import NAMES, change, difference, shown

_UNITS = {"params": ("million parameters", 1e6), "macs": ("GMACs", 1e9), "step_ms": ("ms", 1.0)}
_COLOURS = 8


def comparison_page(found: Comparison, path: Path) -> Path:
    """Writes a comparison as one offline page."""
    subject = found.profiles[0].subject
    words = (
        f"One {subject.call} each for an image of {subject.image} pixels, batch 1, in {found.profiles[0].precision}."
    )
    return page.write_page(
        path,
        title=" and ".join(filter(None, [", ".join(found.names[:-1]), found.names[-1]])),
        lead=page.paragraph(escape(words), "lead") + page.bullets(found.sentences()),
        sections=[
            Section(slug="totals", title="In total", body=_totals(found)),
            Section(slug="stages", title="By stage", body=_stages(found)),
            Section(slug="operations", title="By kind of operation", body=_operations(found)),
            Section(slug="networks", title="The networks", body=_networks(found)),
        ],
        made_by=f"Made by nas {__version__}.",
    )


def _measures(found: Comparison) -> list[str]:
    timed = all(profile.latency is not None for profile in found.profiles)
    return [*(["step_ms"] if timed else []), "macs", "params"]


def _totals(found: Comparison) -> str:
    totals = found.totals()
    columns = [*_measures(found), "weight_bytes", "peak_activation_bytes"]
    rows: list[list[Cell | str]] = []
    for name in found.names:
        cells: list[Cell | str] = [name]
        for column in columns:
            value = float(totals[column][name])
            cells.append(Cell(text=shown(column, value), sort=value))
            if column in ("macs", "params"):
                ratio = value / float(totals[column].iloc[0]) - 1
                cells.append(Cell(text=UNKNOWN if name == found.names[0] else difference(ratio), sort=ratio))
        rows.append(cells)
    header = ["network"]
    for column in columns:
        header += [NAMES[column], *([f"against {found.names[0]}"] if column in ("macs", "params") else [])]
    return page.table(header, rows)


def _stages(found: Comparison) -> str:
    bodies = []
    for measure in _measures(found):
        name, unit = _UNITS[measure]
        words = f"{NAMES[measure]} of each stage of each network"
        drawn = page.figure(f"figure-stages-{measure}", stage_figure(found, measure), words)
        table = found.stages(measure) / unit
        rows = [_stage_row(str(stage), [float(v) for v in table.loc[stage]], measure, unit) for stage in table.index]
        rows.append(_stage_row("all", [float(table[network].sum()) for network in found.names], measure, unit))
        header = [name, *found.names, *(["difference"] if len(found.names) == 2 else [])]
        bodies.append((NAMES[measure], drawn + page.table(header, rows)))
    note = (
        "A stage at a high resolution has few parameters and many MACs, because its weights are used once per latent"
        " cell; a stage at the lowest resolution has many parameters and few MACs."
    )
    return page.paragraph(note, "note") + page.views("views-stages", bodies)


def _stage_row(stage: str, values: list[float], measure: str, unit: float) -> list[Cell | str]:
    """A stage of every network; of two, also by how much the second has more."""
    row: list[Cell | str] = [stage, *map(_figure, values)]
    if len(values) == 2:
        first, second = (unit * value if known(value) else 0.0 for value in values)
        row.append(Cell(text=change(measure, second - first), sort=second - first))
    return row


def _figure(value: float) -> Cell:
    return Cell(text=significant(value, 4) if known(value) else UNKNOWN, sort=value if known(value) else -1.0)


def stage_figure(found: Comparison, measure: str) -> Figure:
    """Bars of one measure: a group per stage, in execution order from the top, and a bar per network in it."""
    table = found.stages(measure)
    name, unit = _UNITS[measure]
    stages = [str(stage) for stage in table.index]
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": network,
            "y": stages,
            "x": [None if not known(v) else v / unit for v in map(float, table[network])],
            "marker": {"color": f"@k{i % _COLOURS}"},
            "hovertemplate": f"{network}<br>%{{y}}: %{{x:.4g}} {name}<extra></extra>",
        }
        for i, network in enumerate(found.names)
    ]
    legend = [
        {"name": network, "color": f"@k{i % _COLOURS}", "shape": "square", "traces": [i]}
        for i, network in enumerate(found.names)
    ]
    content = layout(60 + len(stages) * (14 + 13 * len(found.names)), barmode="group", meta={"legend": legend})
    content["xaxis"] = axis(name)
    content["yaxis"] = axis(showgrid=False, autorange="reversed", ticksuffix="  ")
    return {"data": traces, "layout": content}


def _operations(found: Comparison) -> str:
    totals = found.totals()
    rows: list[list[Cell | str]] = []
    for name in found.names:
        whole = float(totals["macs"][name])
        cells: list[Cell | str] = [name]
        for group in OPERATIONS:
            macs = float(totals[f"{group}_macs"][name])
            cells.append(Cell(text=f"{significant(macs / 1e9, 4)} ({macs / whole:.1%})", sort=macs))
        rows.append(cells)
    words = (
        "GMACs, and their share of the network. Convolutions of every kind; linear layers, those of attention"
        " included; and the two matmuls of attention, which grow with the square of the number of tokens."
    )
    drawn = page.figure("figure-operations", operation_figure(found), "GMACs of each network by kind of operation")
    return page.paragraph(escape(words), "note") + drawn + page.table(["network", *OPERATIONS], rows)


def operation_figure(found: Comparison) -> Figure:
    """One bar per network, made of its MACs by group of operations."""
    totals = found.totals()
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": group,
            "y": found.names,
            "x": (totals[f"{group}_macs"] / 1e9).tolist(),
            "marker": {"color": f"@k{i}"},
            "hovertemplate": f"%{{y}}<br>{group}: %{{x:.4g}} GMACs<extra></extra>",
        }
        for i, group in enumerate(OPERATIONS)
    ]
    legend = [{"name": g, "color": f"@k{i}", "shape": "square", "traces": [i]} for i, g in enumerate(OPERATIONS)]
    content = layout(70 + 36 * len(found.names), barmode="stack", meta={"legend": legend})
    content["xaxis"] = axis("GMACs")
    content["yaxis"] = axis(showgrid=False, autorange="reversed", ticksuffix="  ")
    return {"data": traces, "layout": content}


def _networks(found: Comparison) -> str:
    rows: list[list[Cell | str]] = [
        [p.name, p.subject.place or UNKNOWN, p.subject.source, p.subject.latent] for p in found.profiles
    ]
    return page.table(["network", "which it is", "from", "latent"], rows)
