"""PyTorch compiled by torch.compile (Inductor), whole and for fixed shapes, on the CPU or on a GPU.

Compiling takes 10 to 60 s for each new module; what was compiled is kept in the folder "inductor" of the cache, unless
TORCHINDUCTOR_CACHE_DIR names another.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nas.backends import Loaded, _torch
from nas.device import Target
from nas.errors import NasError, UsageError
from nas.paths import cache_dir

NAME = "torch-compile"
_MODES = {
    "cpu": ("default",),
    "cuda": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}
_GRAPHS = ("reduce-overhead", "max-autotune")  # of CUDA: the launches of one call recorded and played back


def unavailable() -> str | None:
    """Why torch.compile cannot be used here, or None."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and {compiler} is not installed"
    return None


def load(
    module: nn.Module, inputs: Mapping[str, Tensor], target: Target, options: Mapping[str, Any] | None = None
) -> Loaded:
    """Compiles `module` for the target and runs it once.

    Args:
        module: on a GPU a copy of it runs, in the target's precision.
        inputs: by the names of forward; those in floating point are cast like the module.
        target: what is asked for.
        options: `nas.backends._torch.Settings`, and "mode" of torch.compile.

    Raises:
        UsageError: the target or the options ask for what torch cannot give here.
        NasError: there is no compiler, the module cannot be compiled as one graph, or it was not compiled.
    """
    chosen = _torch.settings(options, NAME, {"mode"})
    mode = _mode(options, chosen)
    placed = _torch.place(module, inputs, target, chosen, NAME)
    if reason := unavailable():
        raise NasError(reason)
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_dir("inductor"))
    call, found = _compile(placed, mode, target)
    described = {"runtime": NAME, **placed.description, "mode": mode, **found}
    return _torch.loaded(lambda: call(**placed.inputs), placed, described)


def _mode(options: Mapping[str, Any] | None, chosen: _torch.Settings) -> str:
    mode = (options or {}).get("mode", "default")
    known = _MODES["cuda" if chosen.gpu else "cpu"]
    if mode not in known:
        place = "a GPU" if chosen.gpu else "the CPU"
        raise UsageError(f"option 'mode' of backend {NAME} must be one of {', '.join(known)} on {place}, got {mode!r}")
    return str(mode)


def _compile(placed: _torch.Placed, mode: str, target: Target) -> tuple[Callable[..., Tensor], dict[str, str | int]]:
    """The compiled call, after its first run, and what torch counted meanwhile."""
    _import_inductor()
    before = _counted()
    call = torch.compile(own_code(placed.module), backend="inductor", fullgraph=True, dynamic=False, mode=mode)
    try:
        with torch.inference_mode():
            for _ in range(3 if mode in _GRAPHS else 2):  # CUDA graphs are recorded in the second call
                call(**placed.inputs)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next(line for line in str(error).splitlines() if line.strip())
        raise NasError(
            f"target {target.slug}: torch.compile refuses {type(placed.module).__name__}: {reason}"
        ) from error
    counted = {name: count - before[name] for name, count in _counted().items()}
    check(counted, target)
    return call, {"graphs": counted["graphs"], "graph_breaks": counted["graph_breaks"], **_built_with(placed, mode)}


def own_code(module: nn.Module) -> Callable[..., Tensor]:
    """A call of `module` with a code object of its own.

    Torch keeps what it compiled by code object, and gives up after eight: two networks of one class share `forward`.
    """

    def call(**inputs: Tensor) -> Tensor:
        output: Tensor = module(**inputs)
        return output

    return types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


def check(counted: Mapping[str, int], target: Target) -> None:
    """Torch runs what it cannot compile eagerly without a word, if told so by its environment: what it counted decides.

    Raises:
        NasError: not exactly one graph was compiled, or CUDA graphs were given up.
    """
    if counted["graphs"] != 1 or counted["graph_breaks"] or counted["skipped_cuda_graphs"]:
        raise NasError(
            f"target {target.slug}: torch.compile made {counted['graphs']} graphs with {counted['graph_breaks']} graph"
            f" breaks and skipped {counted['skipped_cuda_graphs']} CUDA graphs; it must be one graph without fallback",
            hint="unset TORCH_COMPILE_DISABLE and TORCHDYNAMO_SUPPRESS_ERRORS if they are set",
        )


def _counted() -> dict[str, int]:
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "skipped_cuda_graphs": counters["inductor"]["cudagraph_skips"],
    }


def _built_with(placed: _torch.Placed, mode: str) -> dict[str, str]:
    if placed.device.type == "cuda":
        return {"cuda_graphs": "yes" if mode in _GRAPHS else "no"}
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    return {"simd": str(pick_vec_isa())}


def _import_inductor() -> None:
    with warnings.catch_warnings():
        # Raised by torch about itself when Inductor is first imported.
        warnings.filterwarnings("ignore", message="`torch.jit.script_method` is", category=DeprecationWarning)
        importlib.import_module("torch._inductor.compile_fx")
