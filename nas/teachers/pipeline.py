"""The fixed parts of a published pipeline: prompts to conditions, images to latents, and back.

diffusers' own pipeline encodes the prompts, with its denoiser left out, so that the conditions are those its users
train and sample with. Legend: B batch, T text tokens, D text width, P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

from nas.checkpoint.hub import find_folder
from nas.diffusion import Conditioning
from nas.errors import NasError
from nas.teachers.files import content_digest, first_line, read_json
from nas.teachers.vae import Vae, load_vae, vae_factor

INDEX: Final = "model_index.json"
_HINT: Final = "give a pipeline of diffusers, as a local folder or a hub id"


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """Where a training image was cut from, in px.

    Attributes:
        original: height and width before anything was done.
        corner: top and left of the cut, after resizing.
        size: its height and width.
    """

    original: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def whole(cls, side: int) -> Crop:
        """A square image that nothing was cut from."""
        return cls(original=(side, side), corner=(0, 0), size=(side, side))


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """How one class of pipelines is told prompts.

    Attributes:
        encode: the pipeline and B prompts to their conditions; to those of no prompt, B times, where told so.
        denoiser: folder of its denoiser.
        sizes: image and crop to the numbers that its denoiser is told, for one image; None where it is told none.
        optional: parts that it works without.
    """

    encode: Callable[[Any, list[str], bool], Conditioning]
    denoiser: str
    sizes: Callable[[Crop], tuple[float, ...]] | None = None
    optional: tuple[str, ...] = ()


def _stable_diffusion(pipe: Any, prompts: list[str], null: bool) -> Conditioning:
    found = pipe.encode_prompt(prompts, pipe.text_encoder.device, 1, null)
    return Conditioning(tokens=found[null])


def _sdxl(pipe: Any, prompts: list[str], null: bool) -> Conditioning:
    found = pipe.encode_prompt(prompts, device=pipe.text_encoder_2.device, do_classifier_free_guidance=null)
    return Conditioning(tokens=found[null], pooled=found[2 + null])


def _sd3(pipe: Any, prompts: list[str], null: bool) -> Conditioning:
    device = pipe.text_encoder.device
    found = pipe.encode_prompt(prompts, None, None, device=device, do_classifier_free_guidance=null)
    return Conditioning(tokens=found[null], pooled=found[2 + null])


def _pixart(pipe: Any, prompts: list[str], null: bool) -> Conditioning:
    """Padding becomes rows of zeros, which is how the denoiser's adapter knows it."""
    found = pipe.encode_prompt(prompts, do_classifier_free_guidance=null, device=pipe.text_encoder.device)
    tokens, mask = found[2 * null : 2 * null + 2]
    return Conditioning(tokens=tokens * mask[..., None])


def _sdxl_sizes(crop: Crop) -> tuple[float, ...]:
    return (*crop.original, *crop.corner, *crop.size)


def _pixart_sizes(crop: Crop) -> tuple[float, ...]:
    height, width = crop.size
    return (height, width, height / width)


KINDS: Final[Mapping[str, Kind]] = {
    "StableDiffusionPipeline": Kind(encode=_stable_diffusion, denoiser="unet"),
    "StableDiffusionXLPipeline": Kind(encode=_sdxl, denoiser="unet", sizes=_sdxl_sizes),
    "StableDiffusion3Pipeline": Kind(encode=_sd3, denoiser="transformer", optional=("text_encoder_3", "tokenizer_3")),
    "PixArtAlphaPipeline": Kind(encode=_pixart, denoiser="transformer", sizes=_pixart_sizes),
    "PixArtSigmaPipeline": Kind(encode=_pixart, denoiser="transformer", sizes=_pixart_sizes),
}
# What a text side has no need of; None where the pipeline has such a part.
_LEFT_OUT: Final = ("unet", "transformer", "vae", "scheduler", "safety_checker", "feature_extractor", "image_encoder")


class Pipeline:
    """A pipeline without its denoiser.

    Attributes:
        name: the folder or hub id.
        vae: its autoencoder.
        text_digest: of everything that decides the conditions of a prompt.
        text_encoders: their classes, in the pipeline's order.
    """

    def __init__(
        self,
        pipe: Any,
        kind: Kind,
        vae: Vae | None,
        *,
        name: str,
        text_digest: str,
        denoiser: Mapping[str, Any],
        factor: int,
    ) -> None:
        self._pipe = pipe
        self._kind = kind
        self._vae = vae
        self._denoiser = denoiser
        self._factor = factor
        self.name = name
        self.text_digest = text_digest
        self.text_encoders = _encoders(pipe)

    @property
    def vae(self) -> Vae:
        """Its autoencoder.

        Raises:
            NasError: the pipeline was loaded without.
        """
        if self._vae is None:
            raise NasError(f"the pipeline {self.name} was loaded without its VAE")
        return self._vae

    @property
    def latent_channels(self) -> int:
        """C of its latents."""
        return self.vae.channels

    @property
    def scaling_factor(self) -> float:
        """What the encoder's latents are multiplied by."""
        return self.vae.scaling.factor

    @property
    def image_size(self) -> int:
        """Side in px of the images that its denoiser was made for."""
        side = self._denoiser.get("sample_size") or 64
        return int(side if isinstance(side, int) else side[0]) * self._factor

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], crops: Sequence[Crop] | None = None) -> Conditioning:
        """The conditions of B prompts, as diffusers makes them; what a text encoder has no room for is cut off.

        Args:
            prompts: B of them.
            crops: where the B images come from, of which some denoisers are told; whole images of `image_size` if None.
        """
        text = self._text(list(prompts), null=False)
        sizes = self._kind.sizes
        # A PixArt of 512 px takes no sizes, one of 1024 px does.
        if sizes is None or not self._takes_sizes():
            return text
        crops = [Crop.whole(self.image_size)] * len(prompts) if crops is None else crops
        ids = torch.tensor([sizes(crop) for crop in crops], dtype=torch.float32, device=text.device)
        return Conditioning(tokens=text.tokens, pooled=text.pooled, size_ids=ids)

    @torch.no_grad()
    def null(self) -> Conditioning:
        """The conditions of no prompt, one row; sizes are those of the image it is asked for (`Conditioning.like`)."""
        return self._text([""], null=True)

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [B, C, H, W] of images [B, 3, h, w] in [-1, 1]."""
        return self.vae.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, h, w] in [-1, 1] of latents [B, C, H, W]."""
        return self.vae.decode(latents)

    def _takes_sizes(self) -> bool:
        given = self._denoiser
        if "PixArt" not in str(given.get("_class_name")):
            return True
        sized = given.get("use_additional_conditions")
        return bool(given.get("sample_size", 128) == 128 if sized is None else sized)

    def _text(self, prompts: list[str], *, null: bool) -> Conditioning:
        if self._pipe is None:
            raise NasError(f"the pipeline {self.name} was loaded without its text encoders")
        with _quiet():
            return self._kind.encode(self._pipe, prompts, null).to(dtype=torch.float32)


def load_pipeline(
    name: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    text: bool = True,
    vae: bool = True,
) -> Pipeline:
    """The text encoders and the VAE of a diffusers pipeline; no pickled weights are read.

    Args:
        name: a local folder or a hub id.
        device: where they go.
        dtype: of the text encoders' weights; the VAE's too. What they give is float32.
        text: whether the text encoders are wanted.
        vae: whether the VAE is.

    Raises:
        NasError: not found or unreachable, no pipeline, a class that is not known, or weights that cannot be read.
    """
    index = _side_file(name, INDEX)
    kind_name = index.get("_class_name")
    if kind_name not in KINDS:
        raise NasError(
            f"{name} is a {kind_name}; pipelines whose prompts can be encoded are {', '.join(KINDS)}", hint=_HINT
        )
    kind = KINDS[str(kind_name)]
    folder = find_folder(name)
    denoiser = read_json(folder / "config.json")
    pipe, digest = _load_text(name, index, kind, denoiser, device, dtype) if text else (None, "")
    return Pipeline(
        pipe,
        kind,
        load_vae(name, device=device, dtype=dtype, subfolder="vae") if vae else None,
        name=name,
        text_digest=digest,
        denoiser=denoiser,
        factor=vae_factor(_side_file(name, "vae/config.json")),
    )


def _side_file(name: str, file: str) -> dict[str, Any]:
    """A small JSON file of a pipeline's local folder or hub repository."""
    if Path(name).is_dir():
        if not (Path(name) / file).is_file():
            raise NasError(f"{name} is no pipeline: it has no {file}", hint=_HINT)
        return read_json(Path(name) / file)
    # Imported here: only a hub id needs it.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return read_json(Path(hf_hub_download(name, file)))
    except (OSError, HFValidationError) as error:
        raise NasError(f"the pipeline {name!r} is no folder here and cannot be fetched: {first_line(error)}") from error


def _load_text(
    name: str,
    index: Mapping[str, Any],
    kind: Kind,
    denoiser: Mapping[str, Any],
    device: torch.device | str,
    dtype: torch.dtype,
) -> tuple[Any, str]:
    """A pipeline of diffusers with nothing but its text encoders, and the digest of their files."""
    import diffusers

    local = Path(name)
    missing = [part for part in kind.optional if local.is_dir() and not (local / part).is_dir()]
    missing += [part for part in kind.optional if index.get(part, [None])[0] is None]
    absent: dict[str, Any] = dict.fromkeys([*missing, *(part for part in _LEFT_OUT if part in index)])
    if "safety_checker" in absent:
        absent["requires_safety_checker"] = False
    options = {**absent, "dtype": dtype, "use_safetensors": True}
    try:
        with _quiet():
            root = local if local.is_dir() else Path(diffusers.DiffusionPipeline.download(name, **options))
            pipe = diffusers.DiffusionPipeline.from_pretrained(root, **options)
    except (OSError, ValueError) as error:
        raise NasError(f"the pipeline {name} cannot be read: {first_line(error)}", hint=_HINT) from error
    parts = [part for part in index if part.startswith(("text_encoder", "tokenizer")) and (root / part).is_dir()]
    for part in parts:
        module = getattr(pipe, part, None)
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval().to(device)
    if "transformer" in absent:
        # Stable Diffusion 3 without its T5 pads with zeros as wide as its transformer's text.
        pipe.transformer = SimpleNamespace(config=SimpleNamespace(**denoiser), dtype=dtype)
    files = [(f"{part}/{path.name}", path) for part in parts for path in (root / part).iterdir() if path.is_file()]
    return pipe, content_digest(files)


def _encoders(pipe: Any) -> tuple[str, ...]:
    found = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    return tuple(type(each).__name__ for each in found if each is not None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and the warnings of other libraries: one has a warning for every caption that is cut."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    levels = [(library, library.get_verbosity()) for library in (ours, theirs)]
    bars = [library for library in (ours, theirs) if library.is_progress_bar_enabled()]
    for library, _ in levels:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in levels:
            library.set_verbosity(level)
        for library in bars:
            library.enable_progress_bar()
