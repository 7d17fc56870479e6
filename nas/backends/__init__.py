"""Plug-ins: run a torch module on a runtime of this machine. One runtime per file.

Contract: `unavailable() -> str | None` tells why the runtime cannot be used, without importing it;
`load(module, inputs, target, options) -> Loaded` compiles the module for exactly those inputs; `options` is the
[options] table of the device sheet. The result is callable (one run, the output as an array) and its `describe()` says
what really runs: it is asked of the runtime after loading, not copied from the target. A backend refuses what it cannot
do exactly as the target asks, and options that it does not know.

A description with the key "chip" names what computed where that is not this machine's CPU, such as a GPU; rows carry
the chip of the device sheet, which must be the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from nas.device import Target
from nas.errors import NasError, UsageError, unknown


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A module compiled for a target, with its inputs bound.

    Attributes:
        run: one call on the bound inputs; the time of this call is what is measured.
        description: runtime, provider, precision, threads and versions as found after loading.
        device_ms: mean ms per call of that many calls in a row, timed on the device itself; for a runtime of another
            machine, where the clock of this one would time the network. None: the call is timed here.
    """

    run: Callable[[], np.ndarray]
    description: Mapping[str, str | int]
    device_ms: Callable[[int], float] | None = None

    def __call__(self) -> np.ndarray:
        """Runs once and returns the output."""
        return self.run()

    def describe(self) -> dict[str, str | int]:
        """What really runs."""
        return dict(self.description)


def require(
    target: Target,
    inputs: Mapping[str, Tensor],
    *,
    runtime: str,
    precisions: Collection[str],
    threads: Collection[int],
    devices: Collection[str] | None = ("cpu",),
) -> None:
    """Refuses a target that this runtime would not honour exactly; `devices` None: it may be called anything.

    Raises:
        UsageError: another runtime, device, precision or number of threads than the backend can give.
        NasError: the inputs' batch is not the target's.
    """
    for field, got, allowed in (
        ("runtime", target.runtime, [runtime]),
        ("device", target.device, sorted(devices) if devices is not None else [target.device]),
        ("precision", target.precision, sorted(precisions)),
        ("threads", target.threads, sorted(threads)),
    ):
        if got not in allowed:
            raise UsageError(
                f"backend {runtime} cannot run target {target.slug}: {field} is {got!r}, allowed here:"
                f" {', '.join(str(a) for a in allowed)}"
            )
    for name, tensor in inputs.items():
        if tensor.shape[:1] != (target.batch,):
            raise NasError(
                f"input {name!r} has shape {tuple(tensor.shape)}, target {target.slug} has batch {target.batch}"
            )


def check_options(options: Mapping[str, Any] | None, known: Collection[str], *, runtime: str) -> dict[str, Any]:
    """The options that a sheet gives a backend.

    Raises:
        UsageError: an option that the backend does not have.
    """
    for name in options or {}:
        if name not in known:
            raise unknown("option", name, known, where=f"[options] of a device sheet for backend {runtime}")
    return dict(options or {})


def cores() -> range:
    """The numbers of threads that this process may ask for."""
    return range(1, len(os.sched_getaffinity(0)) + 1)
