"""The report's sections: words, tables and figures as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from nas import page
from nas.page import Cell, Section, escape
from nas.page.numbers import (
    duration,
    exact,
    known,
    label,
    milliseconds,
    percent,
    scaled,
    significant,
)
from nas.report import analysis, cards, data, explorer, figures, findings, front
from nas.report.files import DECIBELS, StudyFiles


def title(files: StudyFiles) -> str:
    """What the page is about, in one line."""
    record = files.record
    per = " per denoiser call" if record["budget"]["per_step"] else ""
    device = str(record.get("target_alias") or record["target"])
    return f"{record['space']} within {exact(record['budget']['ms'])}{per} on {device}"


def lead(files: StudyFiles) -> str:
    """The answer first: which network to take, why, and what the budget paid for."""
    table = data.front_table(files)
    chosen = table[table["recommended"]]
    parts = []
    if not files.record["finished"]:
        parts.append(
            page.paragraph(
                "This study is not finished: what follows is what it has found so far."
                f" <code>{escape(files.record['command'])}</code> continues it.",
                "warning",
            )
        )
    if chosen.empty:
        parts.append(
            page.paragraph("No candidate that meets the budget has been scored, so there is nothing to choose.")
        )
    else:
        row = chosen.iloc[0].to_dict()
        why = str((files.record.get("recommended") or {}).get("why", ""))
        parts.append(page.paragraph(f'Take <b class="key">{escape(row["key"])}</b>: {escape(why)}.', "lead"))
        parts.append(_tiles(files, row))
        parts.append(page.command(row["command"]))
    parts.append(page.paragraph(escape(budget_words(files))))
    parts.append(findings.edge_words(files))
    return "".join(parts)


def _tiles(files: StudyFiles, row: Mapping[str, Any]) -> str:
    confidence = percent(files.record["budget"]["confidence"])
    per = "call" if files.record["budget"]["per_step"] else "image"
    between = f"{milliseconds(row['latency_low_ms'])} to {milliseconds(row['latency_high_ms'])}"
    tiles = [
        (f"predicted, one {per}", milliseconds(row["latency_ms"]), f"{between}, each bound at {confidence}"),
        ("chance to meet the budget", percent(row["meets_budget_probability"]), f"{confidence} was asked for"),
        ("quality", front.scored(row["quality"], row["quality_sd"], files.unit), _meaning(files)),
        ("parameters", scaled(row["params"]), f"{scaled(row['weight_bytes'], 'B')} of weights"),
        ("MACs, one call", scaled(row["macs"]), f"{scaled(row['peak_activation_bytes'], 'B')} peak activations"),
    ]
    return page.tiles(tiles)


def _meaning(files: StudyFiles) -> str:
    """What the score is of."""
    name = files.record["proxy"].get("proxy")
    return "fidelity to the teacher, proxy run" if files.unit == DECIBELS else f"score of the proxy {name}"


def budget_words(files: StudyFiles) -> str:
    """What a budget in seconds pays for, in words."""
    record = files.record
    budget, pipeline = record["budget"], record["pipeline"]
    confidence = (
        f"A candidate counts as feasible when its latency is within the budget with probability"
        f" {percent(budget['confidence'])} or more, by the predictor's own interval."
    )
    resolution = f"{record['resolution_px']} × {record['resolution_px']} pixels"
    if budget["per_step"]:
        return f"The budget is {exact(budget['ms'])} for one denoiser call at {resolution}. {confidence}"
    charged = [_charged(part) for part in pipeline["parts"]]
    fixed = " and ".join([", ".join(charged[:-1]), charged[-1]] if len(charged) > 1 else charged)
    paid = f"{fixed} are paid first, whatever the denoiser" if fixed else "nothing is charged besides the denoiser"
    calls = f"{pipeline['steps']} steps" + (
        " of two calls each (classifier-free guidance)" if pipeline["guidance"] else ""
    )
    return (
        f"The budget is {exact(budget['ms'])} for one image of {resolution}: {paid}; the rest is shared by"
        f" {calls}, which leaves {milliseconds(budget['step_budget_ms'])} for each denoiser call. {confidence}"
    )


def _charged(part: Mapping[str, Any]) -> str:
    """A component with what it is charged at; a predicted one at its upper bound."""
    if part.get("basis") == "predicted":
        return f"{part['name']} {milliseconds(part['high_ms'])} (the upper bound of a prediction)"
    return f"{part['name']} {milliseconds(part['ms'])}" + (f" ({part['basis']})" if part.get("basis") else "")


def ordered(files: StudyFiles) -> list[Section]:
    """The page's sections, in order."""
    found = [
        Section(slug="front", title="Latency and quality", body=_front(files)),
        Section(slug="limits", title="Budgets and limits", body=findings.limits(files)),
        Section(slug="candidates", title="The front as a table", body=_table(files)),
        Section(slug="stability", title="How sure the front is", body=findings.stability(files)),
        Section(slug="where", title="Where the time goes", body=_parts(files)),
        Section(slug="choices", title="What the candidates chose", body=_choices(files)),
        Section(slug="matters", title="Which choices matter", body=findings.matters(files)),
        Section(slug="progress", title="How the search went", body=_progress(files)),
        Section(slug="predictor", title="The latency predictor", body=cards.predictor(files)),
        Section(slug="proxy", title="The quality proxy", body=cards.proxy(files)),
        Section(slug="record", title="The study's record", body=cards.record(files)),
        Section(slug="sources", title="Sources", body=page.bullets(cards.sources(files))),
    ]
    return [section for section in found if section.body]


def _front(files: StudyFiles) -> str:
    if data.points(files).empty:
        return page.paragraph("No candidate has been priced or scored yet.")
    words = (
        "Each point is one network. Further left is faster, further up is closer to the teacher. Horizontal bars are"
        f" the predictor's bounds, each holding with {percent(files.record['budget']['confidence'])}; vertical bars are"
        " one standard deviation of the score."
        + findings.knee_words(files)
        + " Click a point of the front, or a row of the table, to see the network. A ring marks what the slider"
        " chose, a thinner one its runner-up."
    )
    return (
        page.paragraph(escape(words), "note")
        + explorer.around(
            files,
            page.figure("figure-front", front.front(files), "scatter plot of predicted latency against proxy quality"),
        )
        + _cards(files)
    )


def _cards(files: StudyFiles) -> str:
    """One card per front member: every figure, the configuration, how it differs from the first reference."""
    table = data.front_table(files)
    if table.empty:
        return ""
    first = files.recommended or str(table["key"].iloc[0])
    cards = "".join(_card(files, row) for row in table.to_dict("records"))
    return f'<div class="cards" data-first="{escape(first)}">{cards}</div>'


def _card(files: StudyFiles, row: Mapping[str, Any]) -> str:
    tags = findings.tags(files, row)
    heading = escape(row["key"]) + (f" · {escape(', '.join(tags))}" if tags else "")
    numbers = [
        ("latency", f"{milliseconds(row['latency_ms'])}"),
        ("between", f"{milliseconds(row['latency_low_ms'])} and {milliseconds(row['latency_high_ms'])}"),
        ("meets the budget", percent(row["meets_budget_probability"])),
        ("one denoiser call", milliseconds(row["step_ms"])),
        *front.elsewhere(files, row),
        ("quality", front.scored(row["quality"], row["quality_sd"], files.unit)),
        *(
            [("of it, text part", front.scored(row["text_quality"], row["text_quality_sd"], files.unit))]
            if known(row["text_quality"])
            else []
        ),
        ("parameters", scaled(row["params"])),
        ("MACs per call", scaled(row["macs"])),
        ("weights", scaled(row["weight_bytes"], "B")),
        ("peak activations", scaled(row["peak_activation_bytes"], "B")),
    ]
    choices = data.choices_of(row)
    marked = ' class="marked"' if row["recommended"] else ""
    return (
        f'<article id="candidate-{escape(row["key"])}"{marked}><h3>{heading}</h3>{page.facts(numbers)}'
        f"<h3>Configuration</h3>{page.facts(data.describe(choices))}{_difference(files, choices, row['key'])}"
        f"{page.command(row['command'])}</article>"
    )


def _difference(files: StudyFiles, choices: Mapping[str, str], key: str) -> str:
    """How a configuration departs from the first published reference."""
    if not files.record["references"]:
        return ""
    reference = files.record["references"][0]
    if reference.get("key") == key or "choices" not in reference:
        return ""
    base = {str(k): data.tidy(v) for k, v in reference["choices"].items()}
    changes = [
        f"{name} {value or 'does not apply'} instead of {base.get(name) or 'not applying'}"
        for name, value in choices.items()
        if value != base.get(name, "")
    ]
    words = "; ".join(changes) if changes else "the same choices"
    return page.paragraph(f"Against {escape(reference['name'])}: {escape(words)}.", "note")


def _table(files: StudyFiles) -> str:
    table = data.front_table(files)
    if table.empty:
        return ""
    text = [f"text part ({files.unit})"] if files.judges_text else []
    chance = analysis.front_probability(files)
    sure = ["on the front"] if len(chance) else []
    devices = [f"on {device}" for device in files.elsewhere]
    header = [
        "network", "latency", "low", "high", "meets budget", *devices, f"quality ({files.unit})", *text, *sure,
        "parameters", "MACs per call", "weights", "peak activations", "next command",
    ]  # fmt: skip
    rows = [_table_row(files, row, chance) for row in table.to_dict("records")]
    return (
        page.paragraph("★ recommended. Click a head to sort, a row to see its configuration above.", "note")
        + page.table(header, rows, keys=table["key"].tolist(), marked=files.recommended)
        + page.paragraph(
            "The same figures: <code>front.csv</code>, <code>trials.csv</code> and <code>blocks.csv</code>.", "note"
        )
    )


def _table_row(files: StudyFiles, row: Mapping[str, Any], chance: pd.Series) -> list[Cell | str]:
    others = [tag for tag in findings.tags(files, row) if tag != "recommended"]
    name = ("★ " if row["recommended"] else "") + row["key"] + (f" ({', '.join(others)})" if others else "")
    sure = [Cell(text=percent(chance.get(row["key"])), sort=chance.get(row["key"]))] if len(chance) else []
    return [
        name,
        *(Cell(text=milliseconds(row[c]), sort=row[c]) for c in ("latency_ms", "latency_low_ms", "latency_high_ms")),
        Cell(text=percent(row["meets_budget_probability"]), sort=row["meets_budget_probability"]),
        *(Cell(text=milliseconds(row[c]), sort=row[c]) for c in (f"latency_ms@{d}" for d in files.elsewhere)),
        *(
            Cell(text=front.scored(row[c], row[f"{c}_sd"], files.unit).removesuffix(f" {files.unit}"), sort=row[c])
            for c in ("quality", "text_quality")[: 2 if files.judges_text else 1]
        ),
        *sure,
        *(Cell(text=scaled(row[c]), sort=row[c]) for c in ("params", "macs")),
        *(Cell(text=scaled(row[c], "B"), sort=row[c]) for c in ("weight_bytes", "peak_activation_bytes")),
        Cell(text=row["command"], code=True),
    ]


def _image(files: StudyFiles) -> str:
    """One image as its parts: the pipeline's components, and the denoiser of the recommended network."""
    record = files.record
    table = data.front_table(files)
    chosen = table[table["recommended"]]
    if record["budget"]["per_step"] or chosen.empty:
        return ""
    lines = data.image_parts(record, chosen.iloc[0].to_dict())
    rows: list[list[Cell | str]] = [
        [
            str(line["name"]),
            Cell(text=str(line["calls"]), sort=line["calls"]),
            Cell(text=milliseconds(line["ms"]), sort=line["ms"]),
            f"{milliseconds(line['low_ms'])} to {milliseconds(line['high_ms'])}"
            if line["low_ms"] < line["high_ms"]
            else "",
            str(line["basis"]),
            str(line["source"]),
        ]
        for line in lines
    ]
    words = (
        f"One image with the recommended network, {milliseconds(chosen.iloc[0]['latency_ms'])}: each part once, the"
        " denoiser for every call. The bounds of an image are the sums of the bounds; what was measured or published"
        " adds its own value to both."
    )
    return page.paragraph(escape(words), "note") + page.table(
        ["part", "calls", "time", "between", "basis", "source"], rows
    )


def _parts(files: StudyFiles) -> str:
    if files.blocks.empty or files.front.empty:
        return ""
    shown = [
        (
            f"by {word}",
            page.figure(f"figure-{by}", figures.parts(files, by), f"stacked bars of predicted latency by {word}"),
        )
        for by, word in (("stage", "stage"), ("kind", "kind of block"))
    ]
    words = "One bar per front member, fastest at the top: the predictor's milliseconds of one denoiser call."
    return _image(files) + page.paragraph(escape(words), "note") + page.views("views-where", shown)


def _choices(files: StudyFiles) -> str:
    lines = data.choice_lines(files)
    if lines["key"].nunique() < 2:
        return ""
    fixed = sorted(set(files.choices) - set(data.varied_choices(files)))
    words = (
        "Each line is a network, read from the top down; it crosses every axis at its value. A gap means that the"
        " choice does not apply."
    )
    if fixed:
        words += f" The same in every scored candidate: {', '.join(label(name) for name in fixed)}."
    return page.paragraph(escape(words), "note") + page.figure(
        "figure-choices", figures.choices(files), "parallel coordinates of the choices, latency and quality"
    )


def _progress(files: StudyFiles) -> str:
    curve = data.hypervolume_curve(files)
    if curve.empty:
        return ""
    latency, quality = data.reference_point(files)
    words = (
        "The hypervolume is the area between the front and a fixed corner, here"
        f" {exact(latency)} and {significant(quality)} {files.unit}"
        + (
            ": studies with the same budget, space and proxy can be compared by it."
            if files.unit == DECIBELS
            else ", the worst score of this study: figures of another study are of another corner."
        )
    )
    last = curve.loc[curve["improved"], "trial"]
    if len(last):
        words += f" The last of {len(curve)} scored candidates to enlarge it was number {int(last.max())}."
        if int(last.max()) > 0.8 * len(curve):
            words += " It was still growing near the end, so more trials would probably find more."
    shown = [
        (
            "over candidates",
            page.figure(
                "figure-progress-trial",
                figures.hypervolume(files, "trial"),
                "line of the hypervolume over scored candidates",
            ),
        )
    ]
    if curve["seconds"].notna().all() and curve["seconds"].iloc[-1] > 0:
        over_time = page.figure(
            "figure-progress-seconds", figures.hypervolume(files, "seconds"), "line of the hypervolume over proxy time"
        )
        shown.insert(0, ("over proxy time", over_time))
    return page.paragraph(escape(f"{words}{_stopped(files)}{findings.reused(files)}")) + page.views(
        "views-progress", shown
    )


def _stopped(files: StudyFiles) -> str:
    """What was saved by ending runs early, and how sure each end was."""
    found = files.record.get("stopping") or {}
    if not found.get("stopped"):
        return ""
    return (
        f" {found['stopped']} proxy runs were stopped early, after {duration(found['spent_s'])} in all, because their"
        f" learning curve said with {percent(found['confidence'])} confidence that they would end below the best"
        f" known at no more latency; that saved {duration(found['saved_s'])} of proxy time ({found['basis']})."
    )
