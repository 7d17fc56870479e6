"""Trace: what one forward pass is made of."""

from __future__ import annotations

from dataclasses import dataclass

from nas.op import Op


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """One forward pass.

    Attributes:
        ops: the operators in order.
        params: parameters of the module.
        peak_bytes: most activation bytes alive at once, inputs included, at float32.
    """

    ops: tuple[Op, ...]
    params: int
    peak_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole pass."""
        return sum(op.macs for op in self.ops)
