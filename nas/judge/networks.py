"""Scores by large networks of others: FID by Inception and the CLIP score, from local files or the hub.

Nothing is fetched unless a hub id is named, and then local copies come first. Legend: N images, h w height and width,
F features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas.errors import NasError
from nas.judge.frechet import frechet_distance, statistics

_BATCH = 32  # pictures per call
INCEPTION = "inception-2015-12-05.pt"
_FID_HINT = (
    f"give the file {INCEPTION} (TorchScript, 91 MB, as StyleGAN2-ADA and clean-fid use it:"
    " https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/), or OWNER/REPOSITORY/FILE on the hub"
)
_CLIP_HINT = "give a folder that transformers saved, or a hub id such as openai/clip-vit-large-patch14"


@dataclass(frozen=True, kw_only=True, eq=False)
class InceptionDistance:
    """FID: the Fréchet distance in Inception-v3's features (Heusel et al. 2017, arXiv 1706.08500).

    Attributes:
        network: called as network(pixels uint8 [B, 3, h, w], return_features=True), gives [B, F]; resizes by itself,
            as the first FIDs did, so that the numbers are those of "legacy" implementations.
        name: of the score.
        compares: True: pictures are compared with others.
    """

    network: Any
    name: str = "fid"
    compares: bool = True

    @torch.no_grad()
    def score(self, pictures: Tensor, texts: Sequence[str], against: Tensor | None) -> float:
        """The distance of pictures [N, 3, h, w] in [-1, 1] to others; the texts are not read.

        Published FIDs are of 10,000 to 50,000 pictures; of fewer than F the covariance is singular and the distance
        large, so it compares at equal N only.

        Raises:
            NasError: nothing to compare with.
        """
        if against is None:
            raise NasError("FID compares with other pictures, and there are none")
        return frechet_distance(statistics(self._features(pictures)), statistics(self._features(against)))

    def _features(self, pictures: Tensor) -> list[Tensor]:
        return [self.network(pixels(part), return_features=True).cpu() for part in pictures.split(_BATCH)]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipScore:
    """The CLIP score: 100 max(cos(image, text), 0), mean over pairs (Hessel et al. 2021, without its factor 2.5).

    Attributes:
        model: transformers' CLIPModel, frozen, in eval mode.
        tokenizer: its.
        image_processor: its.
        name: of the score.
        compares: False: a picture is judged by its text alone.
    """

    model: Any
    tokenizer: Any = field(repr=False)
    image_processor: Any = field(repr=False)
    name: str = "clip_score"
    compares: bool = False

    @torch.no_grad()
    def score(self, pictures: Tensor, texts: Sequence[str], against: Tensor | None) -> float:
        """How well pictures [N, 3, h, w] in [-1, 1] fit their texts, 0 to 100; `against` is not looked at.

        Texts are cut off at the model's longest, 77 tokens.

        Raises:
            NasError: not one text per picture.
        """
        if len(texts) != len(pictures):
            raise NasError(f"the CLIP score wants one text per picture, got {len(texts)} and {len(pictures)}")
        found = []
        for first in range(0, len(pictures), _BATCH):
            shown = pixels(pictures[first : first + _BATCH]).permute(0, 2, 3, 1).numpy()
            words = self.tokenizer(
                list(texts[first : first + _BATCH]),
                padding=True,
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            values = self.image_processor(images=list(shown), return_tensors="pt")["pixel_values"]
            said = self.model(input_ids=words["input_ids"], attention_mask=words["attention_mask"], pixel_values=values)
            cosine = nn.functional.cosine_similarity(said.image_embeds.float(), said.text_embeds.float())
            found.append(100 * cosine.clamp_min(0))
        return float(torch.cat(found).mean())


def pixels(pictures: Tensor) -> Tensor:
    """Pictures [N, 3, h, w] in [-1, 1] as uint8, as a file would hold them."""
    return ((pictures.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def load_inception(weights: str) -> InceptionDistance:
    """FID with the network in a TorchScript file.

    Args:
        weights: a path, or OWNER/REPOSITORY/FILE of the hub.

    Raises:
        NasError: no such file, unreachable, or no TorchScript network that gives features.
    """
    path = _file(weights)
    try:
        with warnings.catch_warnings():
            # torch announces the end of TorchScript; the published network exists in no other form.
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(str(path), map_location="cpu").eval()
            tried = network(torch.zeros((2, 3, 32, 32), dtype=torch.uint8), return_features=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise NasError(f"{weights} is no TorchScript network for FID: {_first_line(error)}", hint=_FID_HINT) from error
    if not isinstance(tried, Tensor) or tried.dim() != 2:
        raise NasError(f"{weights} gives no features [B, F], so it cannot be used for FID", hint=_FID_HINT)
    return InceptionDistance(network=network)


def load_clip(source: str) -> ClipScore:
    """The CLIP score with a model of transformers.

    Args:
        source: a local folder (weights, tokenizer, image processor), or a hub id.

    Raises:
        NasError: not found, unreachable, or of another kind.
    """
    # Imported here: transformers takes seconds, and only this score needs it.
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        kinds = (CLIPModel, CLIPTokenizer, CLIPImageProcessorPil)
        model, tokenizer, image_processor = (_local_first(source, k.from_pretrained, _CLIP_HINT) for k in kinds)
    finally:
        if bars:
            logging.enable_progress_bar()
    return ClipScore(
        model=model.float().requires_grad_(False).eval(), tokenizer=tokenizer, image_processor=image_processor
    )


def _file(weights: str) -> Path:
    here = Path(weights)
    if here.is_file():
        return here
    parts = weights.split("/")
    if here.is_absolute() or len(parts) < 3 or weights.startswith("."):
        raise NasError(f"the FID network {weights} does not exist", hint=_FID_HINT)
    from huggingface_hub import hf_hub_download

    repository, name = "/".join(parts[:2]), "/".join(parts[2:])
    found = _local_first(weights, lambda _, **options: hf_hub_download(repository, name, **options), _FID_HINT)
    return Path(found)


def _local_first(name: str, load: Callable[..., Any], hint: str) -> Any:
    """What `load` finds among local files, else on the hub if it is a hub id."""
    try:
        return load(name, local_files_only=True)
    except (OSError, ValueError) as error:
        if Path(name).exists() or Path(name).is_absolute() or name.startswith(".") or "/" not in name:
            raise NasError(f"{name} cannot be loaded: {_first_line(error)}", hint=hint) from error
    try:
        return load(name)
    except (OSError, ValueError) as error:
        raise NasError(f"{name!r} is not here and cannot be fetched: {_first_line(error)}", hint=hint) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_pictures(folder: Path, size: tuple[int, int]) -> Tensor:
    """The PNG and JPEG files of a folder as pictures [N, 3, h, w] in [-1, 1], centre-cropped and resized.

    Raises:
        NasError: no such folder, or fewer than two pictures in it.
    """
    from PIL import Image, ImageOps

    if not folder.is_dir():
        raise NasError(f"the folder of real pictures {folder} does not exist")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if len(files) < 2:
        raise NasError(f"{folder} holds {len(files)} PNG or JPEG pictures, and a distance needs at least 2")
    height, width = size
    read = []
    for path in files:
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
            read.append(torch.from_numpy(np.array(fitted)).permute(2, 0, 1))
    return torch.stack(read).float() / 127.5 - 1
