"""TVM modules from torch modules: torch.export, then Relax, then machine code for this CPU or another machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas.exporters import in_forward_order, missing
from nas.exporters.tvm.lowering import assemble, fuse
from nas.exporters.tvm.machine import check_ending, make_target, write_library

SUFFIX = ".tar"


def unavailable() -> str | None:
    """Why TVM modules cannot be built here, or None."""
    return missing(["tvm"])


def export(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    path: str | Path,
    *,
    target: Mapping[str, Any] | None = None,
    threads: int = 1,
    compiler: str | None = None,
) -> Path:
    """Compiles `module`, untuned, into a library: `.tar` (object files, no linker needed) or `.so` (linked here).

    Args:
        module: what to compile.
        inputs: of exactly the shapes that it will be called with.
        path: of the library; its ending decides its form.
        target: the machine that will run it, such as `machine.AARCH64_LINUX`; None: this one.
        threads: that it may plan for.
        compiler: links a `.so` for another machine, such as aarch64-linux-gnu-g++.

    Raises:
        UsageError: another ending, a target that TVM does not know, or the inputs are not those of forward.
        NasError: an operator has no Relax form, or the compiler does not link for the target.
    """
    path = Path(path)
    check_ending(path)
    made = make_target(target, threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_library(assemble(fuse(module, inputs, made).module, made), path, compiler)


def verify(path: str | Path, module: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Largest absolute difference between a library made for this machine and the module, on these inputs.

    A `.tar` is linked first, which needs g++.
    """
    import tvm

    device = tvm.cpu()
    entry = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(path)), device)["main"]
    arguments = [tvm.runtime.tensor(x.detach().numpy(), device) for x in in_forward_order(module, inputs).values()]
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            expected = module(**inputs).numpy()
    finally:
        module.train(was_training)
    return float(np.abs(entry(*arguments)[0].numpy() - expected).max())
