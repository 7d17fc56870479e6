"""Families: a plug-in turns a space's choices into blocks, position by position."""

from __future__ import annotations

from nas import registry
from nas.network import InputShape, NetworkSpec, Position
from nas.space import Candidate, SearchSpace


def positions(space: SearchSpace) -> tuple[Position, ...]:
    """The positions of the space's networks in execution order (see `nas.network.Position`).

    Raises:
        UsageError: the family is unknown, or the space lacks a setting that it needs.
    """
    return tuple(registry.load("nas.families", space.family).positions(space))


def network(candidate: Candidate) -> NetworkSpec:
    """The candidate's network: the concatenation of its positions' blocks."""
    space, values = candidate.space, candidate.values
    blocks = tuple(
        spec
        for position in positions(space)
        for spec in position.blocks({name: values[name] for name in position.depends})
    )
    shape = InputShape(
        channels=space.input.latent_channels,
        height=space.input.latent_height,
        width=space.input.latent_width,
        text_tokens=space.input.text_tokens,
        text_width=space.input.text_width,
    )
    return NetworkSpec(name=str(candidate), input=shape, blocks=blocks)
