"""Plug-ins: run a torch module on a runtime of this machine. One runtime per file.

Contract: `unavailable() -> str | None` tells why the runtime cannot be used, without importing it;
`load(module, inputs, target) -> Loaded` compiles the module for exactly those inputs. The result is callable (one run,
the output as an array) and its `describe()` says what really runs: it is asked of the runtime after loading, not copied
from the target. A backend refuses what it cannot do exactly as the target asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nas.device import Target
from nas.errors import NasError, UsageError


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A module compiled for a target, with its inputs bound.

    Attributes:
        run: one call on the bound inputs; the time of this call is what is measured.
        description: runtime, provider, precision, threads and versions as found after loading.
    """

    run: Callable[[], np.ndarray]
    description: Mapping[str, str | int]

    def __call__(self) -> np.ndarray:
        """Runs once and returns the output."""
        return self.run()

    def describe(self) -> dict[str, str | int]:
        """What really runs."""
        return dict(self.description)


def require(
    target: Target, inputs: Mapping[str, Tensor], *, runtime: str, precisions: Collection[str], threads: Collection[int]
) -> None:
    """Refuses a target that this CPU runtime would not honour exactly.

    Raises:
        UsageError: another runtime, device, precision or number of threads than the backend can give.
        NasError: the inputs' batch is not the target's.
    """
    for field, got, allowed in (
        ("runtime", target.runtime, [runtime]),
        ("device", target.device, ["cpu"]),
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


def cores() -> range:
    """The numbers of threads that this process may ask for."""
    return range(1, len(os.sched_getaffinity(0)) + 1)
