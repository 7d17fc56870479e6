"""What students and teachers say about a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nas.batches import Batch, Outputs
from nas.diffusion import Conditioning, Denoiser
from nas.features import Tap, captured


def predict(denoiser: Denoiser, batch: Batch, *, with_null: bool) -> Outputs:
    """A network's outputs on a batch; with `with_null` both texts go through it in one pass of 2 B."""
    x, t = batch.point()
    if not with_null:
        return Outputs(velocity=denoiser.velocity(x, t, batch.text))
    text = Conditioning.cat([batch.text, batch.null_text.like(batch.text)])
    both = denoiser.velocity(torch.cat([x, x]), torch.cat([t, t]), text)
    velocity, null_velocity = both.chunk(2)
    return Outputs(velocity=velocity, null_velocity=null_velocity)


@torch.no_grad()
def answer(teacher: nn.Module, batch: Batch, *, with_null: bool, taps: Sequence[Tap] = ()) -> Outputs:
    """What the teacher says about a batch, no gradient kept; as cached where the batch brings all that is asked."""
    given = batch.teacher
    if given is not None and not taps and (given.null_velocity is not None or not with_null):
        return given
    with captured(teacher, [tap.teacher for tap in taps]) as features:
        asked: Any = teacher
        said = predict(asked, batch, with_null=with_null)
    return Outputs(
        velocity=said.velocity,
        null_velocity=said.null_velocity,
        features={tap.key: features[tap.teacher] for tap in taps},
    )
