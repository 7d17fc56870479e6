"""The least that a proxy can be run on, and made-up rows."""

from __future__ import annotations

import torch
from torch import Tensor

from nas.bench import ProxySettings
from nas.targets import Rows

SETTINGS = ProxySettings(
    width_divisor=32, norm_groups=2, steps=3, batch=4, held_rows=16, text_weight=0.0, seeds=(0, 1), shared_steps=2
)


def made_rows(count: int) -> Rows:
    generator = torch.Generator().manual_seed(4)

    def images() -> Tensor:
        return torch.randn(count, 3, 8, 8, generator=generator).half().float()

    return Rows(
        x=images(),
        t=torch.rand(count, generator=generator) * 0.9 + 0.05,
        text=torch.randn(count, 2, 4, generator=generator),
        velocity=images(),
        null_velocity=images(),
        null_text=torch.zeros(1, 2, 4),
    )
