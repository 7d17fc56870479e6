"""What the page's numbers rest on: the cards of predictor and proxy, the study's record, the sources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nas import page
from nas.page import Cell, escape
from nas.page.numbers import UNKNOWN, duration, known, label, milliseconds, percent, plain, scaled
from nas.report import findings
from nas.report.files import DECIBELS, StudyFiles


def predictor(files: StudyFiles) -> str:
    """The predictor's card: how wrong it is, and what it has never seen."""
    card = files.record["predictor"]
    held = card.get("held_out") if isinstance(card.get("held_out"), dict) else {}
    words = []
    if held:
        words.append(
            f"Checked on {plain(held.get('rows'))} rows that each fit had not seen ({plain(held.get('method'))}), the"
            f" prediction was off by {percent(held.get('mape'))} on average;"
            f" {percent(held.get('within_10'))} were within 10 %."
        )
    if card.get("never_seen"):
        words.append(
            f"No row has operators of kind {plain(card['never_seen'])}; a network that has such operators is refused."
        )
    words += [f"{str(warning)[:1].upper()}{str(warning)[1:]}." for warning in files.record.get("warnings", [])]
    figures_of = [
        (_CARD.get(k, label(k.replace(".", ", "))), v) for k, v in _flat(card) if k not in ("never_seen", "residuals")
    ]
    rows = [(name, _card_value(name, value)) for name, value in figures_of]
    coverage = held.get("coverage") if held else None
    return (
        page.paragraph(escape(" ".join(words)))
        + page.facts(rows)
        + (_coverage(coverage) if isinstance(coverage, dict) and coverage else "")
        + _residuals(card.get("residuals"))
    )


_CARD = {
    "rows": "rows of whole networks",
    "held_out.mape": "mean error (MAPE)",
    "held_out.within_5": "within 5 %",
    "held_out.within_10": "within 10 %",
    "held_out.spearman": "rank correlation (Spearman)",
    "held_out.kendall": "rank correlation (Kendall)",
    "held_out.worst.error": "worst error",
    "held_out.worst.subject": "worst subject",
    "held_out.worst.chip": "worst subject's chip",
    "held_out.rows": "held-out rows",
    "held_out.method": "held out",
    "fitted_range_ms": "fitted between (ms)",
    "noise_floor.mean_deviation": "noise floor, mean deviation of a session",
    "noise_floor.subjects": "noise floor, repeated subjects",
    "noise_floor.sessions": "noise floor, sessions",
    "interval.method": "interval",
    "interval.sd": "interval, spread of log errors",
    "interval.networks": "interval, networks",
}
_FRACTIONS = (
    "mean error (MAPE)",
    "within 5 %",
    "within 10 %",
    "worst error",
    "noise floor, mean deviation of a session",
)


def _card_value(name: str, value: Any) -> str:
    return percent(float(value)) if name in _FRACTIONS and known(value) else plain(value)


def _flat(card: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """A nested card as "outer.inner" names; coverage has a table of its own."""
    for name, value in card.items():
        if name == "coverage":
            continue
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _coverage(coverage: Mapping[str, Any]) -> str:
    rows: list[list[Cell | str]] = []
    for name, row in coverage.items():
        if isinstance(row, dict):
            bound = "upper bound" if name.startswith("upper") else "interval"
            nominal, measured = float(row["nominal"]), float(row["measured"])
            rows.append(
                [
                    bound,
                    Cell(text=percent(nominal), sort=nominal),
                    Cell(text=percent(measured), sort=measured),
                    Cell(text=plain(row["rows"]), sort=row["rows"]),
                ]
            )
    if not rows:
        return ""
    return page.paragraph("How often the truth lay inside, on held-out rows:", "note") + page.table(
        ["bound", "promised", "measured", "rows"], rows
    )


def _residuals(found: Any) -> str:
    """Each held-out row beside its prediction."""
    rows: list[list[Cell | str]] = [
        [
            str(row.get("name") or row.get("subject")),
            plain(row.get("chip")),
            Cell(text=milliseconds(row["ms"]), sort=row["ms"]),
            Cell(text=milliseconds(row["predicted"]), sort=row["predicted"]),
            Cell(text=percent(row["error"]), sort=row["error"]),
        ]
        for row in (found if isinstance(found, list) else [])
    ]
    if not rows:
        return ""
    return page.paragraph("Each held-out row, predicted by a fit without it:", "note") + page.table(
        ["network", "chip", "measured", "predicted", "error"], rows
    )


def proxy(files: StudyFiles) -> str:
    """What quality means, what it cannot see, and how well it ranks."""
    settings = dict(files.record["proxy"])
    blind = [str(sentence) for sentence in settings.pop("cannot_see", [])]
    how = str(settings.pop("summary", "a small copy, distilled for a few steps"))
    body = page.paragraph(
        f"Every candidate has the same score: {escape(how)} (<code>{escape(settings.get('proxy', 'distill'))}</code>)."
    )
    if files.unit == DECIBELS:
        body += page.paragraph(
            "Quality is how well the candidate, scaled down, imitates the teacher: 10·log10 of the mean square of what"
            " the teacher adds to the preconditioner's skip path over the squared error, in dB. The text part is the"
            " same figure for the difference that the caption makes."
        )
    if blind:
        body += page.paragraph("<b>What it cannot see</b>") + page.bullets(blind)
    body += _fidelity(files.record.get("fidelity"), str(files.record["space"]))
    return body + "<h3>Its settings</h3>" + page.facts((label(k), plain(v)) for k, v in _flat(settings))


def _fidelity(card: Any, space: str) -> str:
    """How well the proxy ranks against longer training; said plainly when nobody has measured that."""
    heading = "<h3>Does it rank as longer training would?</h3>"
    if not isinstance(card, dict) or not card:
        return heading + page.paragraph(
            "Not measured for these settings and this teacher, so small differences should not be believed;"
            " <code>nas fidelity</code> measures it.",
            "warning",
        )
    if "verdict" not in card:
        return heading + _any_card(card)
    body = heading + page.paragraph(f"<b>{escape(card['verdict'].capitalize())}.</b> {escape(card['note'])}")
    body += page.paragraph(escape(card["text_note"]))
    if card["space"] != space:
        body += page.paragraph(
            f"That was measured on the space {escape(card['space'])}; on this one nobody has measured it.", "warning"
        )
    band = f"tau, latencies within {percent(card['band'])}"
    header = ["what ranks the candidates", band, "tau, all pairs", "Spearman", "lost by trusting its best five (dB)"]
    for name, field in (("Quality after long training", "agreement"), ("Text after long training", "text_agreement")):
        rows = [
            [
                row["predictor"],
                _with_interval(row, "within_band"),
                _with_interval(row, "kendall"),
                _with_interval(row, "spearman"),
                Cell(text=_two_decimals(row["top5_regret"]), sort=row["top5_regret"]),
            ]
            for row in card[field]
        ]
        body += page.paragraph(f"{name}, Kendall tau with {percent(card['confidence'])} intervals", "note")
        body += page.table(header, rows)
    return body + page.facts(_fidelity_facts(card))


def _fidelity_facts(card: Mapping[str, Any]) -> list[tuple[str, object]]:
    found, plateau = card["reliability"], card.get("plateau") or {}
    facts: list[tuple[str, object]] = [
        ("candidates trained long", plain(card["candidates"])),
        ("steps of a long run", plain(card["long_steps"])),
        ("candidates without a score", plain(card["not_scored"])),
        ("seconds of one thread per candidate", plain(card["seconds_per_candidate"])),
        ("spread between candidates (dB)", plain(found["between_candidates_sd"])),
        ("spread between seeds of one (dB)", plain(found["seed_sd"])),
        ("pairs that are ties of the seeds", percent(found["tied_pairs"])),
        ("highest tau that leaves", plain(found["highest_kendall"])),
        ("highest within the latency band", plain(found["highest_within_band"])),
    ]
    if plateau.get("second_half_gain_db") is not None:
        facts.append(("gained in the long runs' second half (dB)", plain(plateau["second_half_gain_db"])))
    return facts


def _with_interval(row: Mapping[str, Any], name: str) -> Cell:
    """A figure with its interval, sorted by the figure."""
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    bounds = f" ({_two_decimals(low)} to {_two_decimals(high)})" if known(low) else ""
    return Cell(text=f"{_two_decimals(value)}{bounds}", sort=value if known(value) else -2.0)


def _two_decimals(value: float | None) -> str:
    return f"{value:.2f}".replace("-", "−") if value is not None else UNKNOWN


def _any_card(card: Mapping[str, Any]) -> str:
    """A card of an earlier version: whatever it holds."""
    tables = [(k, v) for k, v in card.items() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)]
    texts = [v for k, v in card.items() if isinstance(v, str) and len(v) > 40]
    rest = {k: v for k, v in card.items() if (k, v) not in tables and v not in texts}
    body = "".join(page.paragraph(escape(text)) for text in texts)
    body += page.facts((label(k.replace(".", ", ")), plain(v)) for k, v in _flat(rest))
    for name, rows in tables:
        header = list(rows[0])
        body += page.paragraph(escape(label(name)), "note") + page.table(
            [label(h) for h in header], [[_any_cell(row.get(h)) for h in header] for row in rows]
        )
    return body


def _any_cell(value: Any) -> Cell:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(text=plain(value), sort=value if number else None)


def record(files: StudyFiles) -> str:
    """How the study was made, and what it tells about the space."""
    made = files.record
    trials, share = made["trials"], made["infeasible"]["share_of_space"]
    words = (
        f"{percent(share)} of the space is over {'a budget or limit' if files.limited else 'the budget'}"
        + (
            f" (from {plain(made['infeasible'].get('sampled'))} candidates drawn uniformly)"
            if made["infeasible"].get("sampled")
            else ""
        )
        + f". Of {trials['asked']} proposals {trials['proxied']} were scored, {trials['infeasible']} were infeasible,"
        f" {trials.get('forbidden', 0)} against a rule, {trials['duplicates']} repeated an earlier one and"
        f" {trials['failed']} failed."
    )
    reasons = [f"{reason}: {count}" for reason, count in (made["infeasible"].get("reasons") or {}).items() if count]
    changed = [f"The study went on under other terms: {change}." for change in made.get("changed") or []]
    body = page.paragraph(escape(words)) + page.bullets([*reasons, *changed]) + findings.edge_table(files)
    return body + page.command(str(made["command"])) + page.facts(_record_facts(made))


def _record_facts(made: Mapping[str, Any]) -> list[tuple[str, object]]:
    provenance = made["provenance"]
    libraries = provenance.get("libraries") or {}
    return [
        ("study", made["name"]),
        ("space", f"{made['space']}, version {made['space_hash']}"),
        ("candidates in the space", scaled(made.get("space_size"))),
        ("target", made["target"]),
        ("teacher", plain(made.get("teacher"))),
        *((name, plain(made[name])) for name in ("sampler", "storage") if made.get(name)),
        ("seed", plain(made["seed"])),
        ("workers", plain(made["jobs"])),
        ("search time", duration(made["wall_s"])),
        ("finished", plain(made["finished"])),
        *(
            (label(k), plain(provenance[k]))
            for k in ("nas", "commit", "date", "python", "platform", "processor")
            if k in provenance
        ),
        *((name, version) for name, version in libraries.items()),
    ]


def sources(files: StudyFiles) -> list[str]:
    """Where the figures come from, each once."""
    made = files.record
    found = [
        *made.get("sources", []),
        *(f"{part['name']}: {part['source']}" for part in made["pipeline"]["parts"] if part.get("source")),
        *([f"pipeline: {made['pipeline']['source']}"] if made["pipeline"].get("source") else []),
        *(f"{r['name']}: {r.get('published_source') or r.get('source')}" for r in made["references"]),
    ]
    return list(dict.fromkeys(str(s) for s in found))
