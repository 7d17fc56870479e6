"""Families: a plug-in turns settings into blocks, position by position.

A family is one file with `positions(values, shape, scale=None)`, which yields `nas.network.Position`s in execution
order. It reads its settings through `values` (see `Values`), by documented names, so that the same code serves a search
space, where a setting may be a choice; a published configuration, where all are fixed; and, with `scale`, a small copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nas import registry
from nas.errors import UsageError
from nas.network import BlockSpec, InputShape, NetworkSpec, Position, Scalar, Scale
from nas.space import Candidate, SearchSpace


@dataclass(frozen=True, kw_only=True)
class Values:
    """The settings that a family reads: choices with all their values, and what every network shares.

    Attributes:
        choices: name -> the values it may take.
        fixed: name -> its one value.
        where: what errors call the place that they come from ("search_spaces/mine.toml").
    """

    choices: Mapping[str, tuple[Scalar, ...]]
    fixed: Mapping[str, Scalar]
    where: str

    def __contains__(self, name: str) -> bool:
        return name in self.choices or name in self.fixed

    def depends(self, *names: str) -> tuple[str, ...]:
        """Which of `names` are choices (the others must be fixed), each once, in order: a `Position.depends`.

        Raises:
            UsageError: a name is neither.
        """
        for name in names:
            if name not in self:
                raise UsageError(f"{self.where}: the family needs {name!r} in [choices] or [fixed]")
        return tuple(dict.fromkeys(name for name in names if name in self.choices))

    def all(self, name: str) -> tuple[Scalar, ...]:
        """Every value that a setting can take."""
        self.depends(name)
        return self.choices[name] if name in self.choices else (self.fixed[name],)

    def most(self, name: str) -> int:
        """The largest value that a setting can take."""
        return max(int(value) for value in self.all(name))

    def count(self, name: str) -> int:
        """A setting that every network shares, as a whole number above 0.

        Raises:
            UsageError: it is not fixed, or is something else.
        """
        value = self.fixed.get(name)
        if type(value) is not int or value < 1:
            raise UsageError(
                f"{self.where}: the family needs {name!r} in [fixed] as a whole number above 0, got {value!r}"
            )
        return value


def positions(space: SearchSpace) -> tuple[Position, ...]:
    """The positions of the space's networks in execution order (see `nas.network.Position`).

    Raises:
        UsageError: the family is unknown, or the space lacks a setting that it needs.
    """
    return _positions(space.family, values_of(space), space.input.shape)


def network(candidate: Candidate) -> NetworkSpec:
    """The candidate's network: the concatenation of its positions' blocks."""
    found = positions(candidate.space)
    return NetworkSpec(name=str(candidate), input=candidate.space.input.shape, blocks=_blocks(found, candidate.values))


def scaled(candidate: Candidate, scale: Scale) -> NetworkSpec:
    """The candidate's structure at another scale.

    Raises:
        NasError: a width does not divide, the latent cannot be halved down to the lowest stage, or the family has no
            small copies.
    """
    found = _positions(candidate.space.family, values_of(candidate.space), scale.input, scale)
    name = f"{candidate}/{scale.width_divisor}"
    return NetworkSpec(name=name, input=scale.input, blocks=_blocks(found, candidate.values))


def network_of(
    family: str, settings: Mapping[str, Scalar], shape: InputShape, *, name: str, where: str = ""
) -> NetworkSpec:
    """One network of a family by settings that are all fixed, such as those read from a published configuration.

    Raises:
        UsageError: unknown family, or a setting missing or out of range.
    """
    found = _positions(family, Values(choices={}, fixed=settings, where=where or name), shape)
    return NetworkSpec(name=name, input=shape, blocks=_blocks(found, {}))


def values_of(space: SearchSpace) -> Values:
    """A space's choices and fixed settings."""
    choices = {choice.name: choice.values for choice in space.choices}
    return Values(choices=choices, fixed=space.fixed, where=str(space.path))


def _positions(family: str, values: Values, shape: InputShape, scale: Scale | None = None) -> tuple[Position, ...]:
    return tuple(registry.load("nas.families", family).positions(values, shape, scale))


def _blocks(found: tuple[Position, ...], values: Mapping[str, Scalar]) -> tuple[BlockSpec, ...]:
    return tuple(
        spec for position in found for spec in position.blocks({name: values[name] for name in position.depends})
    )
