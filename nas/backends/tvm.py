"""Apache TVM (Relax, LLVM) on this CPU, untuned.

Untuned schedules run 20-50 times slower than onnxruntime: this proves that a network compiles and computes the same,
it does not rank networks for a tuned deployment.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor, nn

from nas.backends import Loaded, require
from nas.device import Target
from nas.errors import NasError
from nas.exporters import missing
from nas.exporters import tvm as tvm_exporter

NAME = "tvm"


def unavailable() -> str | None:
    """Why TVM cannot be used here, or None."""
    return missing(["tvm"])


def load(module: nn.Module, inputs: Mapping[str, Tensor], target: Target) -> Loaded:
    """Compiles `module` and binds `inputs`.

    Raises:
        UsageError: the target asks for another device, precision or more than one thread (untuned schedules are
            serial: more would change nothing).
        NasError: an operator has no Relax form, or TVM's thread pool does not take the size asked for.
    """
    require(target, inputs, runtime=NAME, precisions={"fp32"}, threads={1})
    import tvm

    # Mode 1 counts from the fastest cores, whatever the environment says.
    tvm.get_global_func("runtime.config_threadpool")(1, target.threads)
    threads = int(tvm.get_global_func("runtime.NumThreads")())
    if threads != target.threads:
        raise NasError(f"TVM runs on {threads} threads, target {target.slug} asks for {target.threads}")
    executable, names = tvm_exporter.compile_module(module, inputs, threads=target.threads)
    device = tvm.cpu()
    machine = tvm.relax.VirtualMachine(executable, device)
    arguments = [tvm.runtime.tensor(inputs[name].detach().numpy(), device) for name in names]
    entry = machine["main"]

    def run() -> np.ndarray:
        output: np.ndarray = entry(*arguments)[0].numpy()
        return output

    return Loaded(
        run=run,
        description={
            "runtime": NAME,
            "provider": f"llvm {tvm_exporter.host_target(target.threads)['mcpu']}, untuned",
            "precision": "fp32",
            "threads": threads,
            "tvm": tvm.__version__,
        },
    )
