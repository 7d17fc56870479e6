"""What a pipeline component costs on a target: a row of its table, else its predictor's word, else an error."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nas import tables
from nas.components.parts import TEXT_ENCODERS, Component
from nas.device import DeviceSheet
from nas.errors import NasError
from nas.latency import LatencyPredictor

PUBLISHED, MEASURED, PREDICTED = "published", "measured", "predicted"

# Subjects of the tables are named after the component, "<name>-text-encoder" and "<name>-decoder-<side>px". Published
# rows keep the names that they were collected under.
_SUBJECT = re.compile(r"(?P<name>.+?)-(text-encoder|decoder-\d+px)")
_COLLECTED = {"snapgen-decoder": "snapgen-tiny", "snapgen-text-encoders-and-overhead": "snapgen-text-encoders"}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A pipeline component as an image pays for it once, whatever the denoiser.

    Attributes:
        role: "text_encoders" or "decoder".
        ms: its latency.
        low_ms, high_ms: what the predictor bounds it by, each side with the budget's confidence; both `ms` where it
            was measured or published.
        basis: "measured", "published" or "predicted".
        source: where the figure comes from.
    """

    role: str
    name: str
    ms: float
    source: str
    low_ms: float
    high_ms: float
    basis: str


def subject_name(component: str, role: str, px: int | None) -> str:
    """What the rows of a component are called in a table."""
    return f"{component}-text-encoder" if role == TEXT_ENCODERS else f"{component}-decoder-{px}px"


def component_of(subject: str) -> str:
    """The component that a table's subject is a row of; the inverse of `subject_name`."""
    found = _SUBJECT.fullmatch(subject)
    return found["name"] if found else _COLLECTED.get(subject, subject)


def charge(
    component: Component,
    px: int,
    sheet: DeviceSheet,
    predictor: LatencyPredictor | None,
    confidence: float,
    folder: str | Path | None = None,
) -> Part:
    """What an image of `px` pixels pays for a component on a target.

    A row of the table counts at exactly this resolution, or without one (a text encoder has none), on the sheet's own
    chip; the median of several. Where there is none, the predictor prices the component's operators.

    Raises:
        NasError: no row, and the predictor cannot price it; the message says why.
    """
    rows = _rows(component, sheet, folder)
    fitting = [row for row in rows if row.resolution_px in (None, px)]
    if fitting:
        ms = float(np.median([row.latency_ms for row in fitting]))
        basis = PUBLISHED if all(row.statistic == "published" for row in fitting) else MEASURED
        return _part(component, ms, ms, ms, basis, fitting[0].source)
    elsewhere = sorted({row.resolution_px for row in rows if row.resolution_px})
    there = f" (it has one at {', '.join(f'{side} px' for side in elsewhere)})" if elsewhere else ""
    why = f"{sheet.slug} has no latency of {component.name!r} at {px} px{there}"
    if component.make is None:
        raise NasError(f"{why}, and its layers are not published, so none can be predicted", hint=_hint(component))
    if predictor is None:
        raise NasError(f"{why}, and no predictor to ask", hint=_hint(component))
    assert component.features is not None
    features = component.features[None]
    try:
        ms = float(predictor.predict(features, confidence)[0][0])
    except NasError as error:
        raise NasError(f"{why}, and it cannot be predicted: {error.message}", hint=_hint(component)) from error
    low, high = (float(bound(features, confidence)[0]) for bound in (predictor.lower, predictor.upper))
    said = f"predicted from its operators by the predictor of {sheet.slug}"
    return _part(component, ms, low, high, PREDICTED, said + _far(predictor, features))


def _rows(component: Component, sheet: DeviceSheet, folder: str | Path | None) -> list[tables.Measurement]:
    """The trusted rows of a component; rows of other chips, which a table may pool, are not this target's."""
    return [
        row
        for row in tables.read(sheet.slug, folder)
        if row.role == component.role
        and not row.flagged
        and component_of(row.subject) == component.name
        and (not sheet.chip or row.chip == sheet.chip)
    ]


def _part(component: Component, ms: float, low: float, high: float, basis: str, source: str) -> Part:
    return Part(role=component.role, name=component.name, ms=ms, low_ms=low, high_ms=high, basis=basis, source=source)


def _far(predictor: LatencyPredictor, features: np.ndarray) -> str:
    if not predictor.extrapolation(features)[0]:
        return ""
    low, high = predictor.range_ms
    return f", far outside the {low:.4g} to {high:.4g} ms that it was fitted on, so with a widened interval"


def _hint(component: Component) -> str:
    """What a person can do where a component has no latency."""
    option = "--text-encoders NAME,... or none" if component.role == TEXT_ENCODERS else "--decoder NAME"
    return f"take another with {option}, or budget one denoiser call: --budget TIME/step@DEVICE"
