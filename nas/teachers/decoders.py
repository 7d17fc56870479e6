"""Image decoders as teachers and students: a denoiser's latents to pictures, with gradients.

Legend: B batch, C latent channels, H W height and width of the latent, f the side of the square of pixels that becomes
one place of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nas.batches import WHOLE, Batch, Part, stream
from nas.diffusion import Conditioning
from nas.paths import package_data
from nas.teachers.vae import Scaling, Vae, load_vae

EMBEDDED = "embedded"
SHAPES_VAE = "shapes_vae"  # folder of the shipped VAE, made by benchmarks/train_tiny_vae.py


class Decoder(nn.Module):
    """A network that decodes, told latents as denoisers give them.

    Args:
        network: takes latents as the VAE's encoder gives them, [B, C, H, W], and makes pictures.
        scaling: between the two.
    """

    def __init__(self, network: nn.Module, scaling: Scaling) -> None:
        super().__init__()
        self.network = network
        self.scaling = scaling

    def forward(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, f H, f W] of latents [B, C, H, W]: in [-1, 1] up to what the network overshoots."""
        pictures: Tensor = self.network(self.scaling.unscaled(latents))
        return pictures


class VaeDecoder(nn.Module):
    """The second half of a diffusers autoencoder.

    Args:
        vae: an AutoencoderKL or AutoencoderTiny.
    """

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor) -> Tensor:
        """Pictures [B, 3, f H, f W] of z [B, C, H, W], in the precision of z."""
        vae: Any = self.vae
        dtype = next(vae.parameters()).dtype
        pictures: Tensor = vae.decode(z.to(dtype), return_dict=False)[0]
        return pictures.to(z.dtype)


def vae_name(name: str) -> str:
    """The folder or hub id behind a name: "embedded" is the shipped VAE of the task shapes."""
    return str(package_data("teachers", SHAPES_VAE)) if name == EMBEDDED else name


def load_decoder(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Decoder, Vae]:
    """The decoder of a VAE as a frozen teacher, and the VAE that it belongs to.

    Args:
        name: "embedded" for the shipped one of the task shapes; or a diffusers pipeline or VAE (AutoencoderKL,
            AutoencoderTiny), as a local folder or a hub id.
        device: where it goes.
        dtype: of its weights.

    Raises:
        NasError: not found or unreachable, or no such autoencoder.
    """
    vae = load_vae(vae_name(name), device=device, dtype=dtype)
    return Decoder(VaeDecoder(vae.network), vae.scaling).eval(), vae


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """`Batches` of pictures and their latents, encoded at every step; they have no captions.

    Attributes:
        vae: that encodes, on the device to train on.
        pictures: of a count and a generator the pictures [B, 3, f H, f W] in [-1, 1].
        size: rows per batch.
        seed: with the step, decides the pictures.
        device: where the batches are wanted.
    """

    vae: Vae
    pictures: Callable[[int, torch.Generator], Tensor]
    size: int
    seed: int = 0
    device: torch.device | None = None

    def batch(self, step: int, part: Part = WHOLE) -> Batch:
        """The rows of that step: latents as `clean`, pictures as `images`."""
        images = self.pictures(self.size, stream(self.seed, step))[part.rows(self.size)].to(self.device)
        latents = self.vae.encode(images)
        nothing = Conditioning(tokens=torch.zeros((len(images), 1, 1), device=images.device))
        return Batch(text=nothing, null_text=nothing.rows(slice(0, 1)), clean=latents, images=images)
