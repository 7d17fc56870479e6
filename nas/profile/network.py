"""One network, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from nas.cost import Cost, bytes_per_element, cost, network_peak_bytes
from nas.device import DeviceSheet
from nas.evaluate import Breakdown, breakdown
from nas.latency import LatencyPredictor
from nas.op import Op, features
from nas.profile.counters import Count, count_all
from nas.profile.subject import Subject
from nas.trace import block_trace

Progress = Callable[[str, int, int, str], None]
_TRACED = 4  # traces state bytes at float32

# The groups that MACs are told by, and the operator kinds in each.
OPERATIONS: Mapping[str, tuple[str, ...]] = {
    "conv": ("conv", "pointwise", "depthwise"),
    "linear": ("linear",),
    "attention": ("attention",),
}
_SUMMED = ("params", "macs", *(f"{group}_macs" for group in OPERATIONS), "weight_bytes", "activation_bytes", "step_ms")


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One call as predicted, with a central interval."""

    target: str
    ms: float
    low_ms: float
    high_ms: float
    confidence: float
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A network's cost.

    Attributes:
        subject: what was profiled.
        precision: what bytes are stated at.
        blocks: in execution order, one row each: name, kind, stage, params, macs, of these conv_macs, linear_macs and
            attention_macs (the matmuls of attention), weight_bytes, activation_bytes (read and written by its
            operators), peak_bytes, step_ms and share (NaN without a predictor).
        total: of the network.
        latency: None without a predictor.
        counts: MACs of the same network by each counter, empty when not asked for.
        whole: an image with everything else that its space's [pipeline] runs; None when not asked for, or without one.
    """

    subject: Subject
    precision: str
    blocks: pd.DataFrame
    total: Cost
    latency: Latency | None
    counts: tuple[Count, ...] = ()
    whole: Breakdown | None = None

    @property
    def name(self) -> str:
        """How tables and pages call the network."""
        return self.subject.name

    @property
    def stages(self) -> pd.DataFrame:
        """The columns of `blocks` that add up, summed over each stage: in execution order, indexed by stage.

        step_ms is NaN without a predictor.
        """
        return self.blocks.groupby("stage", sort=False)[list(_SUMMED)].sum(min_count=1)

    @property
    def operations(self) -> dict[str, int]:
        """MACs by group of operations; they add up to the network's."""
        return {group: int(self.blocks[f"{group}_macs"].sum()) for group in OPERATIONS}

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `nas profile --json` prints it."""
        subject, point = self.subject, self.subject.point
        return {
            "name": subject.name,
            "source": subject.source,
            "resolution_px": subject.resolution_px,
            "input": subject.spec.input.to_json(),
            "space": None if point is None else point.candidate.space.name,
            "references": [] if point is None else list(point.references),
            "key": None if point is None else point.candidate.key,
            "choices": None if point is None else point.candidate.choices,
            "no_point_because": subject.miss or None,
            "precision": self.precision,
            **asdict(self.total),
            "macs_by_operation": self.operations,
            "latency": None if self.latency is None else asdict(self.latency),
            "stages": _records(self.stages.reset_index()),
            "blocks": _records(self.blocks),
            "counters": [asdict(c) for c in self.counts],
            "pipeline": self._pipeline(),
        }

    def _pipeline(self) -> dict[str, Any] | None:
        candidate = self.subject.candidate
        if self.whole is None or candidate is None or candidate.space.pipeline is None:
            return None
        return {**asdict(candidate.space.pipeline), **self.whole.to_json()}


def profile(
    subject: Subject,
    predictor: LatencyPredictor | None = None,
    *,
    precision: str = "fp32",
    confidence: float = 0.8,
    progress: Progress | None = None,
) -> Profile:
    """Profiles one network.

    Args:
        subject: which network.
        predictor: prices the blocks in milliseconds; None leaves latency out.
        precision: what weights and activations are held in (a target's, as "fp16").
        confidence: of the latency's interval.
        progress: called with (stage, done, total, note).

    Raises:
        UsageError: unknown precision.
        NasError: the predictor has never seen one of the network's operator kinds.
    """
    scale = bytes_per_element(precision) / _TRACED
    spec, rows, vectors = subject.spec, [], []
    for i, block in enumerate(spec.blocks):
        if progress is not None:
            progress("trace", i, len(spec.blocks), block.name)
        trace = block_trace(block)
        own = cost(trace.ops, trace.peak_bytes, precision)
        vectors.append(features(trace.ops))
        rows.append(
            {
                "name": block.name,
                "kind": block.kind,
                "stage": stage(block.name),
                "params": own.params,
                "macs": own.macs,
                **{f"{group}_macs": _macs(trace.ops, kinds) for group, kinds in OPERATIONS.items()},
                "weight_bytes": own.weight_bytes,
                "activation_bytes": int(scale * sum(op.read_bytes + op.written_bytes for op in trace.ops)),
                "peak_bytes": own.peak_activation_bytes,
            }
        )
    if progress is not None:
        progress("trace", len(spec.blocks), len(spec.blocks), "blocks traced")
    table, priced = pd.DataFrame(rows), np.array(vectors)
    ms = np.full(len(rows), np.nan) if predictor is None else predictor.contributions(priced)
    peaks = [block_trace(block).peak_bytes for block in spec.blocks]
    return Profile(
        subject=subject,
        precision=precision,
        blocks=table.assign(step_ms=ms, share=ms / ms.sum()),
        total=Cost(
            params=int(table["params"].sum()),
            macs=int(table["macs"].sum()),
            weight_bytes=int(table["weight_bytes"].sum()),
            peak_activation_bytes=int(scale * network_peak_bytes(spec.blocks, peaks)),
        ),
        latency=None if predictor is None else _latency(predictor, priced, confidence),
    )


def with_counters(found: Profile, progress: Progress | None = None) -> Profile:
    """The same profile with the network's MACs by every counter: some seconds."""
    return replace(found, counts=count_all(found.subject.spec, progress))


def with_pipeline(
    found: Profile,
    sheet: DeviceSheet | None = None,
    predictor: LatencyPredictor | None = None,
    confidence: float = 0.8,
    progress: Progress | None = None,
) -> Profile:
    """The same profile with a whole image of its space's [pipeline], where the network is a candidate of one."""
    if found.subject.candidate is None or found.subject.candidate.space.pipeline is None:
        return found
    if progress is not None:
        progress("pipeline", 0, 1, "text encoders and decoder")
    whole = breakdown(found.subject.candidate, sheet=sheet, predictor=predictor, confidence=confidence)
    return replace(found, whole=whole)


def stage(block: str) -> str:
    """The stage of a block: "down_blocks.0" of "down_blocks.0.resnets.1", "mid_block" of "mid_block.resnets.0"."""
    head, _, rest = block.partition(".")
    number = rest.partition(".")[0]
    return f"{head}.{number}" if number.isdigit() else head


def _macs(ops: tuple[Op, ...], kinds: tuple[str, ...]) -> int:
    return sum(op.macs for op in ops if op.kind in kinds)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A list of rows; what is not known is None."""
    return [
        {str(k): v for k, v in row.items()}
        for row in frame.astype(object).where(frame.notna(), None).to_dict("records")
    ]


def _latency(predictor: LatencyPredictor, vectors: np.ndarray, confidence: float) -> Latency:
    whole = vectors.sum(axis=0, keepdims=True)
    ms, low, high = predictor.predict(whole, confidence)
    return Latency(
        target=predictor.target,
        ms=float(ms[0]),
        low_ms=float(low[0]),
        high_ms=float(high[0]),
        confidence=confidence,
        warnings=predictor.warnings(whole),
    )
