"""The tables of a network's page."""

from __future__ import annotations

import math

from nas import page
from nas.page import Cell, escape
from nas.page.numbers import UNKNOWN, known, milliseconds, percent, scaled, significant
from nas.profile.counters import OURS
from nas.profile.measured import Measured
from nas.profile.network import Profile
from nas.profile.operators import OPERATIONS
from nas.profile.words import difference


def share_table(profile: Profile) -> str:
    """Stage by part: which share of parameters, MACs and time is where."""
    found = profile.shares
    measures = [m for m in ("step_ms", "macs", "params") if found[m].notna().all()]
    titles = {"step_ms": "time %", "macs": "MACs %", "params": "params %"}
    rows: list[list[Cell | str]] = []
    for row in found.to_dict("records"):
        # A bar is as long as its column's greatest, because no share comes near the whole.
        shares = [Cell(text=f"{100 * row[m]:.1f}", sort=row[m], share=row[m] / found[m].max()) for m in measures]
        rows.append([row["stage"], row["part"], *shares])
    return page.table(["stage", "part", *(titles[m] for m in measures)], rows)


def kind_table(profile: Profile) -> str:
    """What the network does, by kind of operator."""
    timed = profile.latency is not None
    header = ["operator", *(["latency", "share"] if timed else []), "operators", "MACs", "moved", "parameters"]
    header += ["GMAC/s", "GB/s"] if timed else []
    rows: list[list[Cell | str]] = []
    for name, row in profile.kinds.iterrows():
        cells: list[Cell | str] = [str(name)]
        if timed:
            cells.append(Cell(text=milliseconds(row["step_ms"]), sort=row["step_ms"]))
            cells.append(Cell(text=percent(row["share"]), sort=row["share"], share=row["share"]))
        cells.append(Cell(text=f"{row['count']:,.0f}", sort=row["count"]))
        cells += [
            Cell(text=scaled(row[c], unit), sort=row[c]) for c, unit in (("macs", ""), ("bytes", "B"), ("params", ""))
        ]
        if timed:
            cells += [_rate(row["macs"], row["step_ms"]), _rate(row["bytes"], row["step_ms"])]
        rows.append(cells)
    words = "Moved is what the operators read and write, weights included." + (
        " Latency is the predictor's contribution of each kind; a fit divides time between kinds that occur together"
        " less surely than it tells their sum."
        if timed
        else ""
    )
    return page.paragraph(words, "note") + page.table(header, rows)


def _rate(amount: float, ms: float) -> Cell:
    """10^9 a second."""
    value = amount / 1e6 / ms if ms and amount else math.nan
    return Cell(text=significant(value), sort=value if known(value) else 0.0)


def times_table(profile: Profile, measured: Measured) -> str:
    """Each block predicted and measured."""
    inside = measured.in_network_ms
    header = ["block", "predicted", "alone", *(["in the network"] if inside else []), "predicted against measured"]
    rows: list[list[Cell | str]] = []
    for row in profile.rates.rename_axis("name").reset_index().to_dict("records"):
        times = [row["predicted_ms"], measured.blocks_ms[row["name"]]]
        times += [inside.get(row["name"], math.nan)] if inside else []
        off = row["predicted_ms"] / row["measured_ms"] - 1
        cells = [Cell(text=milliseconds(ms), sort=ms if known(ms) else 0.0) for ms in times]
        rows.append([row["name"], *cells, _against(off)])
    return page.table(header, rows)


def _against(off: float) -> Cell:
    return Cell(text=difference(off) if known(off) else UNKNOWN, sort=off if known(off) else 0.0)


def runtime_table(measured: Measured) -> str:
    """The runtime's own operators by kernel time; the unmapped are told below."""
    nodes = measured.nodes
    if nodes is None:
        return ""
    rows: list[list[Cell | str]] = [
        [
            name,
            Cell(text=milliseconds(ms), sort=ms),
            Cell(text=percent(ms / nodes.kernel_ms), sort=ms, share=ms / nodes.kernel_ms),
        ]
        for name, ms in nodes.by_operator().items()
    ]
    lost = [f"not mapped: {node.operator} {node.name}: {milliseconds(node.ms)}" for node in nodes.unmapped[:20]]
    return page.table(["operator of onnxruntime", "kernels", "share"], rows) + page.bullets(lost)


def stage_table(profile: Profile) -> str:
    """Every stage with its cost."""
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


def pipeline_table(profile: Profile) -> str:
    """A whole image; empty without a pipeline."""
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


def block_table(profile: Profile) -> str:
    """Every block with its cost."""
    timed = profile.latency is not None
    header = [
        "block",
        "kind",
        *(["latency", "share", "GMAC/s", "of the roof"] if timed else []),
        "parameters",
        "MACs",
        "weights",
        "activation traffic",
        "peak",
    ]
    rows: list[list[Cell | str]] = []
    of_roof = profile.rates["predicted_of_roof"]
    for row in profile.blocks.to_dict("records"):
        cells: list[Cell | str] = [row["name"], row["kind"]]
        if timed:
            reached = float(of_roof[row["name"]])
            cells += [
                Cell(text=milliseconds(row["step_ms"]), sort=row["step_ms"]),
                Cell(text=percent(row["share"]), sort=row["share"], share=row["share"]),
                _rate(row["macs"], row["step_ms"]),
                Cell(text=percent(reached), sort=reached if known(reached) else 0.0),
            ]
        cells += [Cell(text=scaled(row[c]), sort=row[c]) for c in ("params", "macs")]
        cells += [
            Cell(text=scaled(row[c], "B"), sort=row[c]) for c in ("weight_bytes", "activation_bytes", "peak_bytes")
        ]
        rows.append(cells)
    words = (
        f"Bytes at {profile.precision}. Activation traffic is what a block's operators read and write; peak is the most"
        " that is alive inside it." + (" GMAC/s and the roof as predicted." if timed else "") + " Click a head to sort."
    )
    return page.paragraph(escape(words), "note") + page.table(header, rows)


def counter_table(profile: Profile) -> str:
    """The counters side by side, and why each differs."""
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
                c.why,
            ]
        )
    words = f"The same network by each tool's own rules, at a latent of {profile.subject.latent}."
    return page.paragraph(escape(words), "note") + page.table(
        ["counter", "MACs", "against nas", "parameters", "why it differs"], rows
    )
