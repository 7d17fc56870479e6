"""Edits of single blocks: take one out, put one in, change how many layers a transformer has.

A block that gives what it was given in the same shape is a step: without it the network still fits together, and what
remains in its place is the identity, as where SnapFusion (arXiv 2306.00980) skips a block. The same paper's search adds
steps too: here a copy of a neighbour.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from nas.edit.edited import Edit, Edited, rebuilt
from nas.edit.wiring import STEPS, changed, checked, gives
from nas.errors import NasError, unknown
from nas.network import BlockSpec, NetworkSpec


def find(spec: NetworkSpec, name: str) -> int:
    """The place of a block in the order of the network.

    Raises:
        NasError: the network has no such block.
    """
    names = [block.name for block in spec.blocks]
    if name not in names:
        raise unknown("block", name, names, where=f"network {spec.name}")
    return names.index(name)


def is_step(block: BlockSpec) -> bool:
    """Whether the network still fits together without the block, or with a copy of it after it."""
    return not _why_no_step(block)


def _why_no_step(block: BlockSpec) -> str:
    if block.kind not in STEPS or block.writes != ("x",):
        return f"a {block.kind} block is no step that can be left out or doubled"
    if block.skip is not None:
        return f"it takes the skip of {block.skip!r}"
    given, (made,) = block.input("x"), gives(block)
    return "" if made == given else f"it makes {made} of {given}, so its place cannot be an identity"


def takers(spec: NetworkSpec, name: str) -> tuple[str, ...]:
    """The blocks that take the output of `name` as their skip."""
    return tuple(block.name for block in spec.blocks if block.skip == name)


@dataclass(frozen=True, kw_only=True)
class RemoveBlock(Edit):
    """Takes out a step: a transformer, or a residual block without shortcut and skip.

    Where a later block skips from it, the skip now comes from the block before it: what the removed one was given.
    """

    kind: ClassVar[str] = "remove_block"
    block: str

    @property
    def name(self) -> str:
        """The edit in words."""
        return f"remove {self.block}"

    def edited(self, spec: NetworkSpec) -> Edited:
        """The network without the block."""
        before = self._before(spec)
        return rebuilt(spec, gone={self.block}, skips=dict.fromkeys(takers(spec, self.block), before))

    def invert(self, spec: NetworkSpec) -> AddBlock:
        """Puts the block back, with the skips that were taken from it."""
        block = spec.blocks[find(spec, self.block)]
        return AddBlock(after=self._before(spec), block=block, skip_for=takers(spec, self.block))

    def _before(self, spec: NetworkSpec) -> str:
        place = find(spec, self.block)
        if reason := _why_no_step(spec.blocks[place]):
            raise NasError(f"network {spec.name}: block {self.block!r} cannot be removed: {reason}")
        return _writer(spec, place)


@dataclass(frozen=True, kw_only=True)
class AddBlock(Edit):
    """Puts in a step after another block.

    Attributes:
        after: the block whose output it is given.
        block: the new block.
        like: the block whose weights it takes over; None: its weights are new.
        skip_for: blocks that took their skip from `after` and now take it from the new block.
    """

    kind: ClassVar[str] = "add_block"
    after: str
    block: BlockSpec
    like: str | None = None
    skip_for: tuple[str, ...] = ()

    @classmethod
    def copy(cls, spec: NetworkSpec, like: str) -> AddBlock:
        """A second block like `like` right after it, under the next free number; skips then come from the new one."""
        block = spec.blocks[find(spec, like)]
        path, _, number = like.rpartition(".")
        taken = [b.name.rpartition(".")[2] for b in spec.blocks if b.name.rpartition(".")[0] == path]
        if not number.isdecimal():
            raise NasError(f"network {spec.name}: block {like!r} has no number, so a copy of it has no name")
        name = f"{path}.{1 + max(int(n) for n in taken if n.isdecimal())}"
        return cls(after=like, block=replace(block, name=name), like=like, skip_for=takers(spec, like))

    @property
    def name(self) -> str:
        """The edit in words."""
        return f"add {self.block.name} after {self.after}" + (f" as a copy of {self.like}" if self.like else "")

    def edited(self, spec: NetworkSpec) -> Edited:
        """The network with the block."""
        place = find(spec, self.after)
        if reason := _why_no_step(self.block):
            raise NasError(f"network {spec.name}: block {self.block.name!r} cannot be added: {reason}")
        if strangers := set(self.skip_for) - set(takers(spec, self.after)):
            raise NasError(f"network {spec.name}: {sorted(strangers)} take no skip from block {self.after!r}")
        if "x" not in spec.blocks[place].writes:
            raise NasError(f"network {spec.name}: nothing can be added after {self.after!r}: it does not write x")
        origin = {block.name: block.name for block in spec.blocks}
        if self.like is not None:
            twin = spec.blocks[find(spec, self.like)]
            if twin.signature != self.block.signature:
                raise NasError(
                    f"network {spec.name}: block {self.block.name!r} cannot be a copy of {self.like!r}, which differs"
                )
            origin[self.block.name] = self.like
        blocks = [replace(b, skip=self.block.name) if b.name in self.skip_for else b for b in spec.blocks]
        # What does not touch x, such as the time embedding after the stem, still comes first.
        place = next(i for i in range(place + 1, len(blocks) + 1) if i == len(blocks) or "x" in dict(blocks[i].inputs))
        blocks.insert(place, self.block)
        return Edited(spec=checked(blocks, spec.input, spec.name), origin=origin)

    def invert(self, spec: NetworkSpec) -> RemoveBlock:
        """Takes the block out again."""
        return RemoveBlock(block=self.block.name)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "edit": self.kind,
            "after": self.after,
            "block": self.block.to_json(),
            "like": self.like,
            "skip_for": list(self.skip_for),
        }

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> AddBlock:
        """The inverse of `to_json`."""
        return cls(**{**data, "block": BlockSpec.from_json(data["block"]), "skip_for": tuple(data["skip_for"])})


@dataclass(frozen=True, kw_only=True)
class SetDepth(Edit):
    """Gives a transformer another number of layers.

    Attributes:
        block: the transformer.
        depth: how many layers it has afterwards.
        layers: which of the present layers these are, repeats allowed; None: the first ones, and where there are more
            than before, copies of the last. KOALA (arXiv 2312.04005, appendix B.1) finds the first ones best.
    """

    kind: ClassVar[str] = "set_depth"
    block: str
    depth: int
    layers: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """The edit in words."""
        which = "" if self.layers is None else f" ({', '.join(map(str, self.layers))})"
        return f"{self.depth} layer{'s' * (self.depth != 1)} in {self.block}{which}"

    def edited(self, spec: NetworkSpec) -> Edited:
        """The network with the other depth."""
        place, depth = find(spec, self.block), self._depth(spec)
        layers = self.layers if self.layers is not None else tuple(min(i, depth - 1) for i in range(self.depth))
        place_name = f"network {spec.name}: block {self.block!r}"
        if len(layers) != self.depth or not layers:
            raise NasError(f"{place_name} cannot have {self.depth} layers of which {len(layers)} are named")
        if not all(0 <= layer < depth for layer in layers):
            raise NasError(f"{place_name} has layers 0 to {depth - 1}, so it cannot keep {layers}")
        if layers == tuple(range(depth)):
            raise NasError(f"{place_name} has these {depth} layers already")
        blocks = list(spec.blocks)
        blocks[place] = changed(blocks[place], {"depth": self.depth})
        return Edited(
            spec=checked(blocks, spec.input, spec.name),
            origin={block.name: block.name for block in blocks},
            kept_layers={self.block: layers},
        )

    def invert(self, spec: NetworkSpec) -> SetDepth:
        """Gives back the number of layers; the weights of those that were dropped are not theirs again."""
        return SetDepth(block=self.block, depth=self._depth(spec))

    def _depth(self, spec: NetworkSpec) -> int:
        block = spec.blocks[find(spec, self.block)]
        if "depth" not in dict(block.settings):
            raise NasError(f"network {spec.name}: block {self.block!r} of kind {block.kind!r} has no layers to count")
        return int(block.setting("depth"))


def _writer(spec: NetworkSpec, place: int) -> str:
    """The block whose output is x where the block at `place` stands."""
    for block in reversed(spec.blocks[:place]):
        if "x" in block.writes:
            return block.name
    raise NasError(f"network {spec.name}: no block stands before {spec.blocks[place].name!r}")
