"""How the denoisers of diffusers are called: one small adapter per class, from our conditions to its arguments.

Legend: B batch, C channels, T text tokens, P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from nas.diffusion import Conditioning
from nas.diffusion.denoisers import Call
from nas.errors import NasError

_SDXL_SIZES: Final = (
    6  # original height and width, the crop's top and left, target height and width (SDXL, section 2.2)
)
_BIGG_POOLED: Final = 1280  # width of the pooled text of OpenCLIP bigG, which SDXL and its refiner take


@dataclass(frozen=True, kw_only=True)
class Interface:
    """What a published denoiser takes.

    Attributes:
        call: its adapter, for `nas.diffusion.NativeDenoiser`.
        channels: of its latents.
        conditions: the parts of `Conditioning` that it needs, and each one's width.
    """

    call: Call
    channels: int
    conditions: Mapping[str, int]


def interface(config: Mapping[str, Any], where: str) -> Interface:
    """How the denoiser of a diffusers configuration is called.

    Args:
        config: the content of its config.json, with the class's defaults filled in.
        where: what errors call it.

    Raises:
        NasError: a class, or a kind of condition, that has no adapter.
    """
    kind = str(config.get("_class_name"))
    if kind not in _READERS:
        raise NasError(
            f"{where} is a {kind}; denoisers that can teach are {', '.join(_READERS)}",
            hint="give a pipeline with one of them, or 'embedded'",
        )
    return _READERS[kind](config, where)


def _unet(config: Mapping[str, Any], where: str) -> Interface:
    """SD 1 and 2, SDXL and DreamLite."""
    _same_channels(config, where)
    for key in ("class_embed_type", "num_class_embeds"):
        if config.get(key) is not None:
            raise NasError(f"{where} wants class labels ({key} = {config[key]!r}), which no data here brings")
    projected = config.get("encoder_hid_dim_type")
    if projected not in (None, "text_proj", "text_proj_rms"):
        raise NasError(
            f"{where} wants images as conditions (encoder_hid_dim_type = {projected!r}), which none here has"
        )
    width = config["cross_attention_dim"] if projected is None else config["encoder_hid_dim"]
    widths = set(width) if isinstance(width, list | tuple) else {width}
    if len(widths) != 1:
        raise NasError(f"{where} takes another text width in each stage: {width}")
    conditions = {"tokens": int(widths.pop())}
    added = config.get("addition_embed_type")
    if added not in (None, "text_time", "time"):
        raise NasError(f"{where} has addition_embed_type {added!r}; known: text_time, time")
    if added is not None:
        each, whole = int(config["addition_time_embed_dim"]), int(config["projection_class_embeddings_input_dim"])
        # The configuration has the sum only; the refiner takes 5 sizes.
        rest = whole - (_BIGG_POOLED if added == "text_time" else 0)
        sizes = rest // each if rest > 0 and rest % each == 0 else _SDXL_SIZES
        conditions |= {"size_ids": sizes}
        if added == "text_time":
            conditions |= {"pooled": whole - sizes * each}
    guidance = config.get("time_cond_proj_dim")
    if guidance is not None:
        conditions |= {"guidance": int(guidance)}

    def call(network: nn.Module, sample: Tensor, timestep: Tensor, text: Conditioning) -> Tensor:
        extra: dict[str, Any] = {}
        if added is not None:
            extra["added_cond_kwargs"] = {"time_ids": text.size_ids}
        if added == "text_time":
            extra["added_cond_kwargs"]["text_embeds"] = text.pooled
        if guidance is not None:
            extra["timestep_cond"] = text.guidance
        return _first(network(sample, timestep, encoder_hidden_states=text.tokens, return_dict=False, **extra))

    return _checked(where, call, config, conditions)


def _pixart(config: Mapping[str, Any], where: str) -> Interface:
    """PixArt-alpha and PixArt-Sigma. Text rows of zeros are padding, which its attention leaves out."""
    learned = _same_channels(config, where, learned_variance=True)
    projected = config.get("caption_channels")
    conditions = {"tokens": int(projected if projected is not None else config["cross_attention_dim"])}
    sized = config.get("use_additional_conditions")
    if sized is None:
        sized = config["sample_size"] == 128  # the class's own rule: PixArt-alpha at 1024 px
    if sized:
        conditions |= {"size_ids": 3}  # height, width, and their ratio

    def call(network: nn.Module, sample: Tensor, timestep: Tensor, text: Conditioning) -> Tensor:
        sizes = text.size_ids
        added = {
            "resolution": None if sizes is None or not sized else sizes[:, :2],
            "aspect_ratio": None if sizes is None or not sized else sizes[:, 2:],
        }
        words = text.tokens.abs().amax(-1) > 0
        predicted = _first(
            network(
                sample,
                encoder_hidden_states=text.tokens,
                encoder_attention_mask=words,
                timestep=timestep,
                added_cond_kwargs=added,
                return_dict=False,
            )
        )
        # The second half is the variance, which no sampler of today uses.
        return predicted[:, : sample.shape[1]] if learned else predicted

    return _checked(where, call, config, conditions)


def _sd3(config: Mapping[str, Any], where: str) -> Interface:
    """Stable Diffusion 3 and 3.5: the joint transformer."""
    _same_channels(config, where)
    conditions = {"tokens": int(config["joint_attention_dim"]), "pooled": int(config["pooled_projection_dim"])}

    def call(network: nn.Module, sample: Tensor, timestep: Tensor, text: Conditioning) -> Tensor:
        return _first(
            network(
                sample,
                encoder_hidden_states=text.tokens,
                pooled_projections=text.pooled,
                timestep=timestep,
                return_dict=False,
            )
        )

    return _checked(where, call, config, conditions)


_READERS: Final[Mapping[str, Callable[[Mapping[str, Any], str], Interface]]] = {
    "UNet2DConditionModel": _unet,
    "DreamLiteUNetModel": _unet,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
}
CLASSES: Final = tuple(_READERS)


def _same_channels(config: Mapping[str, Any], where: str, *, learned_variance: bool = False) -> bool:
    """Whether it predicts the variance too; refuses one that takes or gives anything else than its latents."""
    given, made = config["in_channels"], config.get("out_channels") or config["in_channels"]
    if made == given:
        return False
    if learned_variance and made == 2 * given:
        return True
    raise NasError(
        f"{where} turns {given} channels into {made}; only denoisers of plain latents can teach (no inpainting or"
        " editing)"
    )


def _checked(where: str, call: Call, config: Mapping[str, Any], conditions: Mapping[str, int]) -> Interface:
    """An adapter that works in the network's precision and says what is missing from the conditions."""

    def checked(network: nn.Module, sample: Tensor, timestep: Tensor, text: Conditioning) -> Tensor:
        for name, width in conditions.items():
            given = getattr(text, name)
            if given is None or given.shape[-1] != width:
                found = "brings none" if given is None else f"brings {given.shape[-1]}"
                raise NasError(f"{where} needs {name} of width {width}, and the data {found}")
        dtype = next(network.parameters()).dtype
        if dtype == sample.dtype:
            return call(network, sample, timestep, text)
        return call(network, sample.to(dtype), timestep, text.to(dtype=dtype)).to(sample.dtype)

    return Interface(call=checked, channels=int(config["in_channels"]), conditions=dict(conditions))


def _first(outputs: tuple[Any, ...]) -> Tensor:
    found = outputs[0]
    assert isinstance(found, torch.Tensor)
    return found
