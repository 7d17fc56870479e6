"""Teachers: frozen denoisers that students are distilled from.

`load_teacher("embedded")` is the one shipped here, trained by benchmarks/train_teacher.py; its text transformer is a
fixed part of the pipeline, as text encoders are in real text-to-image, so students are given `encode`'s output.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

from torch import Tensor

from nas.errors import NasError
from nas.paths import package_data
from nas.teachers.embedded import EmbeddedTeacher, TeacherSettings, load_embedded, save_teacher
from nas.teachers.gaussian import GaussianTeacher
from nas.teachers.pretrained import DiffusersTeacher, load_pretrained

__all__ = [
    "DiffusersTeacher",
    "EmbeddedTeacher",
    "GaussianTeacher",
    "Teacher",
    "TeacherSettings",
    "load_teacher",
    "save_teacher",
    "teacher_digest",
    "teacher_file",
]

EMBEDDED = "embedded"


class Teacher(Protocol):
    """What every teacher can be asked; x_t = (1 - t) x0 + t eps with t [B] in [0, 1]."""

    def encode(self, tokens: Tensor) -> Tensor:
        """Text [B, T, D] of a task's token ids [B, T]."""
        ...

    def null_text(self, count: int = 1) -> Tensor:
        """Text [count, T, D] of no caption."""
        ...

    def velocity(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The expected eps - x0 [B, C, H, W]."""
        ...

    def denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The expected x0 [B, C, H, W]."""
        ...


def teacher_file(name: str) -> Path | None:
    """The safetensors file behind `name`: the shipped one, or a path; None for a diffusers folder or hub id."""
    if name == EMBEDDED:
        return package_data("teachers", "shapes2.safetensors")
    return Path(name) if name.endswith(".safetensors") else None


def teacher_digest(name: str) -> str:
    """SHA-256 of the teacher's file, or of its name where there is no single file: what cached targets belong to.

    Raises:
        NasError: the file is missing.
    """
    path = teacher_file(name)
    if path is None:
        return hashlib.sha256(name.encode()).hexdigest()
    if not path.is_file():
        raise NasError(f"the teacher file {path} does not exist", hint="see --teacher; 'embedded' is the shipped one")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_teacher(name: str = EMBEDDED) -> EmbeddedTeacher | DiffusersTeacher:
    """The teacher `name`, float32, frozen, in eval mode, on the CPU.

    Args:
        name: "embedded"; the path of a .safetensors file that `save_teacher` wrote; or a local diffusers folder or
            hub id, looked for among local files first.

    Raises:
        NasError: the file, folder or id cannot be found or reached, or is nothing that can teach.
    """
    path = teacher_file(name)
    return load_pretrained(name) if path is None else load_embedded(path)
