"""Examples for the losses: a batch, and what a student and a teacher may say about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nas import registry
from nas.batches import Batch, Outputs
from nas.diffusion import Conditioning
from nas.objectives import Loss, Objective, is_game, objective, total

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
MOVED = "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0"
STAGE = "down_blocks.0.downsamplers.0"
MOVED_STAGE = "up_blocks.1.resnets.1=up_blocks.2.resnets.2"
# A student's layer of each kind, some with a teacher's of another name, and the shapes of their outputs below the rows.
FEATURES = {
    ATTENTION: (16, 6),
    f"{MOVED}={MOVED.replace('up_blocks.1.attentions.1', 'up_blocks.2.attentions.2')}": (16, 6),
    STAGE: (5, 4, 4),
    MOVED_STAGE: (4, 4, 4),
}


def losses() -> tuple[str, ...]:
    """The plug-ins that compare; the others play."""
    return tuple(name for name in registry.plugins("nas.objectives") if not is_game(objective(name)))


def batch(seed: int = 0, *, rows: int = 4, dtype: torch.dtype = torch.float32) -> Batch:
    """Noised images, and pixels of them."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(rows, 3, 4, 4, generator=generator, dtype=dtype) for _ in range(2))
    t = 0.05 + 0.9 * torch.rand(rows, generator=generator, dtype=dtype)
    images = torch.rand(rows, 3, 8, 8, generator=generator, dtype=dtype) * 2 - 1
    tokens = torch.randn(rows, 5, 2, generator=generator, dtype=dtype)
    null = Conditioning(tokens=torch.zeros(1, 5, 2, dtype=dtype))
    return Batch(text=Conditioning(tokens=tokens), null_text=null, clean=clean, noise=noise, t=t, images=images)


def outputs(
    seed: int,
    *,
    rows: int = 4,
    null: bool = True,
    grad: bool = False,
    dtype: torch.dtype = torch.float32,
    velocity: Tensor | None = None,
) -> Outputs:
    """Random answers; equal seeds give equal ones. `velocity` stands for the first."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator, dtype=dtype).requires_grad_(grad)

    answers = drawn(3, 4, 4), drawn(3, 4, 4)
    first = answers[0] if velocity is None else velocity.clone().requires_grad_(grad)
    features = {key: drawn(*shape) for key, shape in FEATURES.items()}
    return Outputs(velocity=first, null_velocity=answers[1] if null else None, features=features)


def perfect(given: Batch, *, grad: bool = False) -> Outputs:
    """Answers that agree with the data; two calls agree with each other."""
    return outputs(0, rows=len(given), grad=grad, velocity=given.velocity)


def tensors(given: Outputs) -> dict[str, Tensor]:
    """All of the answers by name."""
    found = {"velocity": given.velocity, **given.features}
    return found if given.null_velocity is None else found | {"null_velocity": given.null_velocity}


def changed(given: Outputs, change: Callable[[str, Tensor], Tensor]) -> Outputs:
    """The answers with every tensor changed."""
    new = {name: change(name, value) for name, value in tensors(given).items()}
    velocity, null_velocity = new.pop("velocity"), new.pop("null_velocity", None)
    return replace(given, velocity=velocity, null_velocity=null_velocity, features=new)


def of_features(
    student: Sequence[Tensor], teacher: Sequence[Tensor], velocity: Tensor | None = None
) -> tuple[Outputs, Outputs]:
    """Answers that differ in features alone, under the first keys of `FEATURES`."""
    same = torch.zeros(len(student[0]), 1, 1, 1) if velocity is None else velocity
    return tuple(  # type: ignore[return-value]
        Outputs(velocity=same, features=dict(zip(FEATURES, each, strict=False))) for each in (student, teacher)
    )


def value(each: Objective, student: Outputs, teacher: Outputs | None, given: Batch) -> Tensor:
    """The weighted sum of its terms."""
    assert not is_game(each)
    loss: Loss = each
    return total((loss,), student, teacher, given)[0]
