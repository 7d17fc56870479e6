"""The slider over the budget: what would be recommended, were the budget another. Its arithmetic is explorer.js."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from nas import page
from nas.page import as_json, escape
from nas.page.numbers import exact, known, milliseconds, percent, scaled
from nas.report import analysis, data, front
from nas.report.files import DECIBELS, StudyFiles

SCRIPT = Path(__file__).parent / "explorer.js"
_POSITIONS = 200  # about as many as a hand can tell apart
# Scores in dB that differ by less than two of these are ties even where the proxy tells a smaller spread.
_LEAST_SPREAD_DB = 0.05


def around(files: StudyFiles, figure: str) -> str:
    """The slider above `figure`, and below it the choice beside its runner-up and every change, as HTML.

    The figure alone where fewer than two candidates fit: then there is nothing to slide over.
    """
    content = answers(files)
    if content is None:
        return figure
    return (
        _controls(content)
        + figure
        + '<div class="explorer-pair"></div><details class="explorer-changes"><summary>How the choice is made, and'
        f" every budget at which it changes</summary>{page.paragraph(_rule(files), 'note')}</details>"
    )


def _controls(content: Mapping[str, Any]) -> str:
    budget, last = escape(exact(content["budget_ms"])), content["positions"]
    return (
        '<div class="explorer">'
        f'<label for="budget">If the budget were <output for="budget">{budget}</output></label>'
        '<div class="slider"><button type="button" class="step" data-step="-1" aria-label="the next smaller budget at'
        ' which the choice changes">◀</button>'
        f'<input type="range" id="budget" min="0" max="{last}" step="1" value="{last}" aria-valuetext="{budget}">'
        '<button type="button" class="step" data-step="1" aria-label="the next larger budget at which the choice'
        ' changes">▶</button></div><p class="answer" aria-live="polite"></p>'
        f'<script type="application/json" class="explorer-data">{as_json(content)}</script></div>'
    )


def _rule(files: StudyFiles) -> str:
    budget = files.record["budget"]
    others = " and it meets the other limits" if files.limited else ""
    return escape(
        f"A network fits where its latency's upper bound at {percent(budget['confidence'])} is within the budget"
        f"{others}. Of those that fit, the fastest is taken whose quality cannot be told from the best one's; the"
        f" runner-up is what the same rule takes without it. The search itself was for {exact(budget['ms'])}. Arrow"
        " keys move the slider; the buttons beside it go to where the choice changes."
    )


def answers(files: StudyFiles) -> dict[str, Any] | None:
    """What explorer.js needs: the candidates that meet every limit, and the slider's positions.

    Returns:
        budget_ms, from_ms and positions (the slider's 0 is `from_ms`, its last position the study's budget), unit, tie
        (the least spread of a score, in its unit), facts (names), choices (names) and candidates; None where fewer than
        two candidates fit.
    """
    frame = data.points(files)
    frame = frame[frame["standing"].isin([data.FRONT, data.DOMINATED])]
    if len(frame) < 2:
        return None
    chance = analysis.front_probability(files)
    budget = float(files.record["budget"]["ms"])
    step = _step(budget - float(frame["latency_high_ms"].min()))
    # At the first position at most the fastest fits.
    positions = math.ceil((budget - float(frame["latency_high_ms"].min())) / step)
    rows = [_candidate(files, row, chance) for row in frame.to_dict("records")]
    return {
        "budget_ms": budget,
        "from_ms": budget - positions * step,
        "positions": positions,
        "unit": files.unit,
        "least_spread": _LEAST_SPREAD_DB if files.unit == DECIBELS else 0.0,
        "facts": [name for name, _ in _facts(files, frame.iloc[0].to_dict(), chance)],
        "choices": [name.replace("_", " ") for name in files.choices],
        "candidates": rows,
    }


def _step(span_ms: float) -> float:
    """Milliseconds between two positions: 1, 2 or 5 times a power of ten."""
    finest = max(span_ms, 1e-6) / _POSITIONS
    power = 10.0 ** math.floor(math.log10(finest))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= finest)


def _candidate(files: StudyFiles, row: Mapping[str, Any], chance: pd.Series) -> dict[str, Any]:
    return {
        "key": row["key"],
        "latency_ms": row["latency_ms"],
        "high_ms": row["latency_high_ms"],
        "quality": row["quality"],
        "spread": row["quality_sd"] if known(row["quality_sd"]) else 0.0,
        "words": [milliseconds(row["latency_ms"]), front.scored(row["quality"], row["quality_sd"], files.unit)],
        "facts": [text for _, text in _facts(files, row, chance)],
        "choices": list(data.choices_of(row).values()),
    }


def _facts(files: StudyFiles, row: Mapping[str, Any], chance: pd.Series) -> list[tuple[str, str]]:
    text = front.scored(row["text_quality"], row["text_quality_sd"], files.unit) if files.judges_text else ""
    return [
        ("latency", milliseconds(row["latency_ms"])),
        ("between", f"{milliseconds(row['latency_low_ms'])} and {milliseconds(row['latency_high_ms'])}"),
        *front.elsewhere(files, row),
        ("quality", front.scored(row["quality"], row["quality_sd"], files.unit)),
        *([("of it, text part", text)] if files.judges_text else []),
        *([("on the front", percent(chance.get(row["key"])))] if len(chance) else []),
        ("parameters", scaled(row["params"])),
        ("MACs per call", scaled(row["macs"])),
        ("weights", scaled(row["weight_bytes"], "B")),
        ("peak activations", scaled(row["peak_activation_bytes"], "B")),
    ]
