"""`nas measure`: how long things take on a device, measured here or brought from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.console import Progress, closing, command_line, duration, note, result, result_json, resumable, table
from nas.cli.devices import card_text
from nas.cli.remeasured import kit_following, print_remeasured
from nas.errors import NasError, UsageError

if TYPE_CHECKING:
    from nas.device import DeviceSheet
    from nas.measure.subjects import Subject
    from nas.space import SearchSpace

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_BLOCKS, _NETWORKS, _ADAPTING, _LISTED = 64, 48, 5, 20


def measure(
    target: Annotated[str | None, typer.Option(help="A device (nas devices); a study has its own.")] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(help="A space whose blocks and networks are timed; may be given again. Without: every space."),
    ] = None,
    blocks: Annotated[int | None, typer.Option(min=0, help="Distinct blocks at full size (default 64).")] = None,
    networks: Annotated[
        int | None, typer.Option(min=0, help="Small whole networks (default 48; 5 to adapt; 20 to list).")
    ] = None,
    sessions: Annotated[int | None, typer.Option(min=1, help="Separated sessions per subject (default 2).")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds per session (default: the sheet's, or 7).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of subjects and of their order.")] = 0,
    like: Annotated[
        str | None, typer.Option(metavar="TARGET", help="Take the subjects of that target's table first, to compare.")
    ] = None,
    adapt_from: Annotated[
        str | None,
        typer.Option(metavar="TARGET", help="Measure the few networks that tell most; fit with that target as prior."),
    ] = None,
    untuned: Annotated[bool, typer.Option("--untuned", help="Fit a target whose sheet says untuned, too.")] = False,
    fit_only: Annotated[bool, typer.Option("--fit-only", help="Measure nothing; fit the rows there are.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="List the networks to measure, also for a device on another machine.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be measured here.")] = False,
    kit: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write the networks as files, with a table to fill.")
    ] = None,
    file_format: Annotated[
        str | None, typer.Option("--format", help="Of the kit, a file of nas/exporters/ (default: the runtime's).")
    ] = None,
    brought: Annotated[
        Path | None, typer.Option("--import", metavar="CSV", help="Add rows measured elsewhere (docs/measurements.md).")
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="Measure a study's finalists at full size (--networks of its front).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time blocks and networks on a device. Appends to its table and fits its predictor; the same command resumes."""
    _one_of(
        {
            "--fit-only": fit_only,
            "--plan": plan,
            "--dry-run": dry_run,
            "--kit": kit is not None,
            "--import": brought is not None,
            "--study": study is not None,
        }
    )
    if study is not None:
        _measure_study(study, target, networks or _ADAPTING, sessions, repeats, untuned, as_json)
        return
    from nas.device import find_target

    if target is None:
        raise UsageError("missing option '--target'", hint="nas devices")
    sheet = find_target(target)
    source = None if adapt_from is None else find_target(adapt_from)
    if source is not None:
        _check_adapting(space, blocks, like)
    if plan or dry_run or kit is not None:
        subjects = _subjects(sheet, source, space, blocks, networks, seed, like, whole=not dry_run)
        if kit is None:
            _print_subjects(subjects, sheet, as_json, dry_run=dry_run)
        else:
            _write_kit(subjects, sheet, kit, file_format, as_json)
        return
    if source is not None:
        from nas.measure.sheets import write_prior

        if write_prior(sheet, source):
            note(f'{sheet.path}: [fit] now says prior = "{source.slug}", so that the fit can be made again')
            sheet = find_target(target)
    answer: dict[str, Any] = {"target": sheet.slug}
    if brought is not None:
        answer["imported"] = _import(brought, sheet)
    elif not fit_only:
        answer["measured"] = _measure(sheet, source, space, blocks, networks, sessions, repeats, seed, like)
    answer["predictor"] = fitted(sheet, untuned=untuned, required=fit_only, as_json=as_json)
    _close(sheet, answer, as_json)


def _one_of(modes: dict[str, bool]) -> None:
    asked = [name for name, given in modes.items() if given]
    if len(asked) > 1:
        raise UsageError(
            f"{' and '.join(asked)} are different things to do; give one of them", hint="nas measure --help"
        )


def _check_adapting(space: Sequence[str] | None, blocks: int | None, like: str | None) -> None:
    given = {"--space": space, "--blocks": blocks, "--like": like}
    if names := [name for name, value in given.items() if value]:
        raise UsageError(
            f"{', '.join(names)} has no effect with --adapt-from: the subjects come from that target's table"
        )


def _measure(
    sheet: DeviceSheet,
    source: DeviceSheet | None,
    space: Sequence[str] | None,
    blocks: int | None,
    networks: int | None,
    sessions: int | None,
    repeats: int | None,
    seed: int,
    like: str | None,
) -> dict[str, Any]:
    """Measures, with a bar over all sessions, and says what came of it."""
    from nas import measure as measuring
    from nas.device import find_target

    with resumable(command_line()), Progress("measure") as progress:

        def report(message: str, done: int, total: int) -> None:
            progress("measure" if total else "prepare", done, total, message)

        if source is None:
            summary = measuring.run(
                _spaces(space),
                sheet,
                blocks=_BLOCKS if blocks is None else blocks,
                networks=_NETWORKS if networks is None else networks,
                sessions=sessions or 2,
                repeats=repeats,
                seed=seed,
                like=None if like is None else find_target(like),
                progress=report,
            )
        else:
            report("choosing the most telling networks", 0, 0)
            subjects = _subjects(sheet, source, None, None, networks, seed, None)
            summary = measuring.run_subjects(
                subjects, sheet, known=subjects, sessions=sessions or 2, repeats=repeats, seed=seed, progress=report
            )
    note(
        f"{summary.rows} rows in {duration(summary.wall_s)}, {summary.flagged} flagged for drift,"
        f" {summary.skipped} subjects had their sessions already"
    )
    if summary.lacking:
        note(f"{summary.lacking} subjects lack steady sessions; the same command measures them again")
    return vars(summary)


def _import(path: Path, sheet: DeviceSheet) -> dict[str, Any]:
    """Adds the rows of a file, all or none."""
    from nas.measure.bring import bring

    found = bring(path, sheet)
    empty = f"; {found.empty} lines have no time yet" if found.empty else ""
    if found.rows:
        known = f", {found.known} were there already" if found.known else ""
        note(f"{found.rows} rows of {found.networks} subjects added{known}{empty}")
    else:
        note(f"nothing was added: all {found.known} rows of {path} are in the table already{empty}")
    return vars(found)


def fitted(sheet: DeviceSheet, *, untuned: bool, required: bool, as_json: bool) -> dict[str, Any] | None:
    """Fits a target as its table is now and prints the card; None, with a note of the reason, where it cannot be.

    Args:
        sheet: the target.
        untuned: fit it although its sheet says that its runtime is not tuned.
        required: whether not being able to is an error; rows that were just written stay in any case.
        as_json: print no card.
    """
    from nas import latency

    try:
        if sheet.options.get("untuned") and not untuned:
            raise NasError(
                f"{sheet.alias} is not fitted: {sheet.path} says untuned = true, and untuned TVM is 20 to 50 times"
                " slower than onnxruntime and need not rank networks alike",
                hint=f"nas measure --target {sheet.alias} --fit-only --untuned",
            )
        predictor = latency.refit(sheet.slug)
    except NasError as error:
        if required:
            raise
        # The rows are written and stay: a table may be filled by several runs before it can be fitted.
        note(f"no predictor yet: {error.message}")
        return None
    if not as_json:
        result(card_text(predictor.card))
    return dict(predictor.card)


def _close(sheet: DeviceSheet, answer: dict[str, Any], as_json: bool) -> None:
    from nas import tables

    if as_json:
        result_json(answer)
    closing(wrote=tables.table_path(sheet.slug, ".csv"), following=f"nas devices show {sheet.alias}", as_json=as_json)


def _spaces(names: Sequence[str] | None) -> tuple[SearchSpace, ...]:
    from nas.space import list_spaces, load_space

    return tuple(load_space(name) for name in dict.fromkeys(names or list_spaces()))


def _subjects(
    sheet: DeviceSheet,
    source: DeviceSheet | None,
    space: Sequence[str] | None,
    blocks: int | None,
    networks: int | None,
    seed: int,
    like: str | None,
    whole: bool = False,
) -> tuple[Subject, ...]:
    """What is to be measured; `whole`: whole networks unless blocks are asked for, since people time those."""
    from nas import measure as measuring
    from nas.device import find_target

    if source is not None:
        from nas.measure.informative import adapting_subjects

        return adapting_subjects(sheet, source, _ADAPTING if networks is None else networks)
    if not whole:
        measuring.settings(sheet)
    found = measuring.plan(
        _spaces(space),
        sheet,
        (0 if whole else _BLOCKS) if blocks is None else blocks,
        (_LISTED if whole else _NETWORKS) if networks is None else networks,
        seed=seed,
        like=None if like is None else find_target(like),
    )
    return tuple(s for s in found if s.spec) if whole else found


def _print_subjects(subjects: Sequence[Subject], sheet: DeviceSheet, as_json: bool, *, dry_run: bool) -> None:
    from nas.measure.kit import inputs_text

    if as_json:
        result_json(
            [
                {
                    "key": s.key,
                    "kind": s.kind,
                    "name": s.name,
                    "inputs": inputs_text(s, sheet.target.batch),
                    "macs": s.macs,
                    "params": s.params,
                }
                for s in subjects
            ]
        )
        return
    header = ("subject", "kind", "GMAC", "M params", "name")
    rows = [(s.key, s.kind, f"{s.macs / 1e9:.3f}", f"{s.params / 1e6:.1f}", s.name) for s in subjects]
    result(table(header, rows, right=(2, 3)))
    if dry_run:
        closing(following=command_line(leave_out=("--dry-run",)))
    else:
        closing(following=f"{command_line(leave_out=('--plan',))} --kit kit")


def _write_kit(
    subjects: Sequence[Subject], sheet: DeviceSheet, folder: Path, file_format: str | None, as_json: bool
) -> None:
    from nas.measure.kit import write_kit

    with Progress("kit") as progress:
        kit = write_kit(subjects, sheet, folder, file_format=file_format, progress=progress.step)
    if as_json:
        result_json({"target": sheet.slug, "folder": kit.folder, "files": kit.files, "script": kit.script})
    else:
        result(f"{len(kit.files)} networks for {sheet.alias}; {kit.folder / 'README.txt'} says how to time them")
    closing(wrote=kit.folder, following=kit_following(kit, sheet.alias), as_json=as_json)


def _measure_study(
    study: str,
    target: str | None,
    count: int,
    sessions: int | None,
    repeats: int | None,
    untuned: bool,
    as_json: bool,
) -> None:
    """Measures the finalists of a study on its target."""
    from nas.device import find_target
    from nas.paths import find_study
    from nas.record import read_study
    from nas.remeasure import remeasure

    folder = find_study(study)
    sheet = find_target(read_study(folder)["target"])
    if target is not None and find_target(target).slug != sheet.slug:
        raise UsageError(
            f"study {folder.name} is for {sheet.slug}, and its finalists are measured there, not on {target}"
        )
    with resumable(command_line()), Progress("remeasure") as progress:
        found = remeasure(
            folder,
            count,
            sessions=sessions,
            repeats=repeats,
            progress=lambda message, done, total: progress("measure" if total else "prepare", done, total, message),
        )
    card = None
    if found.rows:
        card = fitted(sheet, untuned=untuned, required=False, as_json=True)
    if as_json:
        result_json({**found.to_json(), "predictor": card})
    print_remeasured(found, card, as_json)
