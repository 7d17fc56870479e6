"""Cost: what a block or a network takes, from its operators."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nas.errors import unknown
from nas.network import BlockSpec
from nas.op import Op

# Bytes of one weight and of one activation: "int8" has both of 8 bits, "w8a16" weights of 8 and activations of 16.
BYTES_PER_ELEMENT = {"fp32": (4, 4), "fp16": (2, 2), "bf16": (2, 2), "w8a16": (1, 2), "int8": (1, 1)}
_TRACED = 4  # traces state bytes at float32


def bytes_per_element(precision: str) -> tuple[int, int]:
    """Bytes of one weight and of one activation.

    Raises:
        UsageError: the precision is not in `BYTES_PER_ELEMENT`.
    """
    if precision not in BYTES_PER_ELEMENT:
        raise unknown("precision", precision, BYTES_PER_ELEMENT)
    return BYTES_PER_ELEMENT[precision]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call takes, batch 1 unless it was traced with another.

    Attributes:
        params: number of parameters.
        macs: multiply-accumulates of convolutions, linear layers and attention.
        weight_bytes: bytes of the parameters at the stated precision.
        peak_activation_bytes: most activation bytes alive at once at that precision, weights not included; an upper
            bound for a runtime that fuses operators or reuses buffers (see nas/trace).
    """

    params: int
    macs: int
    weight_bytes: int
    peak_activation_bytes: int


def cost(ops: Iterable[Op], peak_bytes: int, precision: str = "fp32") -> Cost:
    """The cost of something traced, whose every parameter is read once in a pass.

    Args:
        ops: its operators.
        peak_bytes: its peak activation bytes at float32.
        precision: what weights and activations are held in.
    """
    (weight, activation), ops = bytes_per_element(precision), tuple(ops)
    params = sum(op.weight_bytes for op in ops) // _TRACED
    return Cost(
        params=params,
        macs=sum(op.macs for op in ops),
        weight_bytes=params * weight,
        peak_activation_bytes=peak_bytes // _TRACED * activation,
    )


def skip_bytes(block: BlockSpec) -> int:
    """Bytes at float32 of the earlier output that a block takes as `skip`; 0 if it takes none."""
    return _TRACED * math.prod(block.input("skip")) if block.skip is not None else 0


def takes_x(block: BlockSpec) -> bool:
    """Whether the block is on the path of the running activation (the time embedding is not)."""
    return any(name == "x" for name, _ in block.inputs)


def network_peak_bytes(blocks: Sequence[BlockSpec], peaks: Sequence[int]) -> int:
    """Peak activation bytes at float32 of a network, from those of its blocks.

    While a block runs, its own peak (which includes its inputs) is alive, and with it every earlier output that a
    later block will take as `skip` and that is not one of this block's inputs. Not counted: the time embedding and
    the text while a block runs that does not read them (under 1 MB); blocks off the path of x count alone.

    Args:
        blocks: in execution order.
        peaks: peak bytes of each block by itself.
    """
    last_use = {block.skip: i for i, block in enumerate(blocks) if block.skip is not None}
    size_of = {block.skip: skip_bytes(block) for block in blocks if block.skip is not None}
    kept: dict[str, int] = {}
    previous, peak = "", 0
    for i, (block, own) in enumerate(zip(blocks, peaks, strict=True)):
        if not takes_x(block):
            peak = max(peak, own)
            continue
        inputs = (previous, block.skip)
        peak = max(peak, own + sum(size for name, size in kept.items() if name not in inputs))
        if block.skip is not None and last_use[block.skip] == i:
            del kept[block.skip]
        if block.name in last_use:
            kept[block.name] = size_of[block.name]
        previous = block.name
    return peak
