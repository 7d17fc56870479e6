"""Op: one tensor operation of a network, and the feature vector that a list of them becomes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from nas.errors import NasError

# conv: dense convolution with a kernel larger than 1; pointwise: 1x1 convolution; attention: the batched matmuls
# of attention (never counted as linear); norm: group, layer and RMS norms with all their reductions; layout: a copy
# that only moves data; lookup: tables and sinusoids of the time embedding.
KINDS = (
    "conv",
    "pointwise",
    "depthwise",
    "linear",
    "attention",
    "softmax",
    "norm",
    "elementwise",
    "concat",
    "resize",
    "layout",
    "lookup",
)
MULTIPLYING = ("conv", "pointwise", "depthwise", "linear", "attention")

_MEASURES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(KINDS, ("bytes", "far", "count")),
    **dict.fromkeys(MULTIPLYING, ("macs", "read", "written", "far", "count")),
    "linear": ("macs", "few_macs", "read", "written", "far", "count"),
}
FEATURES: tuple[str, ...] = tuple(f"{kind}.{measure}" for kind in KINDS for measure in _MEASURES[kind])
_FEW_ROWS = 16  # a matrix product of so few rows reads its weights for little arithmetic
_NEAR_BYTES = 4 * 2**20  # what more than this passes through leaves the memory next to the processor
_INDEX = {name: i for i, name in enumerate(FEATURES)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One operation as traced.

    Attributes:
        kind: one of `KINDS`.
        macs: multiply-accumulates; 0 for operations that only move or transform data.
        weight_bytes: parameters read, at `dtype`.
        read_bytes, written_bytes: activations, at `dtype`.
        shape: the output's shape.
        dtype: the precision that the bytes are stated at; another precision scales them.
    """

    kind: str
    macs: int = 0
    weight_bytes: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise NasError(f"unknown operator kind {self.kind!r}; known: {', '.join(KINDS)}")
        if self.macs and self.kind not in MULTIPLYING:
            raise NasError(f"operator kind {self.kind!r} cannot have MACs (got {self.macs})")


def features(ops: Iterable[Op]) -> np.ndarray:
    """Sums a network's (or block's) operators into the vector that latency is predicted from.

    Returns:
        float64 [F] in the order of `FEATURES`. Per kind, bytes at float32: giga-MACs (those of linear layers over at
        most 16 rows apart); gigabytes read (weights too) and written, or both as one where nothing is multiplied;
        "far", the gigabytes of operators that move more than 4 MiB, times how many doublings more; and thousands of
        operators.
    """
    vector = np.zeros(len(FEATURES))
    for op in ops:
        read, moved = op.weight_bytes + op.read_bytes, op.weight_bytes + op.read_bytes + op.written_bytes
        if op.kind in MULTIPLYING:
            few = op.kind == "linear" and bool(op.shape) and math.prod(op.shape[:-1]) <= _FEW_ROWS
            vector[_INDEX[f"{op.kind}.{'few_macs' if few else 'macs'}"]] += op.macs / 1e9
            vector[_INDEX[f"{op.kind}.read"]] += read / 1e9
            vector[_INDEX[f"{op.kind}.written"]] += op.written_bytes / 1e9
        else:
            vector[_INDEX[f"{op.kind}.bytes"]] += moved / 1e9
        if moved > _NEAR_BYTES:
            vector[_INDEX[f"{op.kind}.far"]] += moved / 1e9 * math.log2(moved / _NEAR_BYTES)
        vector[_INDEX[f"{op.kind}.count"]] += 1e-3
    return vector
