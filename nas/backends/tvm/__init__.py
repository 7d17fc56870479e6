"""Apache TVM (Relax, LLVM), tuned with MetaSchedule: on this CPU or, over TVM's RPC, on another device.

Kernels without a tuned schedule run 20-50 times slower than onnxruntime, so that a module with such kernels is refused
unless its target is an untuned one. The records are shared by every subject of a target. [options] of the sheet:
`nas.backends.tvm.options.Options`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from nas.backends import Loaded, cores, require
from nas.backends.tvm import remote
from nas.backends.tvm.compiling import Compiled, compile_module, tune_missing
from nas.backends.tvm.options import UNTUNED, Options, read
from nas.device import Target
from nas.errors import NasError
from nas.exporters import missing
from nas.exporters.tvm.machine import words

NAME = "tvm"


def unavailable() -> str | None:
    """Why TVM cannot be used here, or None."""
    return missing(["tvm"])


def load(
    module: nn.Module, inputs: Mapping[str, Tensor], target: Target, options: Mapping[str, Any] | None = None
) -> Loaded:
    """Compiles `module` and binds `inputs`, here or on the device that [options] rpc names.

    Raises:
        UsageError: the target asks for what TVM does not do exactly, or an option is wrong.
        NasError: an operator has no Relax form, kernels lack tuning records, TVM's thread pool does not take the size
            asked for, or the device cannot be reached.
    """
    given = None if options is None else read(options)
    if given is not None and given.rpc is not None:
        return remote.load(module, inputs, target, given)
    require(target, inputs, runtime=_runtime(target), precisions={"fp32"}, threads=cores())
    import tvm

    # Mode 1 counts from the fastest cores, whatever the environment says.
    tvm.get_global_func("runtime.config_threadpool")(1, target.threads)
    threads = int(tvm.get_global_func("runtime.NumThreads")())
    if threads != target.threads:
        raise NasError(f"TVM runs on {threads} threads, target {target.slug} asks for {target.threads}")
    return _bind(compile_module(module, inputs, target, given), inputs, target, threads)


def chip(target: Target, options: Mapping[str, Any] | None = None) -> str | None:
    """The processor of the device behind [options] rpc, asked of it; None: this machine's CPU."""
    given = None if options is None else read(options)
    return None if given is None or given.rpc is None else remote.chip(given.rpc, given)


def prepare(
    modules: Iterable[tuple[nn.Module, Mapping[str, Tensor]]], target: Target, options: Mapping[str, Any]
) -> None:
    """Tunes what the modules lack before any is loaded on a device behind RPC.

    Such a device serves one client at a time: once a module is loaded there, nothing can be tuned there. Here, kernels
    are tuned when their module is loaded, and this does nothing.
    """
    given = read(options)
    if given.rpc is not None and given.tune:
        for module, inputs in modules:
            tune_missing(module, inputs, target, given)


def _bind(compiled: Compiled, inputs: Mapping[str, Tensor], target: Target, threads: int) -> Loaded:
    import tvm

    device = tvm.cpu()
    entry = tvm.relax.VirtualMachine(compiled.executable, device)["main"]
    arguments = [tvm.runtime.tensor(inputs[name].detach().numpy(), device) for name in compiled.names]

    def run() -> np.ndarray:
        output: np.ndarray = entry(*arguments)[0].numpy()
        return output

    return Loaded(
        run=run,
        description={
            "runtime": target.runtime,
            "provider": words(compiled.machine),
            "tuning": compiled.tuning,
            "precision": "fp32",
            "threads": threads,
            "tvm": tvm.__version__,
        },
    )


def _runtime(target: Target) -> str:
    """The runtime that the target must have: an untuned target is one of its own."""
    return UNTUNED if target.runtime == UNTUNED else NAME


__all__ = ["NAME", "Options", "chip", "load", "prepare", "unavailable"]
