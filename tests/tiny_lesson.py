"""A tiny untrained teacher and the smallest networks of the shipped space, for tests of proxies and training."""

from __future__ import annotations

from pathlib import Path

import torch

from nas.space import Candidate, load_space
from nas.tasks.shapes import Task
from nas.teachers import EmbeddedTeacher, TeacherSettings, save_teacher

SMALLEST = {
    "width_0": 128,
    "width_1": 256,
    "width_2": 512,
    "resnets_0": 1,
    "resnets_1": 1,
    "resnets_2": 1,
    "conv_0": "full",
    "conv_1": "full",
    "conv_2": "full",
    "depth_0": 0,
    "up_depth_0": 0,
    "depth_1": 0,
    "depth_2": 1,
    "self_attention_2": False,
    "attention": "mqa",
    "qk_norm": "none",
    "positions": "none",
    "ffn_ratio": 2,
}


def candidate(**changes: bool | int | str) -> Candidate:
    """The smallest candidate of snapgen_unet, with changes."""
    return load_space("snapgen_unet").candidate(**{**SMALLEST, **changes})


def write_teacher(folder: Path, seed: int = 0) -> str:
    """The path of an untrained teacher's file whose answers depend on the caption."""
    task = Task()
    settings = TeacherSettings(
        vocabulary=task.vocabulary_size,
        null_tokens=tuple(task.tokens([None])[0].tolist()),
        text_width=8,
        text_layers=1,
        text_heads=2,
        widths=(8, 16),
        head_width=8,
        norm_groups=4,
        mean=task.background,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = EmbeddedTeacher(settings)
        with torch.no_grad():
            for name, parameter in teacher.denoiser.named_parameters():
                # As initialised, cross-attention hardly moves the output; a teacher of text must.
                if ".attn2." in name:
                    parameter.mul_(6)
    return str(save_teacher(folder / f"teacher-{seed}.safetensors", teacher))
