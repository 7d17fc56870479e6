"""From a torch module to TVM machine code: torch.export, Relax, fused kernels, tuned schedules, LLVM."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nas.errors import NasError
from nas.exporters import in_forward_order

# The kernels that a schedule makes 20-50 times faster; the others are bound by memory.
_TUNABLE = ("conv", "matmul", "dense")


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A network as fused kernels, not yet scheduled.

    Attributes:
        module: TVM's IRModule after FuseTIR.
        names: the arguments of the network in order.
        tasks: task name -> the kernel as an IRModule of its own, for the kernels worth tuning (convolutions and matrix
            products), each structure once.
    """

    module: Any
    names: tuple[str, ...]
    tasks: Mapping[str, Any]


def fuse(module: nn.Module, inputs: Mapping[str, Tensor], target: Any) -> Fused:
    """Lowers `module` for `target` up to the kernels that are then scheduled.

    Tuning records are found by the structure of these kernels. Fusing a module that was fused before gives others, for
    which there are none, so that nothing else in this package fuses.

    Raises:
        NasError: an operator has no Relax form.
    """
    import tvm
    from tvm import relax
    from tvm.s_tir.meta_schedule.relax_integration import extract_tasks

    lowered, names = lower(module, inputs)
    passes = [*relax.pipeline.library_dispatch_passes(target), *relax.pipeline.legalize_passes(target)]
    with target, tvm.transform.PassContext(opt_level=3):
        fused = tvm.transform.Sequential(passes)(lowered)
        tasks = extract_tasks(fused, target)
    found = {t.task_name: t.dispatched[0] for t in tasks if any(word in t.task_name for word in _TUNABLE)}
    return Fused(module=fused, names=names, tasks=found)


def schedule(fused: Fused, target: Any, database: Any) -> tuple[Any, int]:
    """The fused kernels with the best schedules of `database`, and how many kernels it had one for."""
    import tvm
    from tvm import relax

    with target, database, tvm.transform.PassContext(opt_level=3):
        applied = relax.transform.MetaScheduleApplyDatabase()(fused.module)
    count = sum(
        bool(function.attrs and function.attrs.get("tirx.is_scheduled", False))
        for function in applied.functions.values()
    )
    return applied, count


def assemble(module: Any, target: Any) -> Any:
    """The executable of fused (and perhaps scheduled) kernels."""
    import tvm
    from tvm import relax

    steps = relax.transform
    passes = [
        steps.RewriteDataflowReshape(),
        steps.ToNonDataflow(),
        steps.RemovePurityChecking(),
        steps.CallTIRRewrite(),
        steps.StaticPlanBlockMemory(),
        steps.LowerAllocTensor(),
        steps.KillAfterLastUse(),
        steps.LowerRuntimeBuiltin(),
        steps.ComputePrimValue(),
        steps.VMShapeLower(),
        steps.AttachGlobalSymbol(),
    ]
    with target, tvm.transform.PassContext(opt_level=3):
        return relax.build(module, target=target, relax_pipeline=tvm.transform.Sequential(passes))


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
