"""An image decoder beside the decoder that it learnt from: the same latents, the same pictures.

Legend: N pictures, B batch.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nas.judge.comparing import psnr_db
from nas.teachers.vae import Vae

_TIMED = 3  # timed batches after one that warms up; their median counts


@dataclass(frozen=True, kw_only=True)
class DecoderScores:
    """How well a decoder paints.

    Attributes:
        teacher_db: PSNR of its pictures to the teacher's, in dB.
        real_db: to the real pictures that were encoded.
        teachers_real_db: the teacher's own to those: what no student of it is expected to beat by much.
        images_per_second: warm, `batch` at once.
        teachers_images_per_second: likewise.
        batch: of both timings.
        params: of the student's network.
        teachers_params: of the teacher's decoder.
        pictures: the first few real pictures, the teacher's and the student's, one below the other [3 n, 3, h, w].
    """

    teacher_db: float
    real_db: float
    teachers_real_db: float
    images_per_second: float
    teachers_images_per_second: float
    batch: int
    params: int
    teachers_params: int
    pictures: Tensor


@torch.no_grad()
def decoder_scores(
    student: nn.Module, teacher: nn.Module, vae: Vae, pictures: Tensor, batch: int = 16
) -> DecoderScores:
    """Encodes pictures and lets both paint them again.

    Args:
        student: called as student(latents), in eval mode, on the teacher's device.
        teacher: likewise.
        vae: that encodes.
        pictures: real ones [N, 3, h, w] in [-1, 1].
        batch: at once, also when timed.
    """
    device = next(vae.parameters()).device
    latents = torch.cat([vae.encode(part.to(device)) for part in pictures.split(batch)])
    painted, wanted = (
        torch.cat([network(part).float().cpu() for part in latents.split(batch)]) for network in (student, teacher)
    )
    shown = [each[:8].cpu() for each in (pictures, wanted, painted)]
    return DecoderScores(
        teacher_db=psnr_db(painted, wanted),
        real_db=psnr_db(painted, pictures.cpu()),
        teachers_real_db=psnr_db(wanted, pictures.cpu()),
        images_per_second=_speed(student, latents[:batch]),
        teachers_images_per_second=_speed(teacher, latents[:batch]),
        batch=len(latents[:batch]),
        params=_params(student),
        teachers_params=_params(_decoding(vae.network)),
        pictures=torch.cat(shown),
    )


def _speed(network: nn.Module, latents: Tensor) -> float:
    seconds = []
    for _ in range(_TIMED + 1):
        _wait(latents.device)
        began = time.perf_counter()
        network(latents)
        _wait(latents.device)
        seconds.append(time.perf_counter() - began)
    return len(latents) / statistics.median(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _decoding(autoencoder: Any) -> nn.Module:
    """The half of an autoencoder that paints."""
    found: nn.Module = autoencoder.decoder
    return found


def _params(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
