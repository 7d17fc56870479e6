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
INPUTS = ("x", "skip", "temb", "text", "pooled", "size_ids", "timestep", "guidance")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSpec:
    """The one unit that is built, traced, measured and priced.

    Attributes:
        name: its place in the network as a diffusers module path ("down_blocks.0.resnets.1").
        kind: the file in nas/blocks/ that builds it.
        settings: the block's own settings, sorted by name.
        inputs: the tensors it takes, in the order of `INPUTS`, with their shapes without batch: "x" (C, H, W) or
            (L, C) as tokens, "skip" concatenated after x on channels, "temb" (E,), "text" (T, D), "pooled" (P,) a
            summary of the text, "size_ids" (n,) sizes of the image, "timestep" (), "guidance" (G,) an embedding of the
            guidance scale.
        skip: the earlier block whose output is the input "skip".
        writes: which of these tensors its output becomes for the blocks after it; several where it gives a tuple.
    """

    name: str
    kind: str
    settings: tuple[tuple[str, Scalar], ...]
    inputs: tuple[tuple[str, Shape], ...]
    skip: str | None = None
    writes: tuple[str, ...] = ("x",)

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
            "writes": list(self.writes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BlockSpec:
        """The inverse of `to_json`; reads the files of 0.1 too, where only the time embedding wrote anything but x."""
        old = ("temb",) if data["kind"] == "time_embedding" else ("x",)
        writes = tuple(data.get("writes", old))
        return block(
            data["name"], data["kind"], data["inputs"], skip=data.get("skip"), writes=writes, **data["settings"]
        )


def _input_rank(name: str) -> tuple[int, str]:
    """Inputs in the order in which a block takes them; unknown ones last, by name."""
    return (INPUTS.index(name) if name in INPUTS else len(INPUTS), name)


def block(
    name: str,
    kind: str,
    inputs: Mapping[str, Any],
    *,
    skip: str | None = None,
    writes: tuple[str, ...] = ("x",),
    **settings: Scalar,
) -> BlockSpec:
    """A BlockSpec from plain mappings; their order does not matter, so a spec survives any JSON writer."""
    return BlockSpec(
        name=name,
        kind=kind,
        settings=tuple(sorted(settings.items())),
        inputs=tuple((key, tuple(inputs[key])) for key in sorted(inputs, key=_input_rank)),
        skip=skip,
        writes=writes,
    )


_OPTIONAL = ("pooled_width", "size_ids", "guidance_width")


@dataclass(frozen=True, kw_only=True, slots=True)
class InputShape:
    """What the network is called with: a latent [B, C, H, W] and text [B, T, D] (T = 0: no text).

    Attributes:
        pooled_width: P of one vector [B, P] that summarises the text, as SDXL takes; 0 for none.
        size_ids: n of the sizes [B, n] of the wanted image that condition the network (SDXL: 6); 0 for none.
        guidance_width: G of the embedding [B, G] of the guidance scale that a consistency model takes; 0 for none.
    """

    channels: int
    height: int
    width: int
    text_tokens: int = 0
    text_width: int = 0
    pooled_width: int = 0
    size_ids: int = 0
    guidance_width: int = 0

    def to_json(self) -> dict[str, int]:
        """Plain data; what a network of 0.1 did not know is told only where it is there."""
        return {k: v for k, v in asdict(self).items() if v or k not in _OPTIONAL}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The same structure at another size: what proxy networks and small measured networks are.

    Widths are divided by `width_divisor` (and must stay multiples of head width and norm groups); depths, unit counts
    and block kinds are kept; heads keep their number because head width shrinks with the widths. Conditions other than
    time and text are left out.
    """

    width_divisor: int
    head_width: int
    norm_groups: int
    latent_channels: int
    height: int
    width: int
    text_tokens: int
    text_width: int

    @property
    def input(self) -> InputShape:
        """What the scaled network is called with."""
        return InputShape(
            channels=self.latent_channels,
            height=self.height,
            width=self.width,
            text_tokens=self.text_tokens,
            text_width=self.text_width,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSpec:
    """A network as its blocks in execution order.

    A block reads the tensors that it names and writes those of its `writes`: most map x to x, a time embedding turns
    the timestep into `temb`. A block whose name is another's `skip` has its output kept until that other has run.
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
        return short_hash(json.dumps([self.input.to_json(), wiring], sort_keys=True))

    @property
    def inputs(self) -> dict[str, Shape]:
        """What the network must be given, in the order of `INPUTS`, with shapes without batch.

        "x" is the latent; the others are there if a block reads them before one has written them.
        """
        shape = self.input
        shapes: dict[str, Shape] = {
            "x": (shape.channels, shape.height, shape.width),
            "text": (shape.text_tokens, shape.text_width),
            "pooled": (shape.pooled_width,),
            "size_ids": (shape.size_ids,),
            "timestep": (),
            "guidance": (shape.guidance_width,),
        }
        read, written = {"x"}, {"skip"}
        for spec in self.blocks:
            read |= {name for name, _ in spec.inputs if name not in written}
            written |= set(spec.writes)
        return {name: shapes[name] for name in INPUTS if name in read}

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back equal."""
        return {"name": self.name, "input": self.input.to_json(), "blocks": [b.to_json() for b in self.blocks]}

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
