"""What is measured: a block, a small network, or a fixed part of a pipeline, with its module and its features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nas import components as parts
from nas import families, registry, tables
from nas.build import build, build_block, check, example_inputs
from nas.network import BlockSpec, NetworkSpec
from nas.op import features
from nas.space import Candidate, SearchSpace, load_space
from nas.trace import trace_block

_COMPONENT_PIXELS = (256, 512, 1024)
_Build = Callable[[int], tuple[nn.Module, dict[str, Tensor]]]


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
    build: _Build = field(repr=False)
    features: np.ndarray | None = None
    macs: int = 0
    params: int = 0
    role: str = ""


def components(
    space: SearchSpace, pixels: Sequence[int] = _COMPONENT_PIXELS, most_gmac: float = math.inf
) -> tuple[Subject, ...]:
    """The components of the space's pipeline that can be built; they are charged as measured, never fitted.

    Left out are text encoders that run at whatever length a pipeline asks for: a row does not say for which it holds.
    """
    if space.pipeline is None:
        return ()
    found: list[Subject] = []
    for px in pixels:
        at = space.at_resolution(px)
        network = parts.decoder_network(space.pipeline.decoder, at)
        found.append(_component(parts.decoder(space.pipeline.decoder, at), px, _network(network)))
    for name in space.pipeline.text_encoders:
        encoder = parts.text_encoder(name)
        if encoder.tokens is not None and parts.TEXT[name].tokens is not None:
            found.append(_component(encoder, None, partial(parts.build_text_encoder, name, encoder.tokens)))
    return tuple(subject for subject in found if subject.macs <= most_gmac * 1e9)


def _component(component: parts.Component, px: int | None, build: _Build) -> Subject:
    key = parts.subject_name(component.name, component.role, px)
    return Subject(
        key=key,
        kind="component",
        name=key,
        spec=None,
        resolution_px=px,
        build=build,
        macs=component.macs or 0,
        params=component.params or 0,
        role=component.role,
    )


def _network(spec: NetworkSpec) -> _Build:
    return lambda batch: (build(spec), example_inputs(spec, batch))


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

    return Subject(
        key=spec.key,
        kind="network",
        name=f"{spec.name} {spec.input.height}x{spec.input.width}",
        spec={**spec.to_json(), "space": space},
        resolution_px=px,
        build=_network(spec),
        features=features(ops),
        macs=sum(op.macs for op in ops),
        params=sum(op.weight_bytes for op in ops) // 4,
    )


def reference_subject(space: str, name: str, px: int | None, batch: int) -> Subject:
    """A published network of a space, at images of `px` pixels or at its own size.

    Raises:
        UsageError: no such space or reference, or a size that it cannot take.
    """
    candidate = load_space(space).published(name)
    if px is not None:
        candidate = candidate.space.at_resolution(px).candidate(**candidate.choices)
    return candidate_subject(candidate, batch)


def candidate_subject(candidate: Candidate, batch: int) -> Subject:
    """A candidate's network at full size."""
    space = candidate.space
    return network_subject(families.network(candidate), space.name, space.resolution_px, batch)


def rebuilt(recorded: tables.Subject, px: int | None, batch: int) -> Subject | None:
    """A table's block or network as something that can be built and measured; None where the table does not say how.

    It is traced again: a change of the tracer must not leave old features beside new ones.

    Raises:
        UsageError: a kind of block that this version does not have.
    """
    spec = recorded.spec
    if recorded.kind == "block" and "inputs" in spec:
        block = BlockSpec.from_json(spec)
        registry.load("nas.blocks", block.kind)
        return block_subject(block, spec.get("space", ""), px, batch)
    if "blocks" in spec:
        network = NetworkSpec.from_json(spec)
        check(network)
        return network_subject(network, spec.get("space", ""), px, batch)
    if recorded.kind == "reference" and {"space", "reference"} <= set(spec):
        return reference_subject(spec["space"], spec["reference"], spec.get("resolution_px"), batch)
    return None


def table_subject(subject: Subject) -> tables.Subject:
    """A subject as a table keeps it."""
    return tables.Subject(
        key=subject.key,
        kind=subject.kind,
        name=subject.name,
        spec=subject.spec or {},
        features={} if subject.features is None else tables.feature_map(subject.features),
        macs=subject.macs,
        params=subject.params,
    )
