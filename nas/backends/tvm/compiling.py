"""From a module to an executable, with the tuning records that the target asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nas.backends.tvm.options import UNTUNED, Options
from nas.device import Target
from nas.errors import NasError, UsageError
from nas.exporters.tvm import records
from nas.exporters.tvm.lowering import Fused, assemble, fuse, schedule
from nas.exporters.tvm.machine import host, identity, make_target
from nas.exporters.tvm.tuning import Effort, Tracker, tune


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """An executable, the names of its arguments in order, and how it was scheduled in words."""

    executable: Any
    names: tuple[str, ...]
    machine: Any
    tuning: str


def compile_module(
    module: nn.Module, inputs: Mapping[str, Tensor], target: Target, options: Options | None, *, held: bool = False
) -> Compiled:
    """Compiles `module` for `target`.

    Args:
        module: what to compile.
        inputs: of the shapes that it will be called with.
        target: whose threads may be planned for.
        options: of its sheet; None (no sheet): untuned, and said to be.
        held: this process holds the device, so that nothing can be tuned there.

    Raises:
        UsageError: the target's runtime and [options] untuned do not agree.
        NasError: kernels have no tuning record and are not to be tuned, or TVM ignored the records.
    """
    _check_runtime(target, options)
    given = options or Options(untuned=True)
    table, machine = _machine(target, given)
    fused = fuse(module, inputs, machine)
    scheduled, words = fused.module, "untuned"
    if not given.untuned:
        database = _database(fused, target, given, table, held)
        scheduled, count = schedule(fused, machine, database)
        if count < len(fused.tasks):
            raise NasError(f"TVM scheduled {count} kernels where {len(fused.tasks)} have tuning records")
        words = f"tuned ({len(fused.tasks)} of {len(fused.tasks)} kernels have records)"
    return Compiled(executable=assemble(scheduled, machine), names=fused.names, machine=machine, tuning=words)


def tune_missing(module: nn.Module, inputs: Mapping[str, Tensor], target: Target, options: Options) -> None:
    """Tunes the kernels of `module` that have no record, without compiling it."""
    _check_runtime(target, options)
    table, machine = _machine(target, options)
    _database(fuse(module, inputs, machine), target, options, table, held=False)


def _machine(target: Target, options: Options) -> tuple[dict[str, Any], Any]:
    """TVM's table of the machine, and the target made of it."""
    table = {"num-cores": target.threads, **(host(target.threads) if options.target is None else options.target)}
    return table, make_target(table, target.threads)


def _check_runtime(target: Target, options: Options | None) -> None:
    if options is not None and options.untuned != (target.runtime == UNTUNED):
        asked = "true" if options.untuned else "not set"
        raise UsageError(
            f"target {target.slug} has runtime {target.runtime!r} while [options] untuned is {asked}: an untuned target"
            f" is another target, with runtime {UNTUNED!r} and untuned = true"
        )


def _database(fused: Fused, target: Target, options: Options, table: Mapping[str, Any], held: bool) -> Any:
    """The records of the kernels of one network; those that lack one are tuned if the sheet says so."""
    path, machine = options.records_path(target.slug), identity(make_target(table, target.threads))
    found, lacking = records.database(fused.tasks, records.read(path, machine))
    tried = ""
    if lacking and options.tune and not held:
        effort = Effort(trials=options.trials)
        tune(lacking, path, target=table, machine=machine, effort=effort, tracker=_tracker(options, target))
        found, lacking = records.database(fused.tasks, records.read(path, machine))
        tried = f" after {options.trials} trials each"
    if lacking:
        raise NasError(
            f"{len(lacking)} of {len(fused.tasks)} kernels have no tuning record in {path.name}{tried}"
            f" ({', '.join(sorted(lacking)[:3])}{', ...' if len(lacking) > 3 else ''}): untuned they run 20-50 times"
            " slower",
            hint=_next_step(target, options, held),
        )
    return found


def _next_step(target: Target, options: Options, held: bool) -> str:
    if not options.tune:
        return f"set tune = true under [options] of {target.slug}.toml and run the same command again"
    if held:
        return "tune before anything is loaded on the device (nas.backends.tvm.prepare): it serves one client at a time"
    return f"set trials under [options] of {target.slug}.toml to more than {options.trials}"


def _tracker(options: Options, target: Target) -> Tracker | None:
    rpc = options.rpc
    if rpc is None:
        return None
    if rpc.key is None:
        raise UsageError(
            f"kernels of target {target.slug} are tuned through a tracker: rpc = {{host=, port=, key=}}, where key is"
            " what the device is registered under"
        )
    return Tracker(host=rpc.host, port=rpc.port, key=rpc.key)
