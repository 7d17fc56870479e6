"""What `nas profile` prints: tables of stages, blocks, operations and pipelines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from nas.cli.console import cell, note, result, table

if TYPE_CHECKING:
    from nas.profile import Comparison, Profile, SpaceProfile

_UNITS = {"params": ("million parameters", 1e6), "macs": ("GMACs", 1e9), "step_ms": ("ms", 1.0)}


def print_profile(found: Profile) -> None:
    """One network: its stages and parts, operators, blocks, speed, an image of its pipeline, totals, and counters."""
    subject, total, timed = found.subject, found.total, found.latency is not None
    result(f"{subject.name}: one {subject.call} for an image of {subject.image} px (latent {subject.latent})")
    result(f"{subject.place or 'its place in our spaces was not looked for'}")
    result(f"{found.headline}\n")
    groups = list(found.operations)
    header = ["stage", "M params", "GMACs", *groups, "weights MB", "moved MB", *(["ms"] if timed else [])]
    result(table(header, [_cost_row(str(name), row, groups, timed) for name, row in found.stages.iterrows()]))
    _print_shares(found)
    _print_kinds(found)
    _print_blocks(found)
    shares = ", ".join(f"{group} {macs / max(total.macs, 1):.1%}" for group, macs in found.operations.items())
    result(
        f"\n{found.name}: {total.params:,} parameters, {cell(total.macs / 1e9)} GMACs a call ({shares}), weights"
        f" {cell(total.weight_bytes / 1e6)} MB and peak activations {cell(total.peak_activation_bytes / 1e6)} MB in"
        f" {found.precision}"
    )
    _print_latency(found)
    _print_pipeline(found)
    _print_counters(found)


def _print_shares(found: Profile) -> None:
    """Stage by part, in percent of the network."""
    rows = found.shares.to_dict("records")
    titles = {"step_ms": "ms %", "macs": "MACs %", "params": "params %"}
    known = [m for m in titles if found.shares[m].notna().all()]
    header = ["stage", "part", "blocks", *(titles[m] for m in known)]
    lines = [[r["stage"], r["part"], r["blocks"], *(f"{100 * r[m]:.1f}" for m in known)] for r in rows]
    result("\n" + table(header, lines, left=2))


def _print_kinds(found: Profile) -> None:
    """What the network does by kind of operator, the slowest first."""
    timed = found.latency is not None
    rows: list[list[object]] = []
    for name, row in found.kinds.iterrows():
        cells: list[object] = [str(name), int(row["count"]), float(row["macs"]) / 1e9, float(row["bytes"]) / 1e6]
        if timed:
            ms = float(row["step_ms"])
            rate = float(row["macs"]) / 1e6 / ms if ms and row["macs"] else None
            moved = float(row["bytes"]) / 1e6 / ms if ms else None
            cells += [ms, f"{row['share']:.1%}", rate, moved]
        rows.append(cells)
    header = ["operator", "operators", "GMACs", "moved MB", *(["ms", "share", "GMAC/s", "GB/s"] if timed else [])]
    result("\n" + table(header, rows))


def _print_blocks(found: Profile) -> None:
    """Every block; with a device its time and speed, without one its MACs by operation."""
    timed, groups = found.latency is not None, list(found.operations)
    rates, measured = found.rates, found.measured
    inside = {} if measured is None else measured.in_network_ms
    header = ["block", "kind", "M params", "GMACs", *([] if timed else groups), "weights MB", "moved MB"]
    header += ["ms", "share", "GMAC/s", "of roof"] if timed else []
    header += ["alone ms", *(["in net ms"] if inside else [])] if measured is not None else []
    rows: list[list[object]] = []
    for row in found.blocks.to_dict("records"):
        name, *costs = _cost_row(row["name"], row, [] if timed else groups, timed)
        cells = [name, row["kind"], *costs]
        if timed:
            reached = float(rates["predicted_of_roof"][name])
            speed = float(rates["predicted_gmac_s"][name])
            cells += [f"{row['share']:.1%}", speed, "-" if math.isnan(reached) else f"{reached:.0%}"]
        if measured is not None:
            cells += [measured.blocks_ms[row["name"]], *([inside.get(row["name"])] if inside else [])]
        rows.append(cells)
    result("\n" + table(header, rows, left=2))


def _print_latency(found: Profile) -> None:
    from nas.profile.statements import measured_statements, roof_statements

    if found.latency is not None:
        latency = found.latency
        result(
            f"{latency.target}: {latency.ms:.1f} ms a call, {latency.low_ms:.1f} to {latency.high_ms:.1f} in the"
            f" central {latency.confidence:.0%} interval (nas search bounds each side on its own)"
        )
        for warning in latency.warnings:
            note(warning)
    for statement in (*roof_statements(found), *measured_statements(found)):
        result(statement)


def _print_counters(found: Profile) -> None:
    """Each counter's figure, and in one line why it differs."""
    if not found.counts:
        return
    counted = [(c.name, c.macs and c.macs / 1e9, c.params, c.why) for c in found.counts]
    result(f"\nMACs by other counters, at a latent of {found.counts[0].latent}")
    result(table(("counter", "GMACs", "params", "why it differs"), counted, right=(1, 2)))


def _cost_row(name: str, row: Any, groups: list[str], timed: bool) -> list[object]:
    """Name, parameters, MACs with their groups, bytes and milliseconds of a block or a stage."""
    macs = [float(row[column]) / 1e9 for column in ("macs", *(f"{group}_macs" for group in groups))]
    moved = [float(row[column]) / 1e6 for column in ("weight_bytes", "activation_bytes")]
    return [name, float(row["params"]) / 1e6, *macs, *moved, *([float(row["step_ms"])] if timed else [])]


def _print_pipeline(found: Profile) -> None:
    candidate, whole = found.subject.candidate, found.whole
    if whole is None or candidate is None or candidate.space.pipeline is None:
        return
    pipeline, timed = candidate.space.pipeline, found.latency is not None
    rows: list[list[object]] = []
    for part in whole.parts:
        name = found.name if part.role == "denoiser" else part.name
        macs = None if part.macs is None else part.macs * part.calls / 1e9
        row = [part.role.removesuffix("s").replace("_", " "), name, part.calls, part.params and part.params / 1e6, macs]
        rows.append([*row, part.ms, part.basis or "not known"] if timed else row)
    rows.append(["all", "", "", whole.params / 1e6, whole.macs / 1e9, *([whole.ms, ""] if timed else [])])
    guided = "with guidance (two calls each)" if pipeline.guidance else "without guidance"
    result(f"\none image: {pipeline.steps} steps {guided}")
    header = ("part", "name", "calls", "M params", "GMACs", *(("ms", "known as") if timed else ()))
    result(table(header, rows, right=(2, 3, 4, 5)))
    if timed and whole.low_ms is not None and whole.high_ms is not None:
        result(f"between {whole.low_ms:,.0f} and {whole.high_ms:,.0f} ms")
    for part in whole.parts:
        if timed and part.ms is None:
            note(f"{part.name}: {part.source}")
    if whole.lacking:
        note(f"in no total, because their layers are not published: {', '.join(whole.lacking)}")


def print_comparison(found: Comparison) -> None:
    """Networks side by side: by stage, by kind of operation, in total, and what makes the difference."""
    subject, names = found.profiles[0].subject, found.names
    result(f"one {subject.call} each for an image of {subject.image} px")
    for profile in found.profiles:
        result(f"  {profile.name}: {profile.subject.place or profile.subject.source}")
    totals = found.totals()
    timed = all(profile.latency is not None for profile in found.profiles)
    for measure in ("params", "macs", *(("step_ms",) if timed else ())):
        title, unit = _UNITS[measure]
        stages = found.stages(measure) / unit
        rows: list[list[object]] = [[str(stage), *map(float, stages.loc[stage])] for stage in stages.index]
        whole = [float(totals[measure][name]) / unit for name in names]
        rows += [["all", *whole], [f"relative to {names[0]}", *(value / whole[0] for value in whole)]]
        result("\n" + table([title, *names], rows))
    rows = []
    for group in found.profiles[0].operations:
        macs = {p.name: p.operations[group] / 1e9 for p in found.profiles}
        shares = [f"{macs[p.name]:,.1f} ({p.operations[group] / max(p.total.macs, 1):.0%})" for p in found.profiles]
        rows.append([group, *shares])
    result("\n" + table(["GMACs by operation", *names], rows))
    result()
    for sentence in found.sentences():
        result(sentence)


def print_space(found: SpaceProfile) -> None:
    """A whole space: quantiles of the costs, and which choices move them."""
    frame = found.quantiles
    scales = {"params": ("M params", 1e6), "macs": ("GMACs", 1e9), "weight_bytes": ("weights MB", 1e6)}
    scales |= {"peak_activation_bytes": ("peak MB", 1e6), "step_ms": ("ms a call", 1.0)}
    known = {name: scale for name, scale in scales.items() if name in frame}
    rows = [
        (f"{share:.0%}", *(float(row[name]) / unit for name, (_, unit) in known.items()))
        for share, row in frame.iterrows()
    ]
    result(f"{found.space.name}: {found.sampled:,} of {found.space.extent}, in {found.precision}\n")
    result(table(("quantile", *(title for title, _ in known.values())), rows))
    cost = "step_ms" if "step_ms" in found.costs else "macs"
    strongest = [(name, factor) for name, factor in found.importance(cost).items() if math.isfinite(factor)]
    result(
        f"\nchoices that move {scales[cost][0]}: " + ", ".join(f"{name} {factor:.2f}x" for name, factor in strongest)
    )
