"""Autoencoders of latent diffusion: images to latents as a denoiser wants them, and back.

Legend: B batch, C latent channels, H W height and width of the latent, f the side of the square of pixels that becomes
one place of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from nas.checkpoint.files import VARIANT, find_weights
from nas.checkpoint.hub import find_folder
from nas.errors import NasError
from nas.teachers.files import content_digest, first_line, read_json

CLASSES: Final = ("AutoencoderKL", "AutoencoderTiny")
# What a configuration that says nothing means: diffusers' own defaults.
_SCALES: Final = {"AutoencoderKL": 0.18215, "AutoencoderTiny": 1.0}
_HINT: Final = "give a pipeline or a VAE, as a local folder or a hub id"


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """How what a VAE's encoder gives becomes a denoiser's latent: (z - shift) * factor, or by each channel's own.

    Attributes:
        kind: the VAE's class.
        factor: 0.18215 of Stable Diffusion 1 and 2, 0.13025 of SDXL.
        shift: subtracted before (Stable Diffusion 3).
        mean: of each channel, subtracted instead; empty where the VAE has none.
        sd: of each channel, by which the factor is divided then.
    """

    kind: str
    factor: float
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    sd: tuple[float, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Scaling:
        """That of a VAE's configuration."""
        kind = str(config.get("_class_name"))
        factor = config.get("scaling_factor")
        return cls(
            kind=kind,
            factor=float(_SCALES.get(kind, 1.0) if factor is None else factor),
            # AutoencoderTiny's latent_shift belongs to its pictures of latents in 8 bits, not to the latents.
            shift=float(config.get("shift_factor") or 0.0) if kind == "AutoencoderKL" else 0.0,
            mean=tuple(config.get("latents_mean") or ()),
            sd=tuple(config.get("latents_std") or ()),
        )

    def scaled(self, z: Tensor) -> Tensor:
        """The encoder's z [B, C, H, W] as the denoiser's latent."""
        if self.mean:
            return (z - _each(self.mean, z)) * self.factor / _each(self.sd, z)
        return (z - self.shift) * self.factor

    def unscaled(self, latents: Tensor) -> Tensor:
        """The denoiser's latent [B, C, H, W] as the decoder takes it."""
        if self.mean:
            return latents * _each(self.sd, latents) / self.factor + _each(self.mean, latents)
        return latents / self.factor + self.shift

    def to_json(self) -> dict[str, Any]:
        """As JSON-like data."""
        return {**asdict(self), "mean": list(self.mean), "sd": list(self.sd)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scaling:
        """What `to_json` gave."""
        return cls(**{**data, "mean": tuple(data["mean"]), "sd": tuple(data["sd"])})


def _each(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


class Vae(nn.Module):
    """A frozen autoencoder of diffusers.

    Args:
        network: of one of `CLASSES`.
        name: the folder or hub id that it came from.
        digest: of its configuration and weights.
    """

    def __init__(self, network: nn.Module, name: str, digest: str) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.digest = digest
        config: Any = network.config
        self.scaling = Scaling.of({"_class_name": type(network).__name__, **config})
        self.channels = int(config.latent_channels)
        self.factor = vae_factor(config)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, C, H, W], as denoisers take them, of images [B, 3, f H, f W] in [-1, 1].

        Of a VAE whose encoder gives a distribution its mean is taken: the spread is a small fraction of a latent's, and
        without it the same image always gives the same latent.

        Raises:
            NasError: the images' sides are no multiples of f.
        """
        self._check(images.shape[-2], images.shape[-1])
        network: Any = self.network
        found = network.encode(images.to(next(network.parameters()).dtype))
        z = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        return self.scaling.scaled(z.to(images.dtype))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, f H, f W] in [-1, 1] of latents [B, C, H, W] as denoisers give them."""
        network: Any = self.network
        dtype = next(network.parameters()).dtype
        images: Tensor = network.decode(self.scaling.unscaled(latents).to(dtype), return_dict=False)[0]
        return images.to(latents.dtype).clamp(-1, 1)

    def latent_shape(self, side: int) -> tuple[int, int, int]:
        """(C, H, W) of the latent of a square image of that side."""
        self._check(side, side)
        return (self.channels, side // self.factor, side // self.factor)

    def _check(self, height: int, width: int) -> None:
        if height % self.factor or width % self.factor:
            raise NasError(
                f"images of {height}x{width} px do not fit the VAE {self.name}, whose sides must be multiples of"
                f" {self.factor}"
            )


def vae_factor(config: Mapping[str, Any]) -> int:
    """The side of the square of pixels that becomes one place of the latent, by a VAE's configuration."""
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels") or (1,)
    return int(2 ** (len(widths) - 1))


def load_vae(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, subfolder: str | None = None
) -> Vae:
    """The VAE of a diffusers pipeline, or one alone; frozen, in eval mode; no pickled file is read.

    Args:
        name: a local folder or a hub id; of a pipeline its vae/ is taken.
        device: where it goes.
        dtype: of its weights. SDXL's VAE overflows in float16; its fp16-fix does not.
        subfolder: where it lies in `name`; vae/ or `name` itself if None.

    Raises:
        NasError: nothing there, or no autoencoder of `CLASSES`.
    """
    # Imported here: diffusers takes seconds to import.
    import diffusers

    folder = _find(name, subfolder)
    kind = read_json(folder / "config.json").get("_class_name")
    if kind not in CLASSES:
        raise NasError(f"the VAE {name} is a {kind}; known are {', '.join(CLASSES)}", hint=_HINT)
    weights = find_weights(folder)
    if weights is None:
        raise NasError(f"the VAE {name} has no .safetensors weights in {folder}", hint=_HINT)
    variant = VARIANT if f".{VARIANT}." in weights.name else None
    try:
        network = getattr(diffusers, kind).from_pretrained(
            folder, dtype=dtype, use_safetensors=True, variant=variant, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise NasError(f"the VAE {name} cannot be read: {first_line(error)}", hint=_HINT) from error
    files = [(path.name, path) for path in folder.iterdir() if path.suffix in (".json", ".safetensors")]
    vae = Vae(network.to(device), name, content_digest(files))
    return vae.requires_grad_(False).eval()


def _find(name: str, subfolder: str | None) -> Path:
    """The folder of the VAE: of a pipeline vae/, else `name` itself."""
    failure: NasError | None = None
    for place in ("vae", None) if subfolder is None else (subfolder,):
        try:
            return find_folder(name, place)
        except NasError as error:
            failure = failure or error
    assert failure is not None  # nothing was found
    raise NasError(f"the VAE {name} cannot be read: {failure.message}", hint=_HINT)
