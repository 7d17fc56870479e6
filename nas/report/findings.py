"""Sections on what the trials say together: the limits, how sure the front is, which choices matter, where it ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from nas import page
from nas.page import Cell, escape
from nas.page.numbers import duration, known, label, milliseconds, percent, plain
from nas.report import analysis, data, effects
from nas.report.files import StudyFiles

# Field of the record's limits: the option that sets it, and what it bounds.
_LIMITS = {
    "max_params": ("--max-params", "parameters"),
    "max_memory_bytes": ("--max-memory", "weights and peak activations"),
    "max_weight_bytes": ("--max-size", "weights on disk"),
}
_MAYBE = 0.2  # from this chance on a candidate behind the front is worth a second look


def limits(files: StudyFiles) -> str:
    """Every budget and limit with the share of the space that it rejects; "" where one budget is all there is."""
    if not files.limited:
        return ""
    shares = [files.record.get(name) or {} for name in ("rejected", "rejected_alone")]
    rows: list[list[Cell | str]] = []
    for budget in files.record.get("budgets") or []:
        what = "one denoiser call" if budget.get("per_step") else "one image"
        words = f"{what} on {budget['device']}, with {percent(budget.get('confidence'))} confidence"
        rows.append([str(budget["text"]), words, *(_share(each.get(budget["text"])) for each in shares)])
    for name, (option, what) in _LIMITS.items():
        typed = next((limit for limit in shares[0] if limit.startswith(option)), None)
        if known((files.record.get("limits") or {}).get(name)) and typed:
            rows.append([typed, what, *(_share(each.get(typed)) for each in shares)])
    words = (
        "A candidate is on the front only if it meets every one of these; the front's latency is that of the first. The"
        " shares are of candidates drawn uniformly from the space."
    )
    header = ["limit", "what it bounds", "rejects of the space", "rejects alone"]
    return page.paragraph(escape(words), "note") + page.table(header, rows)


def _share(value: Any) -> Cell:
    return Cell(text=percent(value), sort=value if known(value) else -1.0, share=value)


def reused(files: StudyFiles) -> str:
    """How many scores came from earlier studies, and what that saved, as a sentence; "" where none did."""
    found = files.record.get("reuse") or {}
    used = found.get("used")
    if not used:
        return ""
    saved = found.get("seconds_saved")
    took = f", which saved {duration(saved)} of proxy time" if known(saved) and saved else ""
    of = f" of {plain(found['available'])} kept" if known(found.get("available")) else ""
    return f" {plain(used)}{of} scores were taken over from earlier studies with the same proxy settings{took}."


def stability(files: StudyFiles) -> str:
    """How likely each point is truly on the front, as a chart with the words for it."""
    chance = analysis.front_probability(files)
    if chance.empty:
        return ""
    front = data.front_table(files)
    behind = chance[~chance.index.isin(front["key"])]
    close = _count(int((behind >= _MAYBE).sum()), "candidate")
    words = (
        "A score is known up to its spread, so the same candidates scored again would draw another front. Here"
        " every score was drawn 4,000 times within its spread, and the chart says how often each candidate was on it."
        f" The {len(front)} points of the front were on it in {percent(chance[front['key']].mean())} of the draws on"
        f" average, and {close} behind it in {percent(_MAYBE)} or more. The fastest candidate always is. Latencies were"
        " taken as predicted: an error of the predictor mostly moves all of them together."
    )
    return page.paragraph(escape(words), "note") + page.figure(
        "figure-stability", effects.stability(files, chance), "scatter plot of the chance to be on the front by latency"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def matters(files: StudyFiles) -> str:
    """The importance of each choice, then quality by value."""
    return _importance(files) + _values(files)


def _importance(files: StudyFiles) -> str:
    found = files.record.get("importance") or {}
    if not (found.get("quality") or found.get("latency")):
        return ""
    words = (
        f"Importance by {found.get('method', 'PED-ANOVA')}, from {plain(found.get('scored'))} scores and"
        f" {plain(found.get('priced'))} latencies. A pale bar is no longer than what chance alone reaches."
    )
    return (
        "<h3>How much each choice decides</h3>"
        + page.paragraph(escape(words), "note")
        + page.figure("figure-importance", effects.importance(found), "bars of the importance of each choice")
    )


def _values(files: StudyFiles) -> str:
    frame = data.scored(files)
    scores = pd.Series(frame["quality"].to_numpy(), index=frame["key"].tolist())
    if not data.varied_choices(files):
        return ""
    unit = files.unit
    shown = [("as scored", scores, f"quality ({unit})", "quality by the value of each choice")]
    relative = analysis.relative_quality(files)
    if len(relative):
        title = f"quality less what is usual at its latency ({unit})"
        shown.insert(0, ("at similar latency", relative, title, "quality at similar latency by value of each choice"))
    views = [
        (name, page.figure(f"figure-values-{i}", effects.values(files, figures, title), words))
        for i, (name, figures, title, words) in enumerate(shown)
    ]
    words = (
        "Each row is one value of one choice; each dot is a candidate with that value. At similar latency, a candidate"
        " right of zero is better than is usual for its speed (a parabola in the logarithm of latency, fitted to all"
        " scored candidates). Candidates with one value differ in other choices as well, and the search tries promising"
        " ones more often: read this as a hint of what to try, not as the effect of one choice."
    )
    return "<h3>Quality by value</h3>" + page.paragraph(escape(words), "note") + page.views("views-values", views)


def edge_words(files: StudyFiles) -> str:
    """A warning where the recommended point and much of the front stand at the end of a choice's list; "" elsewhere."""
    edges = analysis.edges(files)
    crowded = edges[edges["crowded"]]
    if crowded.empty:
        return ""
    found = []
    for end in ("high", "low"):
        names = [f"{label(e['choice'])} = {e['value']}" for e in crowded[crowded["end"] == end].to_dict("records")]
        found += [f"{_END[end]} value: {', '.join(names)}"] if names else []
    return page.paragraph(
        "The space may be too small: the recommended point and at least half of the front stand at the end of the list"
        f" in {_count(len(crowded), 'choice')} ({escape('; '.join(found))}). Values beyond might be better;"
        ' <a href="#edges">the table</a> says how many members stand there.',
        "warning",
    )


_END = {"low": "lowest", "high": "highest"}


def edge_table(files: StudyFiles) -> str:
    """Every choice in which the recommended point stands at the end of the list."""
    edges = analysis.edges(files)
    if edges.empty:
        return page.paragraph("The recommended point stands at no edge of the space's ordered choices.")
    importance = (files.record.get("importance") or {}).get("quality") or {}
    header = ["choice", "value", "end", "front members with it", *(["importance for quality"] if importance else [])]
    rows: list[list[Cell | str]] = []
    for edge in edges.to_dict("records"):
        share = (importance.get(edge["choice"]) or {}).get("share")
        rows.append(
            [
                label(edge["choice"]),
                edge["value"],
                _END[edge["end"]],
                Cell(text=f"{edge['members']} of {edge['of']}", sort=edge["members"] / max(edge["of"], 1)),
                *([Cell(text=percent(share), sort=share if known(share) else -1.0)] if importance else []),
            ]
        )
    words = (
        "The recommended point stands at the edge of the space in these ordered choices: a larger space might hold a"
        " better one, the more so where the front crowds there too."
    )
    return f'<div id="edges">{page.paragraph(words)}{page.table(header, rows)}</div>'


def knee_words(files: StudyFiles) -> str:
    """What the knee is, as a sentence; "" where the front does not bend."""
    key = analysis.knee(files)
    if not key:
        return ""
    row = data.front_table(files).set_index("key").loc[key]
    return (
        f" The front bends most at {key} ({milliseconds(row['latency_ms'])}), its knee: beyond it more latency"
        " buys less quality."
    )


def tags(files: StudyFiles, row: Mapping[str, Any]) -> list[str]:
    """What is to be said of a front member beside its key."""
    knee = analysis.knee(files)
    named = (("recommended", row["recommended"]), ("knee", row["key"] == knee), (row["reference"], row["reference"]))
    return [tag for tag, on in named if on]
