"""What is measured: a block, a small network, or a fixed part of a pipeline, with its module and its features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas.build import build, build_block, example_inputs
from nas.network import BlockSpec, NetworkSpec
from nas.op import features
from nas.space import SearchSpace
from nas.trace import trace_block

_COMPONENT_PIXELS = (256, 512, 1024)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One thing to measure.

    Attributes:
        kind: "block", "network" or "component".
        spec: the block's or network's JSON with the name of its space, or None for a component.
        build: a module with random weights and the inputs that it is called with.
        features: [F] as of nas.op.FEATURES, or None for a component (it is charged as measured, never fitted).
        role: the pipeline part that a component plays, else "".
    """

    key: str
    kind: str
    name: str
    spec: Mapping[str, Any] | None
    resolution_px: int | None
    build: Callable[[int], tuple[nn.Module, dict[str, Tensor]]] = field(repr=False)
    features: np.ndarray | None = None
    macs: int = 0
    params: int = 0
    role: str = ""


def components(space: SearchSpace, pixels: Sequence[int] = _COMPONENT_PIXELS) -> tuple[Subject, ...]:
    """The fixed parts of the space's pipeline that have a public stand-in to build: see `_decoder`, `_text_encoder`."""
    found: list[Subject] = []
    for px in pixels:
        if "decoder" in space.pipeline.parts:
            side = px // space.input.pixels_per_latent
            found.append(_component("decoder", f"taesd-decoder-{px}px", px, _decoder(side)))
    if "text_encoders" in space.pipeline.parts:
        found.append(_component("text_encoders", "clip-l-text-encoder", None, _text_encoder))
    return tuple(found)


def _component(
    role: str, name: str, px: int | None, build: Callable[[int], tuple[nn.Module, dict[str, Tensor]]]
) -> Subject:
    return Subject(key=name, kind="component", name=name, spec=None, resolution_px=px, build=build, role=role)


class _Call(nn.Module):
    """A model whose answer is a record, as a module of one named input and one output tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.model(input_ids=tokens).last_hidden_state
        return output


def _decoder(side: int) -> Callable[[int], tuple[nn.Module, dict[str, Tensor]]]:
    """TAESD's decoder (1.22 M parameters, random weights), near in size to SnapGen's own of 1.38 M."""

    def make(batch: int) -> tuple[nn.Module, dict[str, Tensor]]:
        from diffusers import AutoencoderTiny

        return AutoencoderTiny().decoder, {"x": torch.randn(batch, 4, side, side)}

    return make


def _text_encoder(batch: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """CLIP-L's text encoder (123 M parameters, random weights), 77 tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    tokens = torch.arange(77).expand(batch, 77).contiguous()
    return _Call(CLIPTextModel(config)), {"tokens": tokens}


def block_subject(spec: BlockSpec, space: str, px: int | None, batch: int) -> Subject:
    """A block of the space `space` at an image of `px` pixels, called with `batch` samples."""
    ops = trace_block(spec, batch)
    return Subject(
        key=spec.key,
        kind="block",
        name=f"{spec.kind} {' '.join('x'.join(map(str, shape)) for _, shape in spec.inputs if len(shape) == 3)}",
        spec={**spec.to_json(), "space": space},
        resolution_px=px,
        build=lambda batch: (build_block(spec), _inputs(spec, batch)),
        features=features(ops),
        macs=sum(op.macs for op in ops),
        params=sum(op.weight_bytes for op in ops) // 4,
    )


def _inputs(spec: BlockSpec, batch: int) -> dict[str, Tensor]:
    return {name: torch.randn(batch, *shape) for name, shape in spec.inputs}


def network_subject(spec: NetworkSpec, space: str, px: int | None, batch: int) -> Subject:
    """A network of the space `space` at an image of `px` pixels, called with `batch` samples."""
    ops = [op for block in spec.blocks for op in trace_block(block, batch)]

    def make(batch: int) -> tuple[nn.Module, dict[str, Tensor]]:
        return build(spec), example_inputs(spec, batch)

    return Subject(
        key=spec.key,
        kind="network",
        name=f"{spec.name} {spec.input.height}x{spec.input.width}",
        spec={**spec.to_json(), "space": space},
        resolution_px=px,
        build=make,
        features=features(ops),
        macs=sum(op.macs for op in ops),
        params=sum(op.weight_bytes for op in ops) // 4,
    )
