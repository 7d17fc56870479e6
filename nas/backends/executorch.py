"""ExecuTorch with XNNPACK on this CPU: the runtime that the same file would have on a phone."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas.backends import Loaded, check_options, cores, require
from nas.device import Target
from nas.errors import NasError
from nas.exporters import executorch as exporter
from nas.exporters import in_forward_order

NAME = "executorch"


def unavailable() -> str | None:
    """Why ExecuTorch cannot be used here, or None."""
    return exporter.unavailable()


def load(
    module: nn.Module, inputs: Mapping[str, Tensor], target: Target, options: Mapping[str, Any] | None = None
) -> Loaded:
    """Lowers `module` to XNNPACK and binds `inputs`, on `target.threads` threads (a setting of the whole process).

    Raises:
        UsageError: the target asks for another device or precision, or more threads than there are cores.
        NasError: the module cannot be lowered, XNNPACK does not take a matrix product or convolution of it, or the
            thread pool does not have the size asked for, now or at a later call.
    """
    check_options(options, (), runtime=NAME)
    require(target, inputs, runtime=NAME, precisions={"fp32"}, threads=cores())
    threads = _pool(target)
    lowered = exporter.lower(module, inputs)
    program = exporter.open_program(lowered.program)
    program.load_method(exporter.METHOD)
    arguments = exporter.arguments(in_forward_order(module, inputs))

    def run() -> np.ndarray:
        if threads() != target.threads:
            raise NasError(f"ExecuTorch runs on {threads()} threads, target {target.slug} asks for {target.threads}")
        with torch.inference_mode():
            # Methods are kept by their program and do not keep it: asking it each time keeps both.
            output: Tensor = program.load_method(exporter.METHOD).execute(arguments)[0]
        return output.numpy()

    return Loaded(
        run=run,
        description={
            "runtime": NAME,
            "provider": f"XNNPACK, {lowered.partitions} partitions",
            "precision": "fp32",
            "threads": threads(),
            "executorch": importlib.metadata.version("executorch"),
            "delegated": sum(lowered.delegated.values()),
            "portable": " ".join(f"{name} {count}" for name, count in sorted(lowered.portable.items())) or "none",
        },
    )


def library() -> ModuleType:
    """ExecuTorch's compiled runtime, which has the thread pool's size."""
    with exporter.calm():
        from executorch.extension.pybindings import portable_lib
    return portable_lib


def _pool(target: Target) -> Callable[[], int]:
    """Sizes the process's thread pool; returns what asks for its size.

    It may not be changed while a method runs, and nothing runs while something else is loaded.
    """
    runtime = library()
    threads: Callable[[], int] = runtime._threadpool_get_thread_count
    if threads() != target.threads:
        runtime._unsafe_reset_threadpool(target.threads)
    if threads() != target.threads:
        raise NasError(f"ExecuTorch runs on {threads()} threads, target {target.slug} asks for {target.threads}")
    return threads
