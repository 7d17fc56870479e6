"""Which GPU a target means, and what its driver says about it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from nas.device import Target
from nas.errors import NasError, UsageError

_SMI = "nvidia-smi"
# Its name for a figure -> ours.
_FIGURES = {
    "driver_version": "driver",
    "clocks.max.sm": "max_sm_clock",
    "clocks.sm": "sm_clock_at_load",
    "power.limit": "power_limit",
    "mig.mode.current": "mig",
}


def refuse_cpu(target: Target, gpu: str) -> None:
    """Refuses a sheet that names a GPU for the device "cpu".

    Raises:
        UsageError: it does.
    """
    if target.device == "cpu":
        raise UsageError(f"target {target.slug}: device is 'cpu', but its [options] name the GPU {gpu!r}")


def place(gpu: str, found: Sequence[str], target: Target, told_by: str) -> int:
    """The index of the GPU named `gpu` among those `found`.

    Raises:
        NasError: it is not among them: rows of another GPU would stand under the target's name.
    """
    if gpu not in found:
        here = ", ".join(found) if found else "none"
        raise NasError(f"target {target.slug} is for the GPU {gpu!r}; {told_by} finds here: {here}")
    return list(found).index(gpu)


def names() -> tuple[str, ...]:
    """The GPUs of this machine by nvidia-smi, in its order; none where it is not installed or finds no driver."""
    return tuple(line for line in _ask(["name"]))


def figures(gpu: str) -> dict[str, str]:
    """Driver, clocks, power limit and partition mode of the first GPU of that name, as far as nvidia-smi tells them."""
    for line in _ask(["name", *_FIGURES]):
        name, *values = (part.strip() for part in line.split(","))
        if name == gpu:
            return {ours: v for ours, v in zip(_FIGURES.values(), values, strict=False) if v and not v.startswith("[")}
    return {}


def _ask(fields: Sequence[str]) -> list[str]:
    if shutil.which(_SMI) is None:
        return []
    done = subprocess.run(
        [_SMI, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
