"""A pipeline component: its name, its role, and what it costs, traced when that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from nas.op import features
from nas.trace import Trace

TEXT_ENCODERS, DECODER = "text_encoders", "decoder"


@dataclass(frozen=True, kw_only=True, eq=False)
class Component:
    """A part of a pipeline besides the denoiser, run once per image.

    Attributes:
        role: `TEXT_ENCODERS` or `DECODER`.
        make: traces one run; None for a component whose layers are not published.
        tokens, width: T and D of a text encoder's output; None for a decoder.
    """

    name: str
    role: str
    make: Callable[[], Trace] | None = field(default=None, repr=False)
    tokens: int | None = None
    width: int | None = None

    @cached_property
    def trace(self) -> Trace | None:
        """One run's operators; None where the layers are not published."""
        return None if self.make is None else self.make()

    @property
    def params(self) -> int | None:
        """Number of parameters."""
        return None if self.trace is None else self.trace.params

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of one run."""
        return None if self.trace is None else sum(op.macs for op in self.trace.ops)

    @cached_property
    def features(self) -> np.ndarray | None:
        """[F] as of nas.op.FEATURES."""
        return None if self.trace is None else features(self.trace.ops)
