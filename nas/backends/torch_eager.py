"""Eager PyTorch on the CPU: the reference that other runtimes are compared with."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from nas.backends import Loaded, cores, require
from nas.device import Target
from nas.errors import NasError

NAME = "torch-eager"


def unavailable() -> str | None:
    """Always None: torch is a dependency of this package."""
    return None


def load(module: nn.Module, inputs: Mapping[str, Tensor], target: Target) -> Loaded:
    """`module` as it is, in float32 on `target.threads` threads (a setting of the whole process).

    Raises:
        UsageError: the target asks for another device, precision or more threads than there are cores.
        NasError: the module is not in float32, or another part of the process changes the number of threads later.
    """
    require(target, inputs, runtime=NAME, precisions={"fp32"}, threads=cores())
    other = {str(p.dtype) for p in module.parameters() if p.dtype != torch.float32}
    if other:
        raise NasError(f"target {target.slug} is fp32, but the module has parameters in {', '.join(sorted(other))}")
    torch.set_num_threads(target.threads)
    module.eval()

    def run() -> np.ndarray:
        if torch.get_num_threads() != target.threads:
            raise NasError(
                f"torch runs on {torch.get_num_threads()} threads, target {target.slug} asks for {target.threads}"
            )
        with torch.inference_mode():
            output: Tensor = module(**inputs)
        return output.numpy()

    return Loaded(
        run=run,
        description={
            "runtime": NAME,
            "provider": torch.backends.cpu.get_cpu_capability(),
            "precision": "fp32",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
    )
