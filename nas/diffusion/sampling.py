"""Images from denoisers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nas.diffusion.conditioning import Conditioning
from nas.diffusion.denoisers import Denoiser
from nas.diffusion.schedules import TIMESTEPS, noised
from nas.errors import NasError


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance u + k (c - u); k = 1 is the conditional prediction (Ho and Salimans 2022: k = w + 1)."""
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    text: Conditioning,
    null_text: Conditioning,
    *,
    shape: tuple[int, ...],
    generator: torch.Generator,
    steps: int = 20,
    guidance: float = 2.0,
) -> Tensor:
    """Images [B, C, H, W] by `steps` uniform Euler steps from t = 1 to 0 with diffusers' flow-matching scheduler.

    Args:
        denoiser: predicts x0; the velocity is (x - x0) / t whatever the network behind it predicts.
        text: the conditions of B images.
        null_text: of no caption, one row or B; not used when guidance is 1.
        shape: (C, H, W) of one image.
        generator: CPU generator of the starting noise, so that the noise does not depend on the device.
        steps: calls of the denoiser (with guidance both texts go through it as one batch of 2 B).
        guidance: k of `guided`.
    """
    # Imported here: diffusers takes longer to import than a proxy worker needs it (it never samples).
    from diffusers import FlowMatchEulerDiscreteScheduler

    if steps < 1:
        raise NasError(f"sampling needs at least 1 step, got {steps}")
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist(), device=text.device)
    batch = len(text)
    x = torch.randn((batch, *shape), generator=generator).to(device=text.device)
    both = guidance != 1.0
    texts = Conditioning.cat([text, null_text.like(text)]) if both else text
    for timestep in scheduler.timesteps:
        t = (timestep / TIMESTEPS).to(x.dtype)
        repeated = torch.cat([x, x]) if both else x
        clean = denoiser.denoise(repeated, t.expand(len(repeated)), texts)
        if both:
            clean = guided(clean[:batch], clean[batch:], guidance)
        x = scheduler.step((x - clean) / t, timestep, x).prev_sample
    return x


@torch.no_grad()
def sample_few(
    denoiser: Denoiser,
    text: Conditioning,
    *,
    times: Sequence[float],
    shape: tuple[int, ...],
    generator: torch.Generator,
    unit_start: bool = True,
) -> Tensor:
    """Images [B, C, H, W] of a few-step model: predict the clean image, noise it again for the next time, and so on.

    Latent consistency models sample so (Luo et al. 2023, algorithm 3), and DMD2 and SiD-LSG with several steps do; with
    one time it is one call. No guidance: such models have learnt it.

    Args:
        denoiser: predicts x0.
        text: the conditions of B images.
        times: falling, each in (0, 1].
        shape: (C, H, W) of one image.
        generator: CPU generator of all noise.
        unit_start: start from noise that has variance one on a variance-preserving schedule, as DMD2 and consistency
            models do; False starts from a clean zero image noised to times[0], as SiD-LSG does. At t = 1 both are the
            same.
    """
    if not times or any(not 0 < t <= 1 for t in times) or list(times) != sorted(set(times), reverse=True):
        raise NasError(f"sampling needs falling times in (0, 1], got {list(times)}")
    count = len(text)

    def noise() -> Tensor:
        return torch.randn((count, *shape), generator=generator).to(text.device)

    x = start_noise(noise(), times[0], unit_start)
    clean = x
    for number, t in enumerate(times):
        clean = denoiser.denoise(x, torch.full((count,), t, device=x.device), text)
        if number + 1 < len(times):
            x = noised(clean, noise(), torch.full((count,), times[number + 1], device=x.device))
    return clean


def start_noise(noise: Tensor, t: float, unit: bool) -> Tensor:
    """Where a few-step model starts at time t, in rectified flow's scale, from noise of variance one."""
    return noise * ((t**2 + (1 - t) ** 2) ** 0.5 if unit else t)
