"""`nas measure`: how long things take on a device."""

from __future__ import annotations

from typing import Annotated

import typer

from nas.cli.browse import card_text
from nas.cli.console import Progress, closing, command_line, duration, note, result, result_json, resumable

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


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
