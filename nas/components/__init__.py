"""Named pipeline components: text encoders and image decoders, what they cost, and what a target charges for them.

A text encoder is fixed and built from a configuration in `nas.components.text`; a decoder is a reference of the space
`decoder`. A component may be known by its published latency alone: then it has no parameters and cannot be predicted.
"""

from __future__ import annotations

from functools import cache, partial

import torch

from nas import families
from nas.components.charge import MEASURED, PREDICTED, PUBLISHED, Part, charge, component_of, subject_name
from nas.components.parts import DECODER, TEXT_ENCODERS, Component
from nas.components.text import TEXT, build_text_encoder
from nas.cost import network_peak_bytes
from nas.errors import NasError, UsageError, unknown
from nas.network import NetworkSpec
from nas.space import SearchSpace, load_space
from nas.trace import Trace, block_trace, module_trace
from nas.trace.recorder import Uninitialised

__all__ = [
    "DECODER",
    "MEASURED",
    "PREDICTED",
    "PUBLISHED",
    "TEXT",
    "TEXT_ENCODERS",
    "Component",
    "Part",
    "build_text_encoder",
    "charge",
    "check_pipeline",
    "component_of",
    "components",
    "decoder",
    "decoder_names",
    "decoder_network",
    "subject_name",
    "text_encoder",
    "text_encoder_names",
]

DECODER_SPACE = "decoder"
# Known only by what an image pays for them on a device: no configuration is published.
_PUBLISHED_ONLY = ("snapgen-text-encoders",)


def text_encoder_names() -> tuple[str, ...]:
    """Every name that a pipeline's `text_encoders` may have."""
    return (*TEXT, *_PUBLISHED_ONLY)


def decoder_names() -> tuple[str, ...]:
    """Every name that a pipeline's `decoder` may have: the references of the space `decoder`."""
    return tuple(reference.name for reference in load_space(DECODER_SPACE).references)


def components(space: SearchSpace, px: int | None = None) -> tuple[Component, ...]:
    """The components of a space's pipeline, text encoders first, at images of `px` pixels (None: the space's).

    Raises:
        UsageError: the space has no pipeline, a name is unknown, or the decoder reads other latents than the denoiser
            makes.
    """
    if space.pipeline is None:
        raise UsageError(f"space {space.name} has no [pipeline], so there are no components beside its networks")
    tokens = space.input.text_tokens
    encoders = tuple(text_encoder(name, tokens) for name in space.pipeline.text_encoders)
    return (*encoders, decoder(space.pipeline.decoder, space if px is None else space.at_resolution(px)))


def check_pipeline(space: SearchSpace) -> None:
    """Checks the names in a space file's [pipeline], where it has one.

    Raises:
        UsageError: a name is unknown, or the decoder reads other latents; names the file.
    """
    if space.pipeline is None:
        return
    try:
        components(space)
    except NasError as error:
        raise UsageError(f"{space.path} [pipeline]: {error.message}", hint=error.hint) from error


def text_encoder(name: str, tokens: int | None = None) -> Component:
    """A text encoder by name.

    Args:
        name: of `text_encoder_names()`.
        tokens: T that the pipeline gives it; encoders made for one length ignore it.

    Raises:
        UsageError: unknown name.
    """
    if name in _PUBLISHED_ONLY:
        return Component(name=name, role=TEXT_ENCODERS)
    if name not in TEXT:
        raise unknown("text encoder", name, text_encoder_names())
    tokens = TEXT[name].length(tokens)
    make = partial(_traced_encoder, name, tokens)
    return Component(name=name, role=TEXT_ENCODERS, make=make, tokens=tokens, width=TEXT[name].width)


@cache
def _traced_encoder(name: str, tokens: int) -> Trace:
    with torch.device("meta"), Uninitialised():
        module, inputs = build_text_encoder(name, tokens)
    return module_trace(module, inputs, name=name)


def decoder(name: str, space: SearchSpace) -> Component:
    """A decoder by name, for the latents of a space's networks.

    Raises:
        UsageError: unknown name, or it reads other latents than the space's networks make.
    """
    return Component(name=name, role=DECODER, make=partial(_traced_network, decoder_network(name, space)))


def _traced_network(spec: NetworkSpec) -> Trace:
    traces = [block_trace(block) for block in spec.blocks]
    return Trace(
        ops=tuple(op for trace in traces for op in trace.ops),
        params=sum(trace.params for trace in traces),
        peak_bytes=network_peak_bytes(spec.blocks, [trace.peak_bytes for trace in traces]),
    )


def decoder_network(name: str, space: SearchSpace) -> NetworkSpec:
    """The network of a decoder for the latents of a space's networks.

    Raises:
        UsageError: unknown name, or it reads other latents than the space's networks make.
    """
    decoders = load_space(DECODER_SPACE)
    if name not in decoder_names():
        raise unknown("decoder", name, decoder_names(), hint="nas spaces show decoder")
    ours, theirs = space.input, decoders.input
    if (ours.latent_channels, ours.pixels_per_latent) != (theirs.latent_channels, theirs.pixels_per_latent):
        raise UsageError(
            f"decoder {name} reads latents of {theirs.latent_channels} channels, one for {theirs.pixels_per_latent} x"
            f" {theirs.pixels_per_latent} pixels, but the networks of space {space.name} make {ours.latent_channels}"
            f" channels for {ours.pixels_per_latent} x {ours.pixels_per_latent}"
        )
    return families.network(decoders.at_resolution(space.resolution_px).reference(name))
