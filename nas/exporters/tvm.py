"""TVM modules from torch modules: torch.export, then Relax, then machine code for this CPU."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.errors import NasError, UsageError
from nas.exporters import in_forward_order, missing


def unavailable() -> str | None:
    """Why TVM modules cannot be built here, or None."""
    return missing(["tvm"])


def export(module: nn.Module, inputs: Mapping[str, Tensor], path: str | Path, *, threads: int = 1) -> Path:
    """Compiles `module` for this CPU into a library: `.tar` (object files, no linker needed) or `.so` (needs g++).

    Raises:
        UsageError: another ending, or the inputs are not those of forward.
        NasError: an operator has no Relax form.
    """
    path = Path(path)
    if path.suffix not in (".tar", ".so"):
        raise UsageError(f"a TVM library ends in .tar or .so, got {path.name!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    executable, _ = compile_module(module, inputs, threads=threads)
    executable.export_library(str(path))
    return path


def compile_module(module: nn.Module, inputs: Mapping[str, Tensor], *, threads: int) -> tuple[Any, tuple[str, ...]]:
    """The compiled, untuned executable and the names of its arguments in order.

    Only the dict form of a target is used: TVM 0.27 no longer reads "llvm -mcpu=...".
    """
    import tvm

    lowered, names = lower(module, inputs)
    target = tvm.target.Target(host_target(threads))
    return tvm.compile(lowered, target), names


def host_target(threads: int) -> dict[str, str | int]:
    """TVM's target for this machine: LLVM, the CPU as LLVM names it, and the threads it may plan for."""
    import tvm

    name = str(tvm.target.codegen.llvm_get_system_cpu())
    return {"kind": "llvm", "mcpu": name, "num-cores": threads}


def lower(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, tuple[str, ...]]:
    """`module` as a Relax module with its weights inside, and the names of its arguments in order.

    Raises:
        NasError: an operator has no Relax form.
    """
    from tvm.relax.frontend.torch import from_exported_program

    ordered = in_forward_order(module, inputs)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(module, (), kwargs=ordered)
            names = tuple(str(name) for name in program.graph_signature.user_inputs)
            return from_exported_program(program), names
    except (NotImplementedError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise NasError(f"{type(module).__name__} cannot be lowered to TVM Relax: {reason}") from error
    finally:
        module.train(was_training)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences what torch.export and the importer say about their own internals."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
        yield
