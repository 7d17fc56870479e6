"""BlockSpec and NetworkSpec: a network as ordered, torch-free records of blocks and their wiring."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nas.errors import NasError

Scalar = bool | int | float | str
Shape = tuple[int, ...]
INPUTS = ("x", "skip", "temb", "text", "timestep")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpec:
    """The one unit that is built, traced, measured and priced.

    Attributes:
        name: its place in the network as a diffusers module path ("down_blocks.0.resnets.1").
        kind: the file in nas/blocks/ that builds it.
        settings: the block's own settings, sorted by name.
        inputs: the tensors it takes, in the order of `INPUTS`, with their shapes without batch: "x" (C, H, W), "skip"
            (C, H, W) concatenated after x on channels, "temb" (E,), "text" (T, D), "timestep" ().
        skip: the earlier block whose output is the input "skip".
    """

    name: str
    kind: str
    settings: tuple[tuple[str, Scalar], ...]
    inputs: tuple[tuple[str, Shape], ...]
    skip: str | None = None

    @property
    def signature(self) -> tuple[str, tuple[tuple[str, Scalar], ...], tuple[tuple[str, Shape], ...]]:
        """What decides its parameters, operators and cost; where it stands in the network does not."""
        return (self.kind, self.settings, self.inputs)

    @property
    def key(self) -> str:
        """A short stable hash of the signature."""
        return short_hash(json.dumps(self.signature))

    def setting(self, name: str) -> Scalar:
        """The setting `name`; KeyError if the block has none of that name."""
        return dict(self.settings)[name]

    def input(self, name: str) -> Shape:
        """The shape of the input `name`, without batch."""
        return dict(self.inputs)[name]

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back equal."""
        return {
            "name": self.name,
            "kind": self.kind,
            "settings": dict(self.settings),
            "inputs": {name: list(shape) for name, shape in self.inputs},
            "skip": self.skip,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BlockSpec:
        """The inverse of `to_json`."""
        return block(data["name"], data["kind"], data["inputs"], skip=data.get("skip"), **data["settings"])


def _input_rank(name: str) -> tuple[int, str]:
    """Inputs in the order in which a block takes them; unknown ones last, by name."""
    return (INPUTS.index(name) if name in INPUTS else len(INPUTS), name)


def block(name: str, kind: str, inputs: Mapping[str, Any], *, skip: str | None = None, **settings: Scalar) -> BlockSpec:
    """A BlockSpec from plain mappings; their order does not matter, so a spec survives any JSON writer."""
    return BlockSpec(
        name=name,
        kind=kind,
        settings=tuple(sorted(settings.items())),
        inputs=tuple((key, tuple(inputs[key])) for key in sorted(inputs, key=_input_rank)),
        skip=skip,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class InputShape:
    """What the network is called with: a latent [B, C, H, W] and text [B, T, D]."""

    channels: int
    height: int
    width: int
    text_tokens: int
    text_width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSpec:
    """A network as its blocks in execution order.

    The block of kind "time_embedding" turns the timestep into `temb`; every other block maps x to x. A block whose
    name is another's `skip` has its output kept until that other has run.
    """

    name: str
    input: InputShape
    blocks: tuple[BlockSpec, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for spec in self.blocks:
            if spec.name in seen:
                raise NasError(f"network {self.name}: two blocks are named {spec.name!r}")
            if spec.skip is not None and spec.skip not in seen:
                raise NasError(
                    f"network {self.name}: block {spec.name!r} skips from {spec.skip!r}, which is not before it"
                )
            seen.add(spec.name)

    @property
    def key(self) -> str:
        """A short stable hash of everything but the names; a skip counts by the place of the block it comes from."""
        place = {b.name: i for i, b in enumerate(self.blocks)}
        wiring = [(b.signature, None if b.skip is None else place[b.skip]) for b in self.blocks]
        return short_hash(json.dumps([asdict(self.input), wiring], sort_keys=True))

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back equal."""
        return {"name": self.name, "input": asdict(self.input), "blocks": [b.to_json() for b in self.blocks]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NetworkSpec:
        """The inverse of `to_json`."""
        return cls(
            name=data["name"],
            input=InputShape(**data["input"]),
            blocks=tuple(BlockSpec.from_json(b) for b in data["blocks"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """A place in a family's networks whose blocks depend on a few choices only.

    A network is the concatenation of its positions' blocks, so a candidate is priced by looking each position up in
    a table over the values of `depends` (DESIGN: building a network to price it happens once per distinct block).

    Attributes:
        name: the place ("down.1").
        depends: the choices that `blocks` may read; it is given no others.
        blocks: choice values -> the blocks there, possibly none.
    """

    name: str
    depends: tuple[str, ...]
    blocks: Callable[[Mapping[str, Scalar]], tuple[BlockSpec, ...]]


def short_hash(text: str) -> str:
    """Twelve hex digits of SHA-256: short enough to type, long enough not to collide in a study."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
