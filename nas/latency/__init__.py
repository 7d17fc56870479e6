"""Fits a target's latency predictor from its table, says how good it is, and loads it again.

What is held out is always a whole network with all its rows: the search prices networks that were never measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from nas import tables
from nas.device import DeviceSheet, find_target
from nas.errors import NasError
from nas.latency.calibration import calibrated, card, chosen
from nas.latency.predictor import LatencyPredictor
from nas.latency.problem import problem
from nas.paths import atomic_write
from nas.tables import Measurement, Observation, Subject

__all__ = ["MIN_NETWORKS", "LatencyPredictor", "fit", "load_predictor", "refit"]

MIN_NETWORKS = 5


def refit(slug: str, folder: str | Path | None = None) -> LatencyPredictor:
    """Fits a table as it is now and writes <slug>.predictor.json beside it.

    Raises:
        NasError: too few networks were measured (the message says how many are needed).
    """
    sheet = find_target(slug, folder)
    predictor = fit(tables.read(sheet.slug, folder), tables.subjects(sheet.slug, folder), sheet)
    data = {"inputs_sha": tables.inputs_sha(sheet.slug, folder), **predictor.to_json()}
    atomic_write(_path(sheet.slug, folder), json.dumps(data, indent=None, separators=(",", ":")) + "\n")
    return predictor


def load_predictor(slug: str, folder: str | Path | None = None) -> LatencyPredictor:
    """The fitted predictor of a target (slug or alias).

    Raises:
        NasError: it was never fitted, or its table or sheet has changed since.
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
    if data.get("inputs_sha") != tables.inputs_sha(sheet.slug, folder):
        raise NasError(f"{path} was fitted to another state of the table or sheet of {sheet.slug}", hint=hint)
    return LatencyPredictor.from_json(data)


def _path(slug: str, folder: str | Path | None) -> Path:
    return tables.table_path(slug, ".predictor.json", folder)


def fit(
    measurements: Sequence[Measurement],
    subjects: Mapping[str, Subject],
    sheet: DeviceSheet,
    prior: np.ndarray | None = None,
) -> LatencyPredictor:
    """Fits a predictor and its card.

    Args:
        measurements: of one table; flagged and excluded rows are not read.
        subjects: with features, by key.
        sheet: gives the prior, the chips to pool and the settings of the fit.
        prior: [F] ms per unit of each feature, such as another predictor's coefficients; the sheet's roofline if None.

    Raises:
        NasError: fewer than `MIN_NETWORKS` networks, or a row without features.
    """
    posed, found = problem(measurements, subjects, sheet, prior)
    if len(posed.groups) < MIN_NETWORKS:
        whose = f" of the chip {sheet.chip!r}" if sheet.chip and not sheet.chips else ""
        raise NasError(
            f"{sheet.slug} has {len(posed.groups)} measured networks{whose}; a fit that can say how wrong it is needs"
            f" at least {MIN_NETWORKS} (and 40 to be good)",
            hint=f"nas measure --space snapgen_unet --target {sheet.alias}",
        )
    everything = np.ones(len(posed.names), dtype=bool)
    final = chosen(posed, everything)
    predictor = calibrated(final, everything, posed.target_effects)
    about = card(final, predictor)
    about["excluded"] = sum(not row.used for row in measurements)
    about["sessions"] = len({row.session.partition("/")[0] for row in measurements if row.used})
    about["noise_floor"] = tables.noise_floor(o for o in found if o.kind != "block")
    about["notes"] = _notes(found, sheet)
    return replace(predictor, card=about)


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
