"""How wrong fits of one to four networks are: taken from other targets, where more were timed.

Two or three published networks fit a scale but cannot say how wrong that fit is. Other targets can: there, so few
networks are drawn, fitted from the same kind of prior, and the rest predicted. `latency_tables/spread.json` holds what
came out, per target, number of networks and ridge; a sheet with `borrow_spread = true` uses the other targets' part.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nas.errors import NasError
from nas.paths import data_dir

ROOFLINE = "roofline"
FEW = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Borrowed:
    """What other targets say about a fit of so many networks.

    Attributes:
        sd: root mean square, over those targets, of normalised log residuals on networks not fitted.
        degrees: one less than there are targets: their own scatter is what limits how well `sd` is known.
        ridge: the one under which the other targets' networks were most likely.
        targets: which they are.
    """

    sd: float
    degrees: int
    ridge: float
    targets: tuple[str, ...]


def spread_path(folder: str | Path | None = None) -> Path:
    """latency_tables/spread.json."""
    return data_dir("latency_tables", folder) / "spread.json"


def read(folder: str | Path | None = None) -> dict[str, Any]:
    """{prior: {target: {networks: {ridge: {"square", "spread"}}}}}; empty without the file.

    Raises:
        NasError: the file is not valid JSON.
    """
    path = spread_path(folder)
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text())["priors"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise NasError(f"{path}: not a file of spreads: {error}", hint="python benchmarks/latency_spread.py") from error


def borrowed(data: Mapping[str, Any], prior: str, without: Collection[str]) -> dict[int, Borrowed]:
    """By number of networks, what targets other than `without` say; none with fewer than two such targets.

    Args:
        data: of `read`.
        prior: `ROOFLINE`, or the slug of the target whose costs the fit is shrunk towards.
        without: slugs that may not testify: the target itself, its family and its prior.
    """
    found = {}
    for networks in FEW:
        by_target = {
            target: by_number[str(networks)]
            for target, by_number in sorted(data.get(prior, {}).items())
            if target not in without and str(networks) in by_number
        }
        if len(by_target) > 1:
            found[networks] = _pooled(by_target)
    return found


def _pooled(by_target: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Borrowed:
    """One spread from several targets, each counted once, at the ridge that suits them best together."""

    def likelihood(ridge: str) -> float:
        square = np.mean([by_ridge[ridge]["square"] for by_ridge in by_target.values()])
        return float(-0.5 * np.log(square) - np.mean([by_ridge[ridge]["spread"] for by_ridge in by_target.values()]))

    best = max(next(iter(by_target.values())), key=likelihood)
    square = np.mean([by_ridge[best]["square"] for by_ridge in by_target.values()])
    return Borrowed(sd=float(np.sqrt(square)), degrees=len(by_target) - 1, ridge=float(best), targets=tuple(by_target))
