"""Op: one tensor operation of a network, and the feature vector that a list of them becomes."""

from __future__ import annotations

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

FEATURES: tuple[str, ...] = tuple(
    feature
    for kind in KINDS
    for feature in ((f"{kind}.macs",) if kind in MULTIPLYING else ()) + (f"{kind}.bytes", f"{kind}.count")
)
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
        float64 [F] in the order of `FEATURES`: giga-MACs, gigabytes moved (activations read and written, weights
        read) at float32, and thousands of operators, per kind.
    """
    vector = np.zeros(len(FEATURES))
    for op in ops:
        if op.kind in MULTIPLYING:
            vector[_INDEX[f"{op.kind}.macs"]] += op.macs / 1e9
        vector[_INDEX[f"{op.kind}.bytes"]] += (op.weight_bytes + op.read_bytes + op.written_bytes) / 1e9
        vector[_INDEX[f"{op.kind}.count"]] += 1e-3
    return vector
