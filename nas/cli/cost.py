"""`nas profile` and `nas measure`: where a network's cost goes, and how long things take on a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nas.cli.browse import card_text
from nas.cli.console import Progress, closing, command_line, duration, note, result, result_json, resumable, table
from nas.cli.names import REPORTS, chosen, sized_space
from nas.paths import writable_dir

if TYPE_CHECKING:
    from nas.device import DeviceSheet
    from nas.profile import Profile, SpaceProfile

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def profile(
    subject: Annotated[str | None, typer.Argument(help="STUDY#CANDIDATE; without it, use --space.")] = None,
    space: Annotated[str | None, typer.Option(help="A space: the whole of it, or one network of it.")] = None,
    reference: Annotated[str | None, typer.Option(help="A published network of the space.")] = None,
    candidate: Annotated[str | None, typer.Option(help="name=value,… ; the rest is taken from --reference.")] = None,
    device: Annotated[str | None, typer.Option(help="Whose latency (nas devices); a study's own by default.")] = None,
    resolution: Annotated[int | None, typer.Option(metavar="PX", help="Image side instead of the space's.")] = None,
    counters: Annotated[bool, typer.Option("--counters", help="Also count MACs with torch, thop and fvcore.")] = False,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the latency's interval.")] = 0.8,
    samples: Annotated[int, typer.Option(min=10, help="Candidates drawn to profile a whole space.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of that draw.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The page (default reports/profiles/NAME.html).")] = None,
    as_json: Json = False,
) -> None:
    """Show where parameters, MACs, bytes and time go. For one network block by block, or for a whole space."""
    from nas import profile as profiling
    from nas.latency import load_predictor

    sheet = _profiled_device(subject, device)
    predictor = None if sheet is None else load_predictor(sheet.slug)
    precision = "fp32" if sheet is None else sheet.target.precision
    if subject is None and space is not None and reference is None and candidate is None:
        whole = sized_space(space, resolution)
        page = _page(out, f"{whole.name}-{whole.resolution_px}px")
        with resumable(command_line()), Progress("profile") as progress:
            spread = profiling.profile_space(
                whole, predictor, precision=precision, n=samples, seed=seed, progress=progress
            )
            profiling.space_page(spread, page)
        result_json(spread.to_json()) if as_json else _print_space(spread)
        following = f"nas search --space {whole.name} --budget 1.4s@iphone"
    else:
        network, name = chosen(subject, space, reference, candidate, resolution)
        page = _page(out, f"{network.space.name}-{name}-{network.space.resolution_px}px")
        with resumable(command_line()), Progress("profile") as progress:
            found = profiling.profile(
                network,
                predictor,
                name=name,
                precision=precision,
                confidence=confidence,
                counters=counters,
                progress=progress,
            )
            profiling.profile_page(found, page)
        result_json(found.to_json()) if as_json else _print_profile(found)
        following = f"nas export {subject}" if subject else f"nas profile --space {network.space.name}"
    closing(wrote=page, following=following, as_json=as_json)


def _profiled_device(subject: str | None, device: str | None) -> DeviceSheet | None:
    from nas.device import find_target

    if device is None and subject is not None:
        from nas.paths import find_study
        from nas.record import read_study

        device = str(read_study(find_study(subject.partition("#")[0]))["target"])
    return None if device is None else find_target(device)


def _page(out: Path | None, name: str) -> Path:
    path = out if out is not None else REPORTS / "profiles" / f"{name}.html"
    writable_dir(path.parent)
    return path


def _print_profile(found: Profile) -> None:
    header = ("block", "kind", "params", "MMACs", "weights MB", "moved MB", "ms", "share")
    rows = [
        (
            row["block"],
            row["kind"],
            int(row["params"]),
            float(row["macs"]) / 1e6,
            float(row["weight_bytes"]) / 1e6,
            float(row["activation_bytes"]) / 1e6,
            float(row["step_ms"]),
            None if found.latency is None else f"{row['share']:.1%}",
        )
        for row in found.blocks.to_dict("records")
    ]
    result(table(header, rows, left=2))
    total = found.total
    result(
        f"\n{found.name}: {total.params:,} parameters, {total.macs / 1e9:,.1f} GMACs a call, weights"
        f" {total.weight_bytes / 1e6:,.0f} MB and peak activations {total.peak_activation_bytes / 1e6:,.0f} MB in"
        f" {found.precision}"
    )
    if found.latency is not None:
        latency = found.latency
        result(
            f"{latency.target}: {latency.ms:.1f} ms a call, {latency.low_ms:.1f} to {latency.high_ms:.1f} in the"
            f" central {latency.confidence:.0%} interval (nas search bounds each side on its own)"
        )
        for warning in latency.warnings:
            note(warning)
    if found.counts:
        counted = [(c.counter, c.latent, c.macs and c.macs / 1e9, c.params, c.leaves_out) for c in found.counts]
        result("\n" + table(("counter", "latent", "GMACs", "params", "leaves out"), counted, right=(2, 3)))


def _print_space(found: SpaceProfile) -> None:
    frame = found.quantiles
    scales = {"params": ("M params", 1e6), "macs": ("G MACs", 1e9), "weight_bytes": ("weights MB", 1e6)}
    scales |= {"peak_activation_bytes": ("peak MB", 1e6), "step_ms": ("ms a call", 1.0)}
    known = {name: scale for name, scale in scales.items() if name in frame}
    rows = [
        (f"{share:.0%}", *(float(row[name]) / unit for name, (_, unit) in known.items()))
        for share, row in frame.iterrows()
    ]
    result(f"{found.space.name}, {found.sampled} of {found.space.size:,} combinations, in {found.precision}\n")
    result(table(("quantile", *(title for title, _ in known.values())), rows))
    cost = "step_ms" if "step_ms" in found.costs else "macs"
    strongest = list(found.importance(cost).items())
    result(
        f"\nchoices that move {scales[cost][0]}: " + ", ".join(f"{name} {factor:.2f}x" for name, factor in strongest)
    )


def measure(
    target: Annotated[str, typer.Option(help="A device that can be measured from here (nas devices).")],
    space: Annotated[str, typer.Option(help="The space whose blocks and networks are timed.")] = "snapgen_unet",
    blocks: Annotated[int, typer.Option(min=0, help="Distinct blocks at full size.")] = 64,
    networks: Annotated[int, typer.Option(min=0, help="Small whole networks.")] = 48,
    sessions: Annotated[int, typer.Option(min=1, help="Separated sessions per subject.")] = 2,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds per session (default: the sheet's, or 7).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of subjects and of their order.")] = 0,
    fit_only: Annotated[bool, typer.Option("--fit-only", help="Measure nothing; fit the rows there are.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be measured.")] = False,
    as_json: Json = False,
) -> None:
    """Time blocks and networks on a device. Appends to its table and fits its predictor; the same command resumes."""
    from nas import latency, tables
    from nas.device import find_target
    from nas.errors import NasError

    sheet = find_target(target)
    answer: dict[str, object] = {"target": sheet.slug}
    if dry_run:
        _print_subjects(space, target, blocks, networks, seed, as_json)
        return
    if not fit_only:
        from nas import measure as measuring
        from nas.space import load_space

        with resumable(command_line()), Progress("measure") as progress:
            summary = measuring.run(
                load_space(space),
                sheet,
                blocks=blocks,
                networks=networks,
                sessions=sessions,
                repeats=repeats,
                seed=seed,
                progress=progress.step,
            )
        answer["measured"] = vars(summary)
        note(
            f"{summary.rows} rows in {duration(summary.wall_s)}, {summary.flagged} flagged for drift,"
            f" {summary.skipped} subjects had their sessions already"
        )
        if summary.lacking:
            note(f"{summary.lacking} subjects lack steady sessions; the same command measures them again")
    try:
        predictor = latency.refit(sheet.slug)
    except NasError as error:
        if fit_only:
            raise
        # The rows are written and stay: a table may be filled by several runs before it can be fitted.
        note(f"no predictor yet: {error.message}")
        answer["predictor"] = None
    else:
        answer["predictor"] = dict(predictor.card)
        if not as_json:
            result(card_text(predictor.card))
    if as_json:
        result_json(answer)
    closing(wrote=tables.table_path(sheet.slug, ".csv"), following=f"nas devices show {sheet.alias}", as_json=as_json)


def _print_subjects(space: str, target: str, blocks: int, networks: int, seed: int, as_json: bool) -> None:
    from nas import measure as measuring
    from nas.device import find_target
    from nas.space import load_space

    sheet = find_target(target)
    _, limits = measuring.settings(sheet)
    subjects = measuring.choose(load_space(space), blocks, networks, seed=seed, limits=limits, batch=sheet.target.batch)
    if as_json:
        result_json(
            [{"key": s.key, "kind": s.kind, "name": s.name, "macs": s.macs, "params": s.params} for s in subjects]
        )
        return
    for subject in subjects:
        result(f"{subject.kind:9} {subject.key:12} {subject.macs / 1e9:8.3f} GMAC  {subject.name}")
    closing(following=command_line(leave_out=("--dry-run",)))
