"""The machines that TVM compiles for: this one, or one named by a table such as {kind = "llvm", mtriple = "..."}."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nas.errors import NasError, UsageError

ENDINGS = (".tar", ".so")
# What a person types for the machines most asked for.
AARCH64_LINUX = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon"]}


def host(threads: int) -> dict[str, Any]:
    """This machine: LLVM, the CPU as LLVM names it, and the threads it may plan for."""
    import tvm

    return {"kind": "llvm", "mcpu": str(tvm.target.codegen.llvm_get_system_cpu()), "num-cores": threads}


def make_target(table: Mapping[str, Any] | None, threads: int) -> Any:
    """TVM's target of a table, or of this machine where there is none.

    Only the dict form is used: TVM 0.27 no longer reads "llvm -mcpu=...".

    Raises:
        UsageError: not a CPU, or TVM does not know a key or value of the table.
    """
    import tvm

    given = host(threads) if table is None else {"num-cores": threads, **table}
    if given.get("kind") != "llvm":
        raise UsageError(f"TVM targets are of kind 'llvm' (CPUs) here, got {given.get('kind')!r}")
    try:
        return tvm.target.Target(given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(f"TVM does not take the target {given}: {_first_line(error)}") from error


def words(target: Any) -> str:
    """A target in a few words: kind and CPU, or kind and triple."""
    attributes = dict(target.attrs)
    return f"{target.kind.name} {attributes.get('mcpu') or attributes.get('mtriple') or 'generic'}"


def identity(target: Any) -> dict[str, Any]:
    """What tuning records hold for: kind, triple, CPU, its features and the threads."""
    attributes = dict(target.attrs)
    kept = {name: attributes[name] for name in ("mtriple", "mcpu", "mattr", "num-cores") if attributes.get(name)}
    return {"kind": target.kind.name, **{name: _plain(value) for name, value in kept.items()}}


def write_library(executable: Any, path: Path, compiler: str | None = None) -> Path:
    """Writes a compiled module: `.tar` holds object files and needs no linker, `.so` is linked here.

    Args:
        executable: as TVM compiled it.
        path: its ending decides.
        compiler: the C++ compiler that links for the target, such as aarch64-linux-gnu-g++; None: this machine's.

    Raises:
        UsageError: another ending.
        NasError: the compiler is missing or links for another machine.
    """
    from tvm.support import cc

    check_ending(path)
    link: dict[str, Callable[..., Any]] = {}
    if path.suffix == ".so" and compiler is not None:
        link = {"fcompile": cc.cross_compiler(compiler)}
    try:
        executable.export_library(str(path), **link)
    except (RuntimeError, OSError, ValueError) as error:
        name = compiler or os.environ.get("CXX") or "g++"
        raise NasError(
            f"{path.name} cannot be linked with {name}: {_last_line(error)}",
            hint="write a .tar, which the device links, or name a compiler for its machine",
        ) from error
    return path


def check_ending(path: Path) -> None:
    """Raises a UsageError for a file that is neither a .tar nor a .so."""
    if path.suffix not in ENDINGS:
        raise UsageError(f"a TVM library ends in {' or '.join(ENDINGS)}, got {path.name!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, (str, int)):
        return value
    return [str(item) for item in value]


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _last_line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
