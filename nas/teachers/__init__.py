"""Teachers: frozen denoisers that students are distilled from.

`load_teacher("embedded")` is the one shipped here, trained by benchmarks/train_teacher.py; its text transformer is a
fixed part of the pipeline, as text encoders are in real text-to-image, so students are given `encode`'s output.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nas.diffusion import Conditioning, Schedule
from nas.errors import NasError
from nas.paths import package_data
from nas.teachers.embedded import EmbeddedTeacher, TeacherSettings, load_embedded, save_teacher
from nas.teachers.files import cached_sha
from nas.teachers.gaussian import GaussianTeacher
from nas.teachers.pipeline import Crop, Pipeline, load_pipeline
from nas.teachers.pretrained import DiffusersTeacher, load_pretrained, pretrained_digest
from nas.teachers.vae import Scaling, Vae, load_vae

__all__ = [
    "Crop",
    "DiffusersTeacher",
    "EmbeddedTeacher",
    "GaussianTeacher",
    "Pipeline",
    "Scaling",
    "Teacher",
    "TeacherSettings",
    "Vae",
    "load_pipeline",
    "load_teacher",
    "load_vae",
    "save_teacher",
    "teacher_digest",
    "teacher_file",
]

EMBEDDED = "embedded"


class Teacher(Protocol):
    """What every teacher can be asked; x_t = (1 - t) x0 + t eps with t [B] in [0, 1]."""

    @property
    def schedule(self) -> Schedule:
        """The noise levels it knows."""
        ...

    def encode(self, tokens: Tensor) -> Conditioning:
        """The conditions of a task's token ids [B, T]."""
        ...

    def null_text(self, count: int = 1) -> Conditioning:
        """The conditions of `count` images without a caption."""
        ...

    def velocity(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The expected eps - x0 [B, C, H, W]."""
        ...

    def denoise(self, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The expected x0 [B, C, H, W]."""
        ...


def teacher_file(name: str) -> Path | None:
    """The safetensors file behind `name`: the shipped one, or a path; None for a diffusers folder or hub id."""
    if name == EMBEDDED:
        return package_data("teachers", "shapes2.safetensors")
    return Path(name) if name.endswith(".safetensors") else None


def teacher_digest(name: str) -> str:
    """SHA-256 of whatever decides the teacher's answers: what cached targets belong to.

    Of a .safetensors teacher it is the file's; of a diffusers folder it covers the denoiser's configuration, its
    weights and the schedule, by content, so that a copy elsewhere is the same teacher and changed weights another.

    Raises:
        NasError: the file or folder is missing, or the hub cannot be reached.
    """
    path = teacher_file(name)
    if path is None:
        return pretrained_digest(name)
    if not path.is_file():
        raise NasError(f"the teacher file {path} does not exist", hint="see --teacher; 'embedded' is the shipped one")
    return cached_sha(path)


def load_teacher(
    name: str = EMBEDDED, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> EmbeddedTeacher | DiffusersTeacher:
    """The teacher `name`, frozen, in eval mode.

    Args:
        name: "embedded"; the path of a .safetensors file that `save_teacher` wrote; or a local diffusers folder or
            hub id, looked for among local folders first.
        device: where it goes.
        dtype: of a diffusers teacher's weights; one of this project is always float32.

    Raises:
        NasError: the file, folder or id cannot be found or reached, or is nothing that can teach.
    """
    path = teacher_file(name)
    if path is None:
        return load_pretrained(name, device=device, dtype=dtype)
    if dtype != torch.float32:
        raise NasError(
            f"the teacher {name} is asked in float32, not {str(dtype).removeprefix('torch.')}: it is small",
            hint="leave the precision out, or give a diffusers teacher",
        )
    return load_embedded(path).to(device)
