"""A candidate's small copy, as a student of the embedded teacher."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from nas import families, registry, teachers
from nas.bench.settings import ProxySettings
from nas.build import build
from nas.diffusion import FlowDenoiser
from nas.errors import NasError
from nas.network import NetworkSpec, Scale
from nas.space import Candidate
from nas.targets import Lesson

# The mean width of the blocks at which lr_rule = "width" gives the peak rate itself. A round figure near the SnapGen-
# shaped reference's 37.8 at proxy scale; the scores of distill-12-lr-by-width in reports/proxy were made with it.
REFERENCE_WIDTH = 34.0


def teacher_hash(teacher: str) -> str:
    """What a study's identity holds of its teacher.

    Raises:
        NasError: no such teacher.
    """
    return teachers.teacher_digest(teacher)


def embedded_lesson(teacher: str, task: str, device: str = "cpu") -> tuple[teachers.EmbeddedTeacher, Lesson]:
    """A teacher of drawn images, and the pairing with what is drawn.

    Raises:
        NasError: no such teacher, or one that brings no text encoder and preconditioner of its own.
    """
    loaded = _load_teacher(teacher, device)
    if not isinstance(loaded, teachers.EmbeddedTeacher):
        raise NasError(
            f"teacher {teacher!r} cannot teach the task {task}: it has no text encoder for its captions",
            hint="use the teacher 'embedded', or a .safetensors file that benchmarks/train_teacher.py wrote",
        )
    return loaded, Lesson(teacher=loaded, task=registry.load("nas.tasks", task).Task())


@functools.cache
def _load_teacher(teacher: str, device: str) -> Any:
    return teachers.load_teacher(teacher, device=device)


def small_copy(candidate: Candidate, teacher: teachers.EmbeddedTeacher, settings: ProxySettings) -> NetworkSpec:
    """The candidate's structure at proxy scale, for the teacher's images and text.

    Raises:
        NasError: a width does not divide, or the family cannot be scaled.
    """
    space = candidate.space
    head_width, rest = divmod(int(space.fixed["head_width"]), settings.width_divisor)
    if rest or head_width == 0:
        raise NasError(
            f"space {space.name}: head width {space.fixed['head_width']} cannot be divided by the proxy's"
            f" {settings.width_divisor}"
        )
    channels, height, width = teacher.image_shape
    tokens, text_width = teacher.text_shape
    scale = Scale(
        width_divisor=settings.width_divisor,
        head_width=head_width,
        norm_groups=settings.norm_groups,
        latent_channels=channels * settings.patch**2,
        height=height // settings.patch,
        width=width // settings.patch,
        text_tokens=tokens,
        text_width=text_width,
    )
    return families.scaled(candidate, scale)


def student(spec: NetworkSpec, teacher: teachers.EmbeddedTeacher, patch: int, seed: int) -> FlowDenoiser:
    """The network `spec` behind the teacher's preconditioner, initialised from `seed`."""
    return FlowDenoiser(build(spec, seed=seed), teacher.preconditioner, patch=patch)


def learning_rate(spec: NetworkSpec, settings: ProxySettings) -> float:
    """The peak rate of one network by the settings' rule."""
    if settings.lr_rule == "fixed":
        return settings.lr
    widths = [shape[0] for block in spec.blocks for name, shape in block.inputs if name == "x" and len(shape) == 3]
    mean = float(np.mean(widths)) if widths else REFERENCE_WIDTH
    return settings.lr * math.sqrt(REFERENCE_WIDTH / mean)
