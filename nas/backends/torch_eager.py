"""Eager PyTorch, on the CPU the reference that other runtimes are compared with, or on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nas.backends import Loaded, _torch
from nas.device import Target

NAME = "torch-eager"


def unavailable() -> str | None:
    """Always None: torch is a dependency of this package."""
    return None


def load(
    module: nn.Module, inputs: Mapping[str, Tensor], target: Target, options: Mapping[str, Any] | None = None
) -> Loaded:
    """`module` as it is: in float32 on `target.threads` threads of the CPU, or on the GPU that `options` name.

    Args:
        module: on a GPU a copy of it runs, in the target's precision.
        inputs: by the names of forward; those in floating point are cast like the module.
        target: what is asked for.
        options: `nas.backends._torch.Settings`.

    Raises:
        UsageError: the target asks for another device or precision or more threads than there are cores, or the options
            for what torch does not have.
        NasError: the module is not in float32, the GPU is not the one named, or another part of the process changes
            torch's settings later.
    """
    placed = _torch.place(module, inputs, target, _torch.settings(options, NAME), NAME)
    return _torch.loaded(lambda: placed.module(**placed.inputs), placed, {"runtime": NAME, **placed.description})
