"""The bench: how candidates are tried, the teacher's answers about their examples, and how one is judged.

Two kinds, by the settings' task: small copies on drawn images with the embedded teacher (`Bench`), and the networks as
they are on latents from disk with a published teacher (`FullBench`). Every candidate sees the same teacher, rows,
order, noise and preconditioning; only the network differs, and between the seeds of one candidate only its
initialisation. As in `nas train`, students on drawn images are given the caption's tokens and the layout that the
teacher's text part makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nas.bench.drawn import Bench
from nas.bench.held import Fidelity, Held, fidelity_of, nothing
from nas.bench.run import Curve, Point, Stop, Stopped, decibels, distilled, is_out_of_memory
from nas.bench.settings import ProxySettings
from nas.bench.small import embedded_lesson, learning_rate, small_copy, student, teacher_hash
from nas.bench.stored import FullBench
from nas.errors import NasError, UsageError

__all__ = [
    "LATENTS",
    "Bench",
    "Curve",
    "Fidelity",
    "FullBench",
    "Held",
    "Point",
    "ProxySettings",
    "Stop",
    "Stopped",
    "bench_of",
    "check_device",
    "decibels",
    "distilled",
    "embedded_lesson",
    "fidelity_of",
    "is_out_of_memory",
    "learning_rate",
    "nothing",
    "one_thread",
    "small_copy",
    "student",
    "teacher_hash",
]

LATENTS = "latents"  # the task that draws nothing, but reads a folder


def bench_of(teacher: str, settings: ProxySettings, device: str = "cpu") -> Bench:
    """The bench that the settings' task needs.

    Args:
        teacher: as for `nas.teachers.load_teacher`.
        settings: of the proxy; with task "latents", `data` names the folder.
        device: see `Bench`.

    Raises:
        UsageError: the device has no such name.
        NasError: it is not there.
    """
    kind = FullBench if settings.task == LATENTS else Bench
    return kind(teacher, settings, check_device(device))


def check_device(name: str) -> str:
    """The name of a device to train on, as it was given.

    Raises:
        UsageError: torch knows no such device.
        NasError: it is not there.
    """
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"torch knows no device {name!r}", hint="name cpu, cuda or cuda:N") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise NasError(
            f"torch sees {torch.cuda.device_count()} CUDA devices here, and {name} is none of them",
            hint="cpu is what is used unasked",
        )
    return name


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread per process: networks this small run no faster on two, and the pool has a process per core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
