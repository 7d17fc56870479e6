"""What blocks are made of: their operators by kind, and which part of a network a block is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from nas.cost import bytes_per_element
from nas.network import BlockSpec
from nas.op import MULTIPLYING, Op, features

# The groups that MACs are told by, and the operator kinds in each.
OPERATIONS: Mapping[str, tuple[str, ...]] = {
    "conv": ("conv", "pointwise", "depthwise"),
    "linear": ("linear",),
    "attention": ("attention",),
}
RESNETS, TRANSFORMERS, SAMPLERS, OTHER = "resnets", "transformers", "samplers", "other"
PARTS = (RESNETS, TRANSFORMERS, SAMPLERS, OTHER)
_TRACED = 4  # traces state bytes at float32


def stage(block: str) -> str:
    """The stage of a block: "down_blocks.0" of "down_blocks.0.resnets.1", "mid_block" of "mid_block.resnets.0"."""
    head, _, rest = block.partition(".")
    number = rest.partition(".")[0]
    return f"{head}.{number}" if number.isdigit() else head


def part(block: BlockSpec, ops: Iterable[Op]) -> str:
    """Which of `PARTS` a block is.

    Transformers are blocks with attention, or in the place of one (a transformer may have lost its attention).
    """
    places = block.name.split(".")
    if "attentions" in places or any(op.kind == "attention" for op in ops):
        return TRANSFORMERS
    if "sample" in block.kind or "sample" in block.name:
        return SAMPLERS
    if "resnets" in places or "resnet" in block.kind:
        return RESNETS
    return OTHER


def macs_of(ops: Iterable[Op], kinds: Iterable[str]) -> int:
    """MACs of the operators of these kinds."""
    wanted = frozenset(kinds)
    return sum(op.macs for op in ops if op.kind in wanted)


def by_kind(ops: Iterable[Op], precision: str) -> list[tuple[dict[str, Any], np.ndarray]]:
    """One row per operator kind, in the order in which they first run, each with its features [F].

    Args:
        ops: of one block.
        precision: what weights and activations are held in.

    Returns:
        Rows of operator, count, macs, params, bytes (activations read and written, and weights).
    """
    groups: dict[str, list[Op]] = {}
    for op in ops:
        groups.setdefault(op.kind, []).append(op)
    return [(_row(kind, found, precision), features(found)) for kind, found in groups.items()]


def _row(kind: str, ops: list[Op], precision: str) -> dict[str, Any]:
    weight, activation = (size / _TRACED for size in bytes_per_element(precision))
    return {
        "operator": kind,
        "count": len(ops),
        "macs": sum(op.macs for op in ops),
        "params": sum(op.weight_bytes for op in ops) // _TRACED,
        "bytes": int(sum(weight * op.weight_bytes + activation * (op.read_bytes + op.written_bytes) for op in ops)),
    }


def group(kind: str) -> str:
    """What an operator kind is coloured as: convolution, linear, attention, or moving data."""
    if kind in ("attention", "softmax"):
        return "attention"
    if kind in OPERATIONS["conv"]:
        return "convolution"
    return "linear" if kind in MULTIPLYING else "data and norms"
