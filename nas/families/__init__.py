"""Families: a plug-in turns settings into blocks, position by position.

A family is one file with `positions(values, shape, scale=None)`, which yields `nas.network.Position`s in execution
order. It reads its settings through `values` (see `Values`), by documented names, so that the same code serves a search
space, where a setting may be a choice; a published configuration, where all are fixed; and, with `scale`, a small copy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from nas import registry
from nas.errors import NasError, UsageError, unknown
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

    def check_names(self, family: str, known: Iterable[str]) -> None:
        """Refuses a name that the family does not read: a misspelt setting would leave its default in force.

        Args:
            family: for the error.
            known: the names; "width_#" stands for `width_0`, `width_1`, ... `downscale` is every space's own.

        Raises:
            UsageError: another name.
        """
        allowed = {"downscale", *known}
        for name in (*self.choices, *self.fixed):
            if re.sub(r"_\d+(?=_|$)", "_#", name) not in allowed:
                words = sorted(word.replace("#", "0") for word in allowed)
                raise unknown("setting", name, words, where=f"{self.where} (family {family})")

    def check_whole(self, name: str, least: int = 1) -> None:
        """Refuses a setting with a value that is no whole number, or a smaller one.

        Raises:
            UsageError: names it.
        """
        for value in self.all(name):
            if type(value) is not int or value < least:
                raise UsageError(f"{self.where}: {name} must be a whole number of {least} or more, got {value!r}")

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
        UsageError: the family is unknown, or the space lacks a setting that it needs or gives it one that it cannot
            take; names the file.
    """
    with _naming(str(space.path)):
        return _positions(space.family, values_of(space), space.input.shape)


def network(candidate: Candidate) -> NetworkSpec:
    """The candidate's network: the concatenation of its positions' blocks.

    Raises:
        UsageError: as of `positions`, or values that do not go together; names the file.
    """
    found = positions(candidate.space)
    with _naming(str(candidate.space.path)):
        blocks = _blocks(found, candidate.values)
    return NetworkSpec(name=str(candidate), input=candidate.space.input.shape, blocks=blocks)


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
        UsageError: unknown family, or a setting missing or out of range; names `where`, or the network.
    """
    place = where or name
    with _naming(place):
        blocks = _blocks(_positions(family, Values(choices={}, fixed=settings, where=place), shape), {})
    return NetworkSpec(name=name, input=shape, blocks=blocks)


def values_of(space: SearchSpace) -> Values:
    """A space's choices and fixed settings."""
    choices = {choice.name: choice.values for choice in space.choices}
    return Values(choices=choices, fixed=space.fixed, where=str(space.path))


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Makes a family's refusal one of the file whose settings it read, and names that file where it does not yet."""
    try:
        yield
    except NasError as error:
        message = error.message if where in error.message else f"{where}: {error.message}"
        raise UsageError(message, hint=error.hint) from error


def _positions(family: str, values: Values, shape: InputShape, scale: Scale | None = None) -> tuple[Position, ...]:
    return tuple(registry.load("nas.families", family).positions(values, shape, scale))


def _blocks(found: tuple[Position, ...], values: Mapping[str, Scalar]) -> tuple[BlockSpec, ...]:
    return tuple(
        spec for position in found for spec in position.blocks({name: values[name] for name in position.depends})
    )
