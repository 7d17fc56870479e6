"""Fits a target's latency predictor from its table, says how good it is, and loads it again.

What is held out is always a whole network with all its rows: the search prices networks that were never measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nas import tables
from nas.device import DeviceSheet, find_target
from nas.errors import NasError
from nas.latency import ratios as quotients
from nas.latency import spread
from nas.latency.calibration import calibrated, chosen
from nas.latency.card import Residual, card, residuals_of
from nas.latency.predictor import LatencyPredictor
from nas.latency.problem import FitSettings, Problem, problem
from nas.latency.ratios import Ratio
from nas.paths import atomic_write
from nas.provenance import text_sha
from nas.tables import Measurement, Observation, Subject

__all__ = [
    "MIN_NETWORKS",
    "LatencyPredictor",
    "Residual",
    "fit",
    "inputs_sha",
    "load_predictor",
    "posed_by",
    "refit",
    "residuals",
]

MIN_NETWORKS = 5
# Another target's costs leave little but a scale to be found, and two degrees of freedom still bound it.
MIN_ADAPTED = 3
# With the spread of other targets two suffice: one to fit, one to see how the fit does. One would show nothing at all.
MIN_BORROWED = 2


def refit(slug: str, folder: str | Path | None = None) -> LatencyPredictor:
    """Fits a table as it is now and writes <slug>.predictor.json beside it.

    Raises:
        NasError: too few networks were measured (the message says how many are needed).
    """
    sheet = find_target(slug, folder)
    rows, subjects = tables.read(sheet.slug, folder), tables.subjects(sheet.slug, folder)
    predictor = fit(rows, subjects, sheet, ratios=quotients.read(sheet.slug, folder), folder=folder)
    data = {"inputs_sha": inputs_sha(sheet.slug, folder), **predictor.to_json()}
    atomic_write(_path(sheet.slug, folder), json.dumps(data, indent=None, separators=(",", ":")) + "\n")
    return predictor


def load_predictor(slug: str, folder: str | Path | None = None) -> LatencyPredictor:
    """The fitted predictor of a target (slug or alias).

    Raises:
        NasError: it was never fitted, or its table, sheet, family or prior has changed since.
    """
    sheet = find_target(slug, folder)
    path = _path(sheet.slug, folder)
    hint = f"nas measure --target {sheet.alias} --fit-only"
    if not path.is_file():
        raise NasError(f"{sheet.slug} has no fitted latency predictor ({path} is missing)", hint=hint)
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise NasError(f"{path}:{error.lineno}: not valid JSON: {error.msg}", hint=hint) from error
    if data.get("inputs_sha") != inputs_sha(sheet.slug, folder):
        raise NasError(f"{path} was fitted to another state of the table or sheet of {sheet.slug}", hint=hint)
    return LatencyPredictor.from_json(data)


def residuals(slug: str, folder: str | Path | None = None) -> list[Residual]:
    """Every fitted network row of a target beside what a fit that had not seen it said; read from the card.

    Raises:
        NasError: as of `load_predictor`.
    """
    return residuals_of(load_predictor(slug, folder).card)


def inputs_sha(slug: str, folder: str | Path | None = None) -> str:
    """Hash of everything that a target's fit reads: its tables, its prior's, and the spread of other targets."""
    sheet = find_target(slug, folder)
    settings = FitSettings.of(sheet)
    parts = [tables.inputs_sha(sheet.slug, folder)]
    if settings.prior:
        parts.append(inputs_sha(settings.prior, folder))
    if settings.borrow_spread:
        parts.append(json.dumps(spread.read(folder), sort_keys=True))
    return parts[0] if len(parts) == 1 else text_sha("\0".join(parts))


def _path(slug: str, folder: str | Path | None) -> Path:
    return tables.table_path(slug, ".predictor.json", folder)


def fit(
    measurements: Sequence[Measurement],
    subjects: Mapping[str, Subject],
    sheet: DeviceSheet,
    prior: np.ndarray | LatencyPredictor | None = None,
    *,
    ratios: Sequence[Ratio] = (),
    folder: str | Path | None = None,
) -> LatencyPredictor:
    """Fits a predictor and its card.

    Args:
        measurements: of one table; flagged and excluded rows are not read.
        subjects: with features, by key.
        sheet: gives the prior, the chips to pool and the settings of the fit.
        prior: another target's predictor, or [F] ms per unit of each feature; if None what the sheet's [fit] prior
            names, or its roofline.
        ratios: published quotients; excluded ones are not read.
        folder: of the tables, for what the sheet refers to.

    Raises:
        NasError: too few networks, none of the sheet's chip where no trend prices it, or a row without features.
    """
    posed, found, about_prior = posed_by(measurements, subjects, sheet, prior, ratios=ratios, folder=folder)
    _check_enough(posed, sheet, adapted=about_prior["kind"] != spread.ROOFLINE)
    everything = np.ones(len(posed.names), dtype=bool)
    final = chosen(posed, everything)
    predictor = calibrated(final, everything).at(posed.target_effects)
    about = card(final, predictor, measurements)
    about["prior"] = about_prior
    about["excluded"] = sum(not row.used for row in measurements)
    about["sessions"] = len({row.session.partition("/")[0] for row in measurements if row.used})
    about["noise_floor"] = tables.noise_floor(o for o in found if o.kind != "block")
    about["notes"] = _notes(found, sheet)
    return replace(predictor, card=about)


def posed_by(
    measurements: Sequence[Measurement],
    subjects: Mapping[str, Subject],
    sheet: DeviceSheet,
    prior: np.ndarray | LatencyPredictor | None = None,
    *,
    ratios: Sequence[Ratio] = (),
    folder: str | Path | None = None,
) -> tuple[Problem, tuple[Observation, ...], dict[str, Any]]:
    """The regression that `fit` solves, the observations it rests on, and what its prior is as plain data."""
    settings = FitSettings.of(sheet)
    if prior is None and settings.prior:
        prior = load_predictor(settings.prior, folder)
    costs = prior.coefficients if isinstance(prior, LatencyPredictor) else prior
    kind, about = spread.ROOFLINE, {"kind": spread.ROOFLINE}
    if isinstance(prior, LatencyPredictor):
        kind, about = (
            prior.target,
            {"kind": "target", "target": prior.target, "inputs_sha": inputs_sha(prior.target, folder)},
        )
    elif prior is not None:
        about = {"kind": "costs"}
    posed, found = problem(measurements, subjects, sheet, costs, ratios)
    if settings.borrow_spread:
        without = {sheet.slug, kind, *filter(None, [sheet.family])}
        posed = replace(posed, borrowed=spread.borrowed(spread.read(folder), kind, without))
    return posed, found, about


def _check_enough(posed: Problem, sheet: DeviceSheet, *, adapted: bool) -> None:
    networks = len(posed.groups)
    least, how = MIN_NETWORKS, "a fit that can say how wrong it is"
    if networks in posed.borrowed:
        least, how = MIN_BORROWED, "a fit with the spread of other targets"
    elif adapted:
        least, how = MIN_ADAPTED, "a fit with another target's costs as its prior"
    elif FitSettings.of(sheet).borrow_spread:
        how += " without enough other targets to take a spread from"
    how_to_add = "--space snapgen_unet" if sheet.backend else "--import rows.csv"
    hint = f"nas measure --target {sheet.alias} {how_to_add}"
    if networks < least:
        found = "1 measured network" if networks == 1 else f"{networks} measured networks"
        whose = f" of the chip {sheet.chip!r}" if sheet.chip and not sheet.chips else ""
        raise NasError(
            f"{sheet.slug} has {found}{whose}; {how} needs at least {least} (and 40 to be good)",
            hint=hint,
        )
    if not posed.trend and sheet.chip not in posed.chips:
        raise NasError(
            f"{sheet.slug} has no row of its own chip {sheet.chip!r}, and its sheet has no trend of public figures to"
            " tell its speed from the others'",
            hint=hint,
        )


def _notes(found: Sequence[Observation], sheet: DeviceSheet) -> list[str]:
    """What a reader of the card must know about where its rows come from."""
    if not sheet.chips:
        return []
    here = {o.subject for o in found if o.chip == sheet.chip}
    return [
        f"{len({o.chip for o in found})} chips are pooled and predictions are for {sheet.chip}, on which"
        f" {len(here)} of {len({o.subject for o in found})} networks were timed",
        "the noise floor compares devices of one chip, not repeats on one device",
    ]
