"""Edit and Edited: what every edit of a network answers, and where the blocks of its result come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from nas.edit.wiring import refit
from nas.errors import NasError
from nas.network import NetworkSpec


@dataclass(frozen=True, kw_only=True)
class Edited:
    """A network made by edits from an older one, and what each of its blocks was there.

    Attributes:
        spec: the network.
        origin: block -> the block of the older network that it is, or is a copy of; a block that is new is left out.
        kept_layers: transformer -> for each of its layers the layer of the older transformer that it is, or is a copy
            of; only where they are not simply all of them in order.
    """

    spec: NetworkSpec
    origin: Mapping[str, str]
    kept_layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def nothing(cls, spec: NetworkSpec) -> Edited:
        """The network itself, before any edit."""
        return cls(spec=spec, origin={block.name: block.name for block in spec.blocks})

    def then(self, edit: Edit) -> Edited:
        """One edit more; origins and layers are still those of the oldest network."""
        after = edit.edited(self.spec)
        origin = {new: self.origin[old] for new, old in after.origin.items() if old in self.origin}
        layers: dict[str, tuple[int, ...]] = {}
        for new in origin:
            before, here = self.kept_layers.get(after.origin[new]), after.kept_layers.get(new)
            if before is not None and here is not None:
                layers[new] = tuple(before[i] for i in here)
            elif before is not None or here is not None:
                layers[new] = before or here or ()
        return Edited(spec=after.spec, origin=origin, kept_layers=layers)


@dataclass(frozen=True, kw_only=True)
class Edit(ABC):
    """One change of a network; a kind of edit is a subclass with its own fields.

    Attributes:
        kind: the word by which JSON names the subclass.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def name(self) -> str:
        """The edit in words ("remove mid_block.attentions.0")."""

    @abstractmethod
    def edited(self, spec: NetworkSpec) -> Edited:
        """The changed network and where its blocks come from.

        Raises:
            NasError: the network does not allow it; names the block and why.
        """

    def apply(self, spec: NetworkSpec) -> NetworkSpec:
        """The changed network alone; raises as `edited` does."""
        return self.edited(spec).spec

    def invert(self, spec: NetworkSpec) -> Edit:
        """The edit that leads from the changed network back to `spec`, the network before this edit.

        Raises:
            NasError: no single edit does.
        """
        raise NasError(
            f"no single edit undoes {self.name!r} on network {spec.name}", hint="keep the network from before the edit"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data; `nas.edit.from_json` reads it back equal."""
        return {"edit": self.kind, **asdict(self)}

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Edit:
        """The edit from its fields as JSON has them; lists become tuples."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


def rebuilt(
    spec: NetworkSpec,
    *,
    gone: Collection[str] = (),
    skips: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
) -> Edited:
    """The network without some blocks, its residual blocks made to fit.

    Args:
        spec: the network before.
        gone: blocks that are left out.
        skips: block -> the block from which it now takes its skip.
        names: block -> its new name.
    """
    skips, names = skips or {}, names or {}
    blocks, origin = [], {}
    for block in spec.blocks:
        if block.name in gone:
            continue
        source = skips.get(block.name, block.skip)
        new = names.get(block.name, block.name)
        blocks.append(replace(block, name=new, skip=None if source is None else names.get(source, source)))
        origin[new] = block.name
    return Edited(spec=refit(blocks, spec.input, spec.name), origin=origin)
