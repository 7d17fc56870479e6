"""A whole pipeline around one network: what each part of an image costs and takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from nas import components
from nas.components import Component
from nas.device import DeviceSheet
from nas.errors import NasError
from nas.latency import LatencyPredictor
from nas.pricing import Pricer
from nas.space import Candidate, SearchSpace


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one part of a pipeline takes of an image.

    Attributes:
        role: "text_encoders", "denoiser" or "decoder".
        calls: how often it runs per image.
        params, macs: its parameters, and the multiply-accumulates of one call; None where its layers are unpublished.
        ms, low_ms, high_ms: of all its calls, with the bounds (each side with the confidence asked for); None without
            a device, or where it has no latency there.
        basis: "measured", "published" or "predicted"; "" where `ms` is None.
        source: where `ms` is from, or why there is none.
    """

    role: str
    name: str
    calls: int
    params: int | None
    macs: int | None
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    basis: str = ""
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """An image as its parts, in running order. Totals leave out what is unknown of a part and `lacking` names it."""

    parts: tuple[Share, ...]

    @property
    def params(self) -> int:
        """Parameters of all parts."""
        return sum(part.params or 0 for part in self.parts)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image: each part's times its calls."""
        return sum((part.macs or 0) * part.calls for part in self.parts)

    @property
    def ms(self) -> float | None:
        """Milliseconds of one image; None unless every part has a latency."""
        return self._total("ms")

    @property
    def low_ms(self) -> float | None:
        """The sum of the lower bounds."""
        return self._total("low_ms")

    @property
    def high_ms(self) -> float | None:
        """The sum of the upper bounds."""
        return self._total("high_ms")

    @property
    def lacking(self) -> tuple[str, ...]:
        """Names of the parts without published layers: their parameters and MACs are in no total."""
        return tuple(part.name for part in self.parts if part.params is None)

    def _total(self, name: str) -> float | None:
        values = [getattr(part, name) for part in self.parts]
        return None if None in values else float(sum(values))

    def to_json(self) -> dict[str, Any]:
        """Plain data: the parts and the totals."""
        totals = {name: getattr(self, name) for name in ("params", "macs", "ms", "low_ms", "high_ms")}
        return {"parts": [asdict(part) for part in self.parts], "total": totals, "lacking": list(self.lacking)}


def breakdown(
    candidate: Candidate,
    *,
    sheet: DeviceSheet | None = None,
    predictor: LatencyPredictor | None = None,
    confidence: float = 0.8,
) -> Breakdown | None:
    """A whole pipeline around one network: text encoders, all calls of the denoiser, decoder.

    Args:
        candidate: the denoiser; its space's [pipeline] says the rest (see `with_pipeline`).
        sheet: the device whose latency is asked for, or None.
        predictor: of that device.
        confidence: of each bound.

    Returns:
        None where the space has no [pipeline].
    """
    space = candidate.space
    if space.pipeline is None:
        return None
    prices = Pricer(space).rows(np.asarray(candidate.row)[None])
    calls = space.pipeline.calls
    denoiser = Share(
        role="denoiser", name=str(candidate), calls=calls, params=int(prices.params[0]), macs=int(prices.macs[0])
    )
    if predictor is not None:
        x = prices.features
        denoiser = replace(
            denoiser,
            ms=calls * float(predictor.predict(x, confidence)[0][0]),
            low_ms=calls * float(predictor.lower(x, confidence)[0]),
            high_ms=calls * float(predictor.upper(x, confidence)[0]),
            basis=components.PREDICTED,
            source=f"predicted from its operators by the predictor of {predictor.target}",
        )
    shares = [_component_share(part, space, sheet, predictor, confidence) for part in components.components(space)]
    return Breakdown(parts=(*shares[:-1], denoiser, shares[-1]))


def _component_share(
    component: Component,
    space: SearchSpace,
    sheet: DeviceSheet | None,
    predictor: LatencyPredictor | None,
    confidence: float,
) -> Share:
    """A component's share; where it has no latency on the device, why not."""
    known = Share(role=component.role, name=component.name, calls=1, params=component.params, macs=component.macs)
    if sheet is None:
        return known
    try:
        part = components.charge(component, space.resolution_px, sheet, predictor, confidence)
    except NasError as error:
        return replace(known, source=error.message)
    return replace(known, ms=part.ms, low_ms=part.low_ms, high_ms=part.high_ms, basis=part.basis, source=part.source)
