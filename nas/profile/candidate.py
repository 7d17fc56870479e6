"""One network, block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from nas.cost import Cost, bytes_per_element
from nas.latency import LatencyPredictor
from nas.pricing import Pricer
from nas.profile.counters import Count, compare
from nas.space import Candidate
from nas.trace import block_trace

Progress = Callable[[str, int, int, str], None]
_TRACED = 4  # traces state bytes at float32


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One denoiser call as predicted, with a central interval."""

    target: str
    ms: float
    low_ms: float
    high_ms: float
    confidence: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A candidate's cost.

    Attributes:
        candidate: what was profiled.
        name: its key, or the reference's name.
        precision: what bytes are stated at.
        blocks: in execution order, one row each: block, kind, stage, params, macs, weight_bytes, activation_bytes
            (read and written by its operators), peak_bytes, step_ms and share (NaN without a predictor).
        total: of the network.
        latency: None without a predictor.
        counts: MACs of the same network by each counter, empty when not asked for.
    """

    candidate: Candidate
    name: str
    precision: str
    blocks: pd.DataFrame
    total: Cost
    latency: Latency | None
    counts: tuple[Count, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `nas profile --json` prints it."""
        return {
            "space": self.candidate.space.name,
            "resolution_px": self.candidate.space.resolution_px,
            "name": self.name,
            "key": self.candidate.key,
            "choices": self.candidate.choices,
            "precision": self.precision,
            **asdict(self.total),
            "latency": None if self.latency is None else asdict(self.latency),
            "blocks": self.blocks.astype(object).where(self.blocks.notna(), None).to_dict("records"),
            "counters": [asdict(c) for c in self.counts],
        }


def profile(
    candidate: Candidate,
    predictor: LatencyPredictor | None = None,
    *,
    name: str = "",
    precision: str = "fp32",
    confidence: float = 0.8,
    counters: bool = True,
    progress: Progress | None = None,
) -> Profile:
    """Profiles one candidate.

    Args:
        candidate: which network.
        predictor: prices the blocks in milliseconds; None leaves latency out.
        name: how the page calls it; its key if empty.
        precision: what weights and activations are held in (a target's, as "fp16").
        confidence: of the latency's interval.
        counters: also count MACs with torch, thop and fvcore (half a minute).
        progress: called with (stage, done, total, note).

    Raises:
        UsageError: unknown precision.
        NasError: the predictor has never seen one of the network's operator kinds.
    """
    pricer = Pricer(candidate.space, precision)
    priced = pricer.blocks(candidate)
    features = np.array([block.features for block in priced])
    scale = bytes_per_element(precision) / _TRACED
    rows = []
    for block in priced:
        ops = block_trace(block.spec).ops
        rows.append(
            {
                "block": block.spec.name,
                "kind": block.spec.kind,
                "stage": stage(block.spec.name),
                "params": block.cost.params,
                "macs": block.cost.macs,
                "weight_bytes": block.cost.weight_bytes,
                "activation_bytes": int(scale * sum(op.read_bytes + op.written_bytes for op in ops)),
                "peak_bytes": block.cost.peak_activation_bytes,
            }
        )
    latency = None if predictor is None else _latency(predictor, features, confidence)
    ms = np.full(len(rows), np.nan) if predictor is None else predictor.contributions(features)
    return Profile(
        candidate=candidate,
        name=name or candidate.key,
        precision=precision,
        blocks=pd.DataFrame(rows).assign(step_ms=ms, share=ms / ms.sum()),
        total=pricer.candidate(candidate),
        latency=latency,
        counts=compare(candidate, progress) if counters else (),
    )


def stage(block: str) -> str:
    """The stage of a block: "down_blocks.0" of "down_blocks.0.resnets.1", "mid_block" of "mid_block.resnets.0"."""
    head, _, rest = block.partition(".")
    number = rest.partition(".")[0]
    return f"{head}.{number}" if number.isdigit() else head


def _latency(predictor: LatencyPredictor, features: np.ndarray, confidence: float) -> Latency:
    whole = features.sum(axis=0, keepdims=True)
    ms, low, high = predictor.predict(whole, confidence)
    return Latency(
        target=predictor.target,
        ms=float(ms[0]),
        low_ms=float(low[0]),
        high_ms=float(high[0]),
        confidence=confidence,
        warnings=predictor.warnings(whole),
    )
