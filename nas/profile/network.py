"""One network, block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from nas.cost import Cost, bytes_per_element, cost, network_peak_bytes
from nas.device import DeviceSheet
from nas.evaluate import Breakdown, breakdown
from nas.latency import LatencyPredictor
from nas.network import BlockSpec
from nas.profile.counters import Count, count_all
from nas.profile.measured import Measured, measure
from nas.profile.operators import OPERATIONS, by_kind, macs_of, part, stage
from nas.profile.roof import Roof
from nas.profile.shares import headline, shares
from nas.profile.subject import Subject
from nas.trace import Trace, block_trace

Progress = Callable[[str, int, int, str], None]
_TRACED = 4  # traces state bytes at float32

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
        blocks: in execution order, one row each: name, kind, stage, part (of `operators.PARTS`), params, macs, of these
            conv_macs, linear_macs and attention_macs (the matmuls of attention), weight_bytes, activation_bytes (read
            and written by its operators), peak_bytes, step_ms and share (NaN without a predictor).
        operators: one row per block and kind of operator: block, stage, part, operator, count, macs, params, bytes
            (activations and weights), step_ms (the predictor's contribution) and share.
        total: of the network.
        latency: None without a predictor.
        roof: of the device; None without one.
        measured: this machine's times; None where nothing was timed.
        counts: MACs of the same network by each counter, empty when not asked for.
        whole: an image with everything else that its space's [pipeline] runs; None when not asked for, or without one.
    """

    subject: Subject
    precision: str
    blocks: pd.DataFrame
    operators: pd.DataFrame
    total: Cost
    latency: Latency | None
    roof: Roof | None = None
    measured: Measured | None = None
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

    @property
    def kinds(self) -> pd.DataFrame:
        """Operators summed over blocks: indexed by operator, the slowest first (without a predictor: most MACs).

        Columns count, macs, params, bytes, step_ms and share.
        """
        columns = ["count", "macs", "params", "bytes", "step_ms", "share"]
        found = self.operators.groupby("operator", sort=False)[columns].sum(min_count=1)
        return found.sort_values(["step_ms", "macs", "bytes"], ascending=False)

    @property
    def shares(self) -> pd.DataFrame:
        """Stage by part: see `nas.profile.shares.shares`."""
        return shares(self.blocks)

    @property
    def headline(self) -> str:
        """Where parameters and time are, in one sentence without its end."""
        return headline(self.shares)

    @property
    def rates(self) -> pd.DataFrame:
        """How fast blocks run, indexed by name: bytes, intensity (MACs per byte) and, per basis, MACs per second.

        Columns macs, bytes, intensity; predicted_ms and measured_ms (a block inside the network where its nodes were
        profiled, else alone); predicted_gmac_s and measured_gmac_s; predicted_of_roof and measured_of_roof: the least
        time under the roof over the time taken. NaN where not known.
        """
        blocks = self.blocks.set_index("name")
        found = blocks[["stage", "part", "macs"]].assign(bytes=blocks["weight_bytes"] + blocks["activation_bytes"])
        found["intensity"] = found["macs"] / found["bytes"]
        times = {"predicted": blocks["step_ms"], "measured": self._measured_ms()}
        least = np.nan if self.roof is None else self.roof.least_ms(found["macs"], found["bytes"])
        for basis, ms in times.items():
            found[f"{basis}_ms"] = ms
            found[f"{basis}_gmac_s"] = found["macs"] / 1e6 / ms
            found[f"{basis}_of_roof"] = least / ms
        return found

    def _measured_ms(self) -> pd.Series:
        ms = {} if self.measured is None else self.measured.best_ms
        return pd.Series({name: ms.get(name, np.nan) for name in self.blocks["name"]}, dtype=float)

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
            "headline": self.headline,
            "roof": None if self.roof is None else self.roof.to_json(),
            "stages": _records(self.stages.reset_index()),
            "shares": _records(self.shares),
            "blocks": _records(self.blocks),
            "kinds": _records(self.kinds.reset_index()),
            "operators": _records(self.operators),
            "rates": _records(self.rates.rename_axis("name").reset_index()),
            "measured": None if self.measured is None else self.measured.to_json(),
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
    sheet: DeviceSheet | None = None,
    precision: str = "fp32",
    confidence: float = 0.8,
    progress: Progress | None = None,
) -> Profile:
    """Profiles one network.

    Args:
        subject: which network.
        predictor: prices the blocks in milliseconds; None leaves latency out.
        sheet: whose roof achieved speed is held against; None leaves that out.
        precision: what weights and activations are held in (a target's, as "fp16").
        confidence: of the latency's interval.
        progress: called with (stage, done, total, note).

    Raises:
        UsageError: unknown precision.
        NasError: the predictor has never seen one of the network's operator kinds.
    """
    scale = bytes_per_element(precision)[1] / _TRACED  # of activations
    spec, rows, parts, vectors, owner = subject.spec, [], [], [], []
    for i, block in enumerate(spec.blocks):
        if progress is not None:
            progress("trace", i, len(spec.blocks), block.name)
        trace = block_trace(block)
        rows.append(_block_row(block, trace, precision, scale))
        for row, vector in by_kind(trace.ops, precision):
            place = {"block": block.name, "stage": rows[-1]["stage"], "part": rows[-1]["part"]}
            parts.append({**place, **row})
            vectors.append(vector)
            owner.append(i)
    if progress is not None:
        progress("trace", len(spec.blocks), len(spec.blocks), "blocks traced")
    priced = np.array(vectors)
    kind_ms = np.full(len(parts), np.nan) if predictor is None else predictor.contributions(priced)
    ms = np.bincount(owner, weights=kind_ms, minlength=len(rows))
    table = pd.DataFrame(rows)
    peaks = [block_trace(block).peak_bytes for block in spec.blocks]
    return Profile(
        subject=subject,
        precision=precision,
        blocks=table.assign(step_ms=ms, share=ms / ms.sum()),
        operators=pd.DataFrame(parts).assign(step_ms=kind_ms, share=kind_ms / kind_ms.sum()),
        total=Cost(
            params=int(table["params"].sum()),
            macs=int(table["macs"].sum()),
            weight_bytes=int(table["weight_bytes"].sum()),
            peak_activation_bytes=int(scale * network_peak_bytes(spec.blocks, peaks)),
        ),
        latency=None if predictor is None else _latency(predictor, priced, confidence),
        roof=None if sheet is None else Roof.of(sheet),
    )


def _block_row(block: BlockSpec, trace: Trace, precision: str, scale: float) -> dict[str, Any]:
    own = cost(trace.ops, trace.peak_bytes, precision)
    return {
        "name": block.name,
        "kind": block.kind,
        "stage": stage(block.name),
        "part": part(block, trace.ops),
        "params": own.params,
        "macs": own.macs,
        **{f"{group}_macs": macs_of(trace.ops, kinds) for group, kinds in OPERATIONS.items()},
        "weight_bytes": own.weight_bytes,
        "activation_bytes": int(scale * sum(op.read_bytes + op.written_bytes for op in trace.ops)),
        "peak_bytes": own.peak_activation_bytes,
    }


def with_measured(
    found: Profile, sheet: DeviceSheet, progress: Progress | None = None, *, least_repeats: int = 7
) -> Profile:
    """The same profile with the network and its blocks timed on this machine: about a minute.

    Raises:
        UsageError: the device's sheet names no backend.
        NasError: it cannot run here, or the memory does not suffice.
    """
    return replace(found, measured=measure(found.subject.spec, sheet, progress, least_repeats=least_repeats))


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
