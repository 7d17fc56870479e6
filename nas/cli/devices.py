"""`nas devices`: the targets, how well each is known, and every row that this rests on. Nothing here imports torch."""

from __future__ import annotations

import datetime
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.cli.console import cell, closing, note, result, result_json, table
from nas.errors import NasError

if TYPE_CHECKING:
    from nas.device import DeviceSheet
    from nas.latency import Residual
    from nas.tables import Measurement

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_WORST = 10
_WIDTH = 100

devices = typer.Typer(
    help="List the target devices; `show NAME` prints what one's predictor rests on; `add NAME` makes a new one.",
    invoke_without_command=True,
)


@devices.callback()
def list_all_devices(context: typer.Context, as_json: Json = False) -> None:
    """List the target devices; `show NAME` prints what one's predictor rests on; `add NAME` makes a new one."""
    if context.invoked_subcommand is not None:
        return
    from nas import tables
    from nas.device import list_targets

    sheets = list_targets()
    if as_json:
        result_json([_device_record(sheet) for sheet in sheets])
        return
    rows = []
    for sheet in sheets:
        card, _ = _card(sheet)
        held_out, measured = card.get("held_out", {}), tables.read(sheet.slug)
        rows.append(
            (
                sheet.alias,
                sheet.backend or "published",
                len(measured),
                card.get("networks"),
                _percent(held_out.get("mape")),
                _percent(held_out.get("coverage", {}).get("0.8", {}).get("measured")),
                _age(_newest(measured)),
            )
        )
    header = ("device", "measured by", "rows", "networks", "held-out error", "covered of 80 %", "newest row")
    result(table(header, rows, left=2))
    closing(following=f"nas devices show {sheets[0].alias}" if sheets else None)


@devices.command("show")
def show_device(
    name: Annotated[str, typer.Argument(help="A device's alias or full target name.")],
    every_row: Annotated[bool, typer.Option("--rows", help="Print every row, not only the worst predicted.")] = False,
    as_json: Json = False,
) -> None:
    """Print one device: its predictor's card, its rows with their sources, and how far each was predicted off."""
    from nas import tables
    from nas.device import find_target

    sheet = find_target(name)
    measured = tables.read(sheet.slug)
    if as_json:
        result_json(_device_record(sheet, measured))
        return
    _say(f"{sheet.slug}: {sheet.summary}", "")
    _say(f"chip {sheet.chip or 'not stated'}; aliases {', '.join(sheet.aliases) or 'none'}", "")
    card, missing = _card(sheet)
    result()
    if missing:
        _say(missing, "")
    else:
        result(card_text(card))
        _print_chips(card)
    _print_residuals(_residuals(card), every_row)
    _print_parts(sheet, measured)
    _print_excluded(sheet, measured, every_row)
    result("\nsources")
    for source in sheet.sources:
        _say(source, "  ")
    result(f"file {sheet.path}")
    closing(following=_following(sheet, missing))


def _following(sheet: DeviceSheet, missing: str | None) -> str:
    if missing is None:
        return f"nas profile --space snapgen_unet --reference snapgen --device {sheet.alias}"
    return f"nas measure --target {sheet.alias}" + ("" if sheet.backend else " --plan")


@devices.command("add")
def add_device(
    name: Annotated[str, typer.Argument(help="DEVICE--RUNTIME--PRECISION, such as pixel-9--tflite--fp16.")],
    adapt_from: Annotated[
        str | None, typer.Option(help="The most similar target: its costs are the prior of every fit.")
    ] = None,
    chip: Annotated[str, typer.Option(help="The processor's name.")] = "",
    alias: Annotated[list[str] | None, typer.Option(help="A shorter name; may be given again.")] = None,
    backend: Annotated[str | None, typer.Option(help="A file of nas/backends/ that runs it from here.")] = None,
    gmac_per_s: Annotated[float | None, typer.Option(help="Giga-MACs a second, at best.")] = None,
    gb_per_s: Annotated[float | None, typer.Option(help="Gigabytes of memory a second.")] = None,
    as_json: Json = False,
) -> None:
    """Make a target of your own: writes its device sheet. Rows come from nas measure, here or by --import."""
    from nas.device import find_target
    from nas.measure.sheets import add_target

    given = {"ms_per_gmac": _inverse("--gmac-per-s", gmac_per_s), "ms_per_gb": _inverse("--gb-per-s", gb_per_s)}
    figures = {key: value for key, value in given.items() if value is not None}
    if figures and adapt_from is None:
        # What a call costs beside its work is far less certain than either figure, and decides far less.
        figures["ms_per_op"] = 0.005
    sheet = add_target(
        name,
        adapt_from=None if adapt_from is None else find_target(adapt_from),
        chip=chip,
        aliases=alias or (),
        backend=backend,
        figures=figures,
    )
    if not figures:
        note(f"its roofline is that of {adapt_from}; --gmac-per-s and --gb-per-s give its own, which finds unit errors")
    if as_json:
        result_json(_device_record(sheet))
    source = "" if adapt_from is None else f" --adapt-from {adapt_from}"
    following = f"nas measure --target {sheet.alias}{source}" + ("" if backend else " --plan")
    closing(wrote=sheet.path, following=following, as_json=as_json)


def _inverse(option: str, per_second: float | None) -> float | None:
    """Milliseconds for one of what a device does so many of in a second."""
    from nas.errors import UsageError

    if per_second is None:
        return None
    if not 0 < per_second < float("inf"):
        raise UsageError(f"{option} must be a positive number, got {per_second:g}")
    return 1000.0 / per_second


def card_text(card: Mapping[str, Any]) -> str:
    """A predictor's card as lines: what it was fitted on, how wrong it is on networks it has not seen, and where."""
    held_out = card["held_out"]
    worst = held_out["worst"]
    low, high = card["fitted_range_ms"]
    prior = card.get("prior") or {}
    lines = [
        ("rows", f"{card['rows']} ({card['networks']} networks), {card['blocks']} blocks"),
        ("excluded", f"{card.get('excluded', 0)} flagged or excluded rows"),
        ("sessions", cell(card.get("sessions"))),
        ("newest row", _age(card.get("newest")) or "no date"),
        ("fitted range", f"{cell(low)} to {cell(high)} ms"),
        ("prior", f"the costs of {prior['target']}" if "target" in prior else "the roofline of its sheet"),
        (f"held out ({held_out['method']})", f"{held_out['rows']} rows"),
        ("  mean error (MAPE)", _percent(held_out["mape"])),
        ("  within 5 / 10 %", f"{_percent(held_out['within_5'])} / {_percent(held_out['within_10'])}"),
        ("  Kendall tau", cell(held_out["kendall"])),
        ("  Spearman rho", cell(held_out["spearman"])),
        ("  worst", f"{worst['subject']} {worst['chip'] or ''} {worst['error']:+.1%}"),
        *(
            (
                f"  coverage {level}",
                f"{_percent(found['measured'])} of {found['rows']} (nominal {found['nominal']:.0%})",
            )
            for level, found in held_out["coverage"].items()
        ),
        ("interval", f"{card['interval']['method']}, {card['interval']['networks']} networks left out in turn"),
        ("noise floor", _noise(card.get("noise_floor"))),
        ("never seen", ", ".join(card["never_seen"]) or "nothing: every operator kind has been fitted"),
        *(("note", text) for text in card.get("notes") or ()),
    ]
    width = max(len(name) for name, _ in lines)
    indent = " " * (width + 2)
    return "\n".join(
        textwrap.fill(f"{name.ljust(width)}  {value}".rstrip(), _WIDTH, subsequent_indent=indent)
        for name, value in lines
    )


def _print_chips(card: Mapping[str, Any]) -> None:
    """How the chips that are pooled compare: each one's time over the target's."""
    if card.get("chips"):
        counts = Counter(row["chip"] for row in card.get("residuals", ()))
        rows = [(chip, counts[chip], f"{factor:.2f}") for chip, factor in card["chips"].items()]
        result("\n" + table(("pooled chip", "rows", "times slower"), rows))


def _print_residuals(found: Sequence[Residual], every_row: bool) -> None:
    """The rows beside what a fit without their network says; the worst where there are many."""
    if not found:
        return
    shown = sorted(found, key=lambda r: -abs(r.error))
    shown = shown if every_row else shown[:_WORST]
    sources = {source: i for i, source in enumerate(dict.fromkeys(r.source for r in found if r.source), start=1)}
    numbered = len(sources) > 1
    header = ("row", "chip", "ms", "predicted", "error", "80 % interval", *(("source",) if numbered else ()))
    rows = [
        (
            _cut(r.name, 40),
            _cut(r.chip, 14),
            r.ms,
            r.predicted,
            f"{r.error:+.1%}",
            _span(r.intervals.get("0.8")),
            *((f"[{sources.get(r.source, '-')}]",) if numbered else ()),
        )
        for r in shown
    ]
    result("\nrows and what a fit without their network predicts, worst first")
    result(table(header, rows, left=2))
    if len(shown) < len(found):
        result(f"{len(found) - len(shown)} more, all of smaller error; --rows prints them")
    used = {r.source for r in shown}
    for source, number in sources.items():
        if source in used:
            _say(f"[{number}] {source}", "  ")


def _span(interval: tuple[float, float] | None) -> str | None:
    return None if interval is None else f"{cell(float(interval[0]))}-{cell(float(interval[1]))}"


def _print_parts(sheet: DeviceSheet, measured: Sequence[Measurement]) -> None:
    """Components of pipelines: charged as they were timed, never fitted."""
    parts = [r for r in measured if r.role and not r.flagged and (not sheet.chip or r.chip == sheet.chip)]
    if not parts:
        return
    times: dict[tuple[str, str, str], list[float]] = {}
    for row in parts:
        pixels = f"{row.resolution_px} px" if row.resolution_px else ""
        times.setdefault((_cut(row.subject, 40), pixels, row.source), []).append(row.latency_ms)
    rows = [(name, px, sorted(ms)[len(ms) // 2], len(ms), _cut(source, 30)) for (name, px, source), ms in times.items()]
    result("\nparts of a pipeline, charged as timed")
    result(table(("part", "image", "ms", "rows", "source"), rows, right=(2, 3)))


def _print_excluded(sheet: DeviceSheet, measured: Sequence[Measurement], every_row: bool) -> None:
    """What is kept but not fitted: how many rows for each reason, or every one."""
    rows = [(row, reason) for row in measured if (reason := _why_not(sheet, row))]
    if not rows:
        return
    result("\nnot fitted")
    for reason, count in Counter(reason for _, reason in rows).most_common():
        _say(f"{count} row{'s' if count > 1 else ''}: {reason}", "  ")
    if every_row:
        cells = [(_cut(r.subject, 58), _cut(r.chip, 14), r.latency_ms, _cut(reason, 20)) for r, reason in rows]
        result(table(("row", "chip", "ms", "reason"), cells, right=(2,)))


def _why_not(sheet: DeviceSheet, row: Measurement) -> str:
    """Why a row is not fitted, in words that equal rows share; "" if it is."""
    if row.excluded_because:
        return row.excluded_because
    if row.flagged:
        return "the anchors drifted: the machine was not steady" if row.flagged.startswith("anchors") else row.flagged
    if row.subject_kind != "component" and not sheet.chips and sheet.chip and row.chip != sheet.chip:
        return f"measured on another chip, {row.chip or 'not stated'}"
    return ""


def _say(text: str, indent: str) -> None:
    """A paragraph within the width of the page."""
    result(textwrap.fill(text, _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_on_hyphens=False))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _noise(floor: Mapping[str, float] | None) -> str:
    if floor is None:
        return "not known: no network has two sessions"
    deviation = _percent(floor["mean_deviation"])
    return f"{deviation} mean deviation between sessions, {floor['subjects']:.0f} subjects"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _newest(measured: Sequence[Measurement]) -> str | None:
    return max((row.measured_at for row in measured if row.used and row.measured_at), default=None)


def _age(moment: str | None, now: datetime.datetime | None = None) -> str | None:
    """How long ago a row was measured: "today", "3 days", "9 months"; None where no row has a date."""
    if not moment:
        return None
    try:
        # Published rows often have only a month.
        then = datetime.datetime.fromisoformat(f"{moment}-01" if len(moment) == 7 else moment)
    except ValueError:
        return moment
    then = then if then.tzinfo else then.replace(tzinfo=datetime.UTC)
    days = ((now or datetime.datetime.now(datetime.UTC)) - then).days
    if days >= 60:
        return f"{days // 30} months"
    return "today" if days < 1 else f"{days} day{'s' if days > 1 else ''}"


def _card(sheet: DeviceSheet) -> tuple[dict[str, Any], str | None]:
    """The card of a device's predictor, or none and why there is none."""
    from nas.latency import load_predictor

    try:
        return dict(load_predictor(sheet.slug).card), None
    except NasError as error:
        return {}, error.message


def _residuals(card: Mapping[str, Any]) -> list[Residual]:
    from nas.latency.card import residuals_of

    return residuals_of(card) if card else []


def _device_record(sheet: DeviceSheet, measured: Sequence[Measurement] | None = None) -> dict[str, Any]:
    """Everything known of a device; with `measured`, its rows too, each with its residual or why it is not fitted."""
    from nas import tables

    card, missing = _card(sheet)
    rows = tables.read(sheet.slug) if measured is None else measured
    record: dict[str, Any] = {
        "device": sheet.alias,
        "target": sheet.slug,
        "aliases": list(sheet.aliases),
        "chip": sheet.chip,
        "summary": sheet.summary,
        "backend": sheet.backend,
        "rows": len(rows),
        "newest": _newest(rows),
        "predictor": card or None,
        "predictor_missing": missing,
        "sources": list(sheet.sources),
        "path": Path(sheet.path),
    }
    if measured is not None:
        found = {(r.subject, r.chip): r for r in _residuals(card)}
        record["measurements"] = [
            {
                **asdict(row),
                "not_fitted_because": _why_not(sheet, row),
                "held_out": asdict(found[row.subject, row.chip])
                if (row.subject, row.chip) in found and not _why_not(sheet, row)
                else None,
            }
            for row in measured
        ]
    return record
