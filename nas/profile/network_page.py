"""The page of one network: treemaps, its blocks, and the counters side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from nas import __version__, page
from nas.page import Cell, Figure, Section, escape
from nas.page.numbers import UNKNOWN, label, milliseconds, percent, plain, scaled, significant
from nas.page.plots import layout
from nas.profile.counters import OURS
from nas.profile.network import OPERATIONS, Profile
from nas.profile.words import NAMES, difference, shown


def profile_page(profile: Profile, path: Path) -> Path:
    """Writes a network's profile as one offline page."""
    candidate = profile.subject.candidate
    title = profile.name if candidate is None else f"{candidate.space.name}: {profile.name}"
    return page.write_page(
        path,
        title=title,
        lead=_lead(profile),
        sections=[s for s in _sections(profile) if s.body],
        made_by=f"Made by nas {__version__}.",
    )


def _lead(profile: Profile) -> str:
    total, latency, subject = profile.total, profile.latency, profile.subject
    tiles = [
        ("parameters", scaled(total.params), f"{total.params:,}"),
        ("MACs, one call", scaled(total.macs), _shares(profile)),
        ("weights", scaled(total.weight_bytes, "B"), profile.precision),
        ("peak activations", scaled(total.peak_activation_bytes, "B"), "upper bound"),
    ]
    if latency is not None:
        between = (
            f"{milliseconds(latency.low_ms)} to {milliseconds(latency.high_ms)} with {percent(latency.confidence)}"
        )
        tiles.insert(0, ("predicted, one call", milliseconds(latency.ms), between))
    words = f"One {subject.call} for an image of {subject.image} pixels (latent {subject.latent}), batch 1."
    where = f" Latency on {latency.target}." if latency is not None else ""
    place = f" It is {subject.place}." if subject.place else ""
    remarks = "".join(page.paragraph(escape(w), "warning") for w in latency.warnings) if latency is not None else ""
    return page.paragraph(escape(words + where + place), "lead") + page.tiles(tiles) + remarks


def _shares(profile: Profile) -> str:
    """Which operations the MACs are: "attention 12 %, ..."."""
    whole = max(profile.total.macs, 1)
    return ", ".join(f"{group} {percent(macs / whole)}" for group, macs in profile.operations.items())


def _sections(profile: Profile) -> list[Section]:
    measures = (["step_ms"] if profile.latency is not None else []) + ["macs", "params", "activation_bytes"]
    maps = [
        (f"by {NAMES[m]}", page.figure(f"figure-{m}", treemap(profile.blocks, m), f"treemap of blocks by {NAMES[m]}"))
        for m in measures
    ]
    note = "An area is a block's share; a colour is its kind. Blocks lie inside their stage."
    return [
        Section(
            slug="where", title="Where it goes", body=page.paragraph(note, "note") + page.views("views-where", maps)
        ),
        Section(slug="stages", title="Every stage", body=_stage_table(profile)),
        Section(slug="pipeline", title="A whole image", body=_pipeline(profile)),
        Section(slug="blocks", title="Every block", body=_block_table(profile)),
        Section(slug="counters", title="Counted by others", body=_counters(profile)),
        Section(slug="choices", title="Its choices", body=_choices(profile)),
    ]


def _choices(profile: Profile) -> str:
    candidate = profile.subject.candidate
    if candidate is None:
        return ""
    return page.facts((label(k), plain(v)) for k, v in candidate.choices.items())


def _stage_table(profile: Profile) -> str:
    timed = profile.latency is not None
    groups = [f"{group}_macs" for group in OPERATIONS]
    header = ["stage", *(["latency"] if timed else []), "parameters", "MACs", *OPERATIONS, "weights"]
    rows: list[list[Cell | str]] = []
    for name, row in profile.stages.iterrows():
        cells: list[Cell | str] = [str(name)]
        if timed:
            cells.append(Cell(text=milliseconds(row["step_ms"]), sort=row["step_ms"]))
        cells += [Cell(text=scaled(row[c]), sort=row[c]) for c in ("params", "macs", *groups)]
        rows.append([*cells, Cell(text=scaled(row["weight_bytes"], "B"), sort=row["weight_bytes"])])
    words = (
        "MACs are also told by operation: convolutions, linear layers, and the two matmuls of attention. A stage at a"
        " high resolution uses each weight once per latent cell, so it has few parameters and many MACs."
    )
    return page.paragraph(words, "note") + page.table(header, rows)


def treemap(blocks: pd.DataFrame, measure: str) -> Figure:
    """Blocks inside their stages, sized by one column of a profile's blocks, coloured by kind."""
    kinds = list(dict.fromkeys(blocks["kind"]))
    colour = {kind: f"@k{i % 8}" for i, kind in enumerate(kinds)}
    stages = blocks.groupby("stage", sort=False)[measure].sum()
    whole = float(stages.sum())
    # A stage of one block that bears its name is that block.
    own = blocks.assign(parent=np.where(blocks["name"] == blocks["stage"], "", blocks["stage"]))
    outer = [s for s in stages.index if s not in set(own["name"])]
    values = [*stages[outer].tolist(), *own[measure].tolist()]
    names = [*outer, *own["name"]]
    kind_of = [*["stage"] * len(outer), *own["kind"]]
    return {
        "data": [
            {
                "type": "treemap",
                "branchvalues": "total",
                "ids": names,
                "labels": [
                    *outer,
                    *(b.removeprefix(f"{s}.") for b, s in zip(own["name"], own["parent"], strict=True)),
                ],
                "parents": [*[""] * len(outer), *own["parent"]],
                "values": values,
                "text": [f"{shown(measure, v)}, {percent(v / whole if whole else 0.0)}" for v in values],
                "customdata": kind_of,
                "hovertemplate": "<b>%{id}</b><br>%{customdata}<br>%{text}<extra></extra>",
                "textinfo": "label+text",
                "marker": {
                    "colors": ["@raised" if kind == "stage" else colour[kind] for kind in kind_of],
                    "line": {"width": 1, "color": "@bg"},
                    "pad": {"t": 20, "l": 2, "r": 2, "b": 2},
                },
                "pathbar": {"visible": False},
                "tiling": {"packing": "squarify"},
            }
        ],
        "layout": layout(
            520,
            margin={"l": 0, "r": 0, "t": 4, "b": 4},
            uniformtext={"minsize": 9, "mode": "hide"},
            meta={"legend": [{"name": k, "color": c, "shape": "square", "traces": []} for k, c in colour.items()]},
        ),
    }


def _pipeline(profile: Profile) -> str:
    candidate, whole = profile.subject.candidate, profile.whole
    if whole is None or candidate is None or candidate.space.pipeline is None:
        return ""
    pipeline, timed = candidate.space.pipeline, whole.ms is not None
    rows: list[list[Cell | str]] = []
    for part in whole.parts:
        macs = None if part.macs is None else part.macs * part.calls
        cells: list[Cell | str] = [
            profile.name if part.role == "denoiser" else part.name,
            Cell(text=str(part.calls), sort=part.calls),
            Cell(text=scaled(part.params), sort=part.params or 0),
            Cell(text=scaled(macs), sort=macs or 0),
        ]
        if profile.latency is not None:
            cells += [Cell(text=milliseconds(part.ms), sort=part.ms or 0.0), part.basis or UNKNOWN]
        rows.append(cells)
    header = ["part", "calls", "parameters", "MACs of all calls"]
    header += ["latency", "known as"] if profile.latency is not None else []
    sources = [f"{part.name}: {part.source}" for part in whole.parts if part.source and part.role != "denoiser"]
    guided = "with guidance, which doubles them" if pipeline.guidance else "without guidance"
    words = (
        f"{pipeline.steps} steps {guided}: {pipeline.source}. Together {scaled(whole.params)} parameters and"
        f" {scaled(whole.macs)} MACs"
        + (
            f" in {milliseconds(whole.ms)}, {milliseconds(whole.low_ms)} to {milliseconds(whole.high_ms)}"
            if timed
            else ""
        )
        + "."
        + (f" Unpublished, so in no total: {', '.join(whole.lacking)}." if whole.lacking else "")
    )
    return page.paragraph(escape(words), "note") + page.table(header, rows) + page.bullets(sources)


def _block_table(profile: Profile) -> str:
    timed = profile.latency is not None
    header = [
        "block",
        "kind",
        *(["latency", "share"] if timed else []),
        "parameters",
        "MACs",
        "weights",
        "activation traffic",
        "peak",
    ]
    rows: list[list[Cell | str]] = []
    for row in profile.blocks.to_dict("records"):
        cells: list[Cell | str] = [row["name"], row["kind"]]
        if timed:
            cells += [
                Cell(text=milliseconds(row["step_ms"]), sort=row["step_ms"]),
                Cell(text=percent(row["share"]), sort=row["share"]),
            ]
        cells += [Cell(text=scaled(row[c]), sort=row[c]) for c in ("params", "macs")]
        cells += [
            Cell(text=scaled(row[c], "B"), sort=row[c]) for c in ("weight_bytes", "activation_bytes", "peak_bytes")
        ]
        rows.append(cells)
    words = (
        f"Bytes at {profile.precision}. Activation traffic is what a block's operators read and write; peak is the most"
        " that is alive inside it. Click a head to sort."
    )
    return page.paragraph(escape(words), "note") + page.table(header, rows)


def _counters(profile: Profile) -> str:
    if not profile.counts:
        return ""
    ours = next(c.macs for c in profile.counts if c.name == OURS)
    rows: list[list[Cell | str]] = []
    for c in profile.counts:
        against = None if c.macs is None or not ours or c.name == OURS else c.macs / ours - 1
        rows.append(
            [
                c.name,
                Cell(text=f"{significant(c.macs / 1e9, 5)} G" if c.macs is not None else UNKNOWN, sort=c.macs or 0),
                Cell(text=difference(against), sort=against or 0.0),
                Cell(text=f"{c.params:,}" if c.params is not None else UNKNOWN, sort=c.params or 0),
                c.leaves_out,
            ]
        )
    words = f"The same network by each tool's own rules, at a latent of {profile.subject.latent}."
    return page.paragraph(escape(words), "note") + page.table(
        ["counter", "MACs", "against nas", "parameters", "leaves out"], rows
    )
