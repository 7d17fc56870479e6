"""Which point of our spaces a network is.

The network's blocks are matched position by position: what a space's candidates may have at a position is listed over
the choices that it depends on, and only the choices under which that equals the network's next blocks go on. So a
network is found among 10^15 candidates by looking at a few thousand blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from nas import families
from nas.errors import NasError
from nas.network import BlockSpec, NetworkSpec, Position, Scalar
from nas.space import Candidate, SearchSpace, list_spaces, load_space

_COMPLETIONS = 65_536

# Choices settled so far, as (name, value) in the order of the names: those that do not matter are left open.
Settled = tuple[tuple[str, Scalar], ...]


@dataclass(frozen=True, kw_only=True)
class Point:
    """Where a network stands in a space.

    Attributes:
        candidate: whose network it is; its space is at the network's own input.
        references: the published networks of that space that are this network.
    """

    candidate: Candidate
    references: tuple[str, ...]

    @property
    def reference(self) -> str | None:
        """The first of the references."""
        return self.references[0] if self.references else None


@dataclass(frozen=True, kw_only=True)
class Miss:
    """Why a network is no point of a space.

    Attributes:
        space: the name of the space that comes nearest.
        matched: how many blocks from the first on some candidate shares with it.
        reason: what no candidate has, as a sentence without its end.
    """

    space: str
    matched: int
    reason: str


def locate(spec: NetworkSpec, spaces: Iterable[SearchSpace] | None = None) -> Point | None:
    """The point that a network is, or None; see `search`."""
    found = search(spec, spaces)
    return found if isinstance(found, Point) else None


def search(spec: NetworkSpec, spaces: Iterable[SearchSpace] | None = None) -> Point | Miss:
    """The first point whose network has exactly these blocks, by name, settings, inputs and wiring.

    Args:
        spec: the network.
        spaces: where to look, in this order; all spaces at hand if None. Each is taken at the network's own latent size
            and text.

    Returns:
        The point, or the nearest miss.
    """
    known = [load_space(name) for name in list_spaces()] if spaces is None else list(spaces)
    found = _nearest(spec, known)
    first, rest = spec.blocks[0], spec.blocks[1:]
    if isinstance(found, Miss) and not found.matched and first.name not in {block.skip for block in rest}:
        # An autoencoder's class has a block before its decoder; a space of decoders has not.
        other = _nearest(replace(spec, blocks=rest), known)
        if isinstance(other, Point) and other.reference is not None:
            reason = f"no candidate has its block {first.name!r}; without it, it is {other.reference}"
            return Miss(space=other.candidate.space.name, matched=0, reason=reason)
    return found


def _nearest(spec: NetworkSpec, spaces: Iterable[SearchSpace]) -> Point | Miss:
    misses: list[tuple[int, int, Miss]] = []
    for space in spaces:
        found = _in_space(spec, space)
        if isinstance(found, Point):
            return found
        misses.append((found.matched, _resemblance(spec, space), found))
    nearest = max(misses, key=lambda miss: miss[:2], default=None)
    return nearest[2] if nearest is not None else Miss(space="", matched=0, reason="there is no space")


def _resemblance(spec: NetworkSpec, space: SearchSpace) -> int:
    """How many of the network's blocks have the name and kind of one in a published network of the space."""
    own = {(block.name, block.kind) for block in spec.blocks}
    published = [families.network(space.reference(reference.name)).blocks for reference in space.references]
    return max((len(own & {(block.name, block.kind) for block in blocks}) for blocks in published), default=0)


def _in_space(spec: NetworkSpec, whole: SearchSpace) -> Point | Miss:
    space = _at_input(whole, spec)
    walk = _Walk(spec, space)
    try:
        settled = walk.run()
    except NasError as error:  # its latent cannot be halved as often as this family must
        return Miss(space=space.name, matched=0, reason=error.message)
    published = {r.name: whole.published(r.name) for r in whole.references}
    references = [name for name, found in published.items() if _is_at(spec, _at_input(found.space, spec), found)]
    # First those that are published at this very input: SDXL-Turbo is SDXL at 512 px.
    references.sort(key=lambda name: families.network(published[name]).input != spec.input)
    if references:
        return Point(candidate=space.reference(references[0]), references=tuple(references))
    for choices in settled:
        candidate = _completed(space, dict(choices))
        if candidate is not None:
            return Point(candidate=candidate, references=())
    return walk.miss(forbidden=bool(settled))


def _is_at(spec: NetworkSpec, space: SearchSpace, published: Candidate) -> bool:
    """Whether a published network is this one at its latent size: its text has the width that it was published with."""
    if space.input.text_width != published.space.input.text_width:
        return False
    return families.network(space.candidate(**published.choices)).blocks == spec.blocks


def _at_input(space: SearchSpace, spec: NetworkSpec) -> SearchSpace:
    """The space at the network's latent size, and at its text where both read one."""
    shape = spec.input
    settled = replace(space.input, latent_height=shape.height, latent_width=shape.width)
    if shape.text_width and space.input.text_width:
        space = space.with_text_width(shape.text_width)
        settled = replace(settled, text_tokens=shape.text_tokens, text_width=shape.text_width)
    return replace(space, input=settled)


class _Walk:
    """One network against one space.

    States are the ways in which candidates may agree with the network so far: how many of its blocks are used up, and
    which choices that took.
    """

    def __init__(self, spec: NetworkSpec, space: SearchSpace) -> None:
        self.spec = spec
        self.space = space
        self.furthest = 0
        self._others: dict[int, set[BlockSpec | None]] = {}

    def run(self) -> list[Settled]:
        """The choices of every candidate that is this network; none if the space does not hold it."""
        states: dict[tuple[int, Settled], None] = {(0, ()): None}
        for position in families.positions(self.space):
            memo: dict[tuple[int, Settled], list[tuple[int, Settled]]] = {}
            following: dict[tuple[int, Settled], None] = {}
            for place, settled in states:
                given = tuple(item for item in settled if item[0] in position.depends)
                if (place, given) not in memo:
                    memo[place, given] = list(self._step(position, place, dict(given)))
                for used, added in memo[place, given]:
                    following[place + used, tuple(sorted((*settled, *added)))] = None
            states = following
        return [settled for place, settled in states if place == len(self.spec.blocks)]

    def _step(self, position: Position, place: int, given: Mapping[str, Scalar]) -> Iterator[tuple[int, Settled]]:
        """How many blocks the position may take from `place` on, and with which further choices."""
        free = [name for name in position.depends if name not in given]
        agreeing: dict[int, list[tuple[Scalar, ...]]] = {}
        for values in itertools.product(*(self.space.choice(name).values for name in free)):
            blocks = position.blocks({**given, **dict(zip(free, values, strict=True))})
            if self._agrees(blocks, place):
                agreeing.setdefault(len(blocks), []).append(values)
        for used, combinations in agreeing.items():
            names, rest = self._without_idle(free, combinations)
            for values in rest:
                yield used, tuple(zip(names, values, strict=True))

    def _agrees(self, blocks: tuple[BlockSpec, ...], place: int) -> bool:
        for i, own in enumerate(blocks, start=place):
            theirs = self.spec.blocks[i] if i < len(self.spec.blocks) else None
            if own != theirs:
                self.furthest = max(self.furthest, i)
                self._others.setdefault(i, set()).add(own)
                return False
        self.furthest = max(self.furthest, place + len(blocks))
        return True

    def _without_idle(
        self, names: list[str], combinations: list[tuple[Scalar, ...]]
    ) -> tuple[list[str], list[tuple[Scalar, ...]]]:
        """Leaves a choice open where every value of it agrees with the same values of the others."""
        for name in list(names):
            i = names.index(name)
            fewer = list(dict.fromkeys((*values[:i], *values[i + 1 :]) for values in combinations))
            if len(fewer) * len(self.space.choice(name).values) == len(combinations):
                names, combinations = names[:i] + names[i + 1 :], fewer
        return names, combinations

    def miss(self, *, forbidden: bool) -> Miss:
        """The first block that no candidate has, and what candidates have there."""
        matched, blocks = self.furthest, self.spec.blocks
        others = sorted(filter(None, self._others.get(matched, ())), key=lambda b: b.name)
        if forbidden:
            reason = "the rules forbid the candidates that would be this network"
        elif matched >= len(blocks):
            reason = f"its candidates go on with a block {others[0].name!r}" if others else "its candidates go on"
        else:
            block = blocks[matched]
            same = [other for other in others if other.name == block.name]
            reason = f"no candidate has its block {block.name!r} ({block.kind})"
            if same:
                reason += f": {_difference(block, same)}"
            elif others:
                reason += f" where candidates have {others[0].name!r}"
        return Miss(space=self.space.name, matched=matched, reason=reason)


def _difference(block: BlockSpec, others: list[BlockSpec]) -> str:
    """What sets a block apart from the nearest of others of its name."""
    mine = _facts(block)
    nearest = min((_facts(other) for other in others), key=lambda facts: len(facts.items() ^ mine.items()))
    apart = [name for name in {**mine, **nearest} if mine.get(name) != nearest.get(name)]
    parts = []
    for name in apart[:3]:
        known = sorted({str(_facts(other).get(name, "its default")) for other in others})
        parts.append(f"{name} is {mine.get(name, 'its default')}, there {' or '.join(known)}")
    return "; ".join(parts)


def _facts(block: BlockSpec) -> dict[str, object]:
    shapes = {f"input {name}": "x".join(map(str, shape)) or "one number" for name, shape in block.inputs}
    skip = {} if block.skip is None else {"its skip": block.skip}
    return {"kind": block.kind, **dict(block.settings), **skip, **shapes}


def _completed(space: SearchSpace, choices: dict[str, Scalar]) -> Candidate | None:
    """The first allowed candidate with these choices; those left open take any value that the rules allow."""
    forbidding = {name for rule in space.rules if rule.forbids for name, _ in rule.when}
    first = {c.name: c.values[:1] if c.name not in forbidding else c.values for c in space.choices}
    open_values = [(choices[c.name],) if c.name in choices else first[c.name] for c in space.choices]
    combinations = itertools.islice(itertools.product(*open_values), _COMPLETIONS)
    rows = np.array([[c.index(v) for c, v in zip(space.choices, values, strict=True)] for values in combinations])
    # A choice that a rule makes inactive here, but that the network settled, would be lost in the canonical form.
    kept = [space.column[name] for name in choices]
    settled = space.canonical(rows)
    good = space.allowed(rows) & (settled[:, kept] == rows[:, kept]).all(axis=1)
    return space.from_row(rows[int(np.argmax(good))]) if good.any() else None
