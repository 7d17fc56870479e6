"""Units: a network's stages, one by one, rebuilt to stand in the parent's place and between the parent's neighbours.

A unit is what a UNet has in one place: the stem; the residual blocks and transformers of a stage on the way down or
up, or of the middle; and with the last of them the head. Samplers and time embedding are the parent's. The unit's first
block takes the parent's widths
(of x, the skips and the time embedding) as they come, so no adapter stands before it; behind it stands a trained 1x1
convolution to the parent's width. Legend: B rows, C channels, H W height and width, T text tokens, D text width, E time
embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from nas.build import Network, build_block
from nas.errors import NasError
from nas.families.unet import stage_count
from nas.network import BlockSpec, NetworkSpec, Shape

_PATH: Final = re.compile(r"^(?:(down|up)_blocks\.(\d+)|(mid)_block)\.(?:resnets|attentions)\.\d+$")
_ENDS: Final = {"stem": "stem", "head": "up.0"}
_RIDGE: Final = 1e-4  # of the mean square: the adapter's start is solved for from few rows


def places(spec: NetworkSpec) -> dict[str, tuple[BlockSpec, ...]]:
    """A UNet's units by place, in execution order: "down.0" is the way down in the stage of the highest resolution.

    The head belongs to "up.0": only what it makes of them tells whether that stage's channels are enough.

    Raises:
        NasError: the network is no UNet.
    """
    found: dict[str, tuple[BlockSpec, ...]] = {}
    for block in spec.blocks:
        place = _ENDS.get(block.kind)
        match = _PATH.match(block.name)
        if match is not None:
            way, number, middle = match.groups()
            stage = stage_count(spec) - 1 - int(number) if way == "up" else number
            place = middle or f"{way}.{stage}"
        if place is not None:
            found[place] = (*found.get(place, ()), block)
    if not {"stem", "down.0", "up.0"} <= set(found):
        raise NasError(
            f"network {spec.name} is no UNet: there are no stages to judge one by one", hint="another --proxy"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Socket:
    """A place in the parent, as a unit meets it.

    Attributes:
        place: its name.
        x: shape of what comes in.
        skips: shapes of the skips that the parent's unit reads, in its order; () on the way down.
        time_width: of the parent's time embedding; 0 where the parent's unit reads none.
        out: channels of what goes out.
        last: the parent's block whose output a unit's replaces.
    """

    place: str
    x: Shape
    skips: tuple[Shape, ...]
    time_width: int
    out: int
    last: str


def socket(place: str, blocks: Sequence[BlockSpec]) -> Socket:
    """The place of a unit of the parent."""
    first = blocks[0]
    return Socket(
        place=place,
        x=first.input("x"),
        skips=tuple(block.input("skip") for block in blocks if block.skip is not None),
        time_width=max(dict(block.inputs).get("temb", (0,))[0] for block in blocks),
        out=_behind(blocks, first.input("x")[0]),
        last=blocks[-1].name,
    )


def _behind(blocks: Sequence[BlockSpec], width: int) -> int:
    """Channels behind some blocks, given those before them."""
    for block in blocks:
        width = int(dict(block.settings).get("out_channels", width))
    return width


def fitted(blocks: Sequence[BlockSpec], at: Socket) -> tuple[tuple[BlockSpec, int | None], ...]:
    """A candidate's unit, rebuilt for a place of the parent: its blocks, each with the number of the skip it reads.

    Where it reads more or fewer skips than the parent's unit, first and last stay such and those between are spread.
    """
    wanted = sum(block.skip is not None for block in blocks)
    taken, width = 0, at.x[0]
    found: list[tuple[BlockSpec, int | None]] = []
    for block in blocks:
        _, height, wide = at.x
        inputs: dict[str, Any] = {**dict(block.inputs), "x": (width, height, wide)}
        settings: dict[str, Any] = dict(block.settings)
        number = None
        if "temb" in inputs:
            inputs["temb"], settings["time_width"] = (at.time_width,), at.time_width
        if "in_channels" in settings:
            settings["in_channels"] = width
        if block.skip is not None:
            number = _spread(taken, wanted, len(at.skips))
            taken += 1
            inputs["skip"] = at.skips[number]
            settings["in_channels"] += at.skips[number][0]
        width = _behind([block], width)
        fitting = replace(
            block,
            name=f"{at.place}.{len(found)}",
            skip=None,
            inputs=tuple((name, tuple(inputs[name])) for name, _ in block.inputs),
            settings=tuple(sorted(settings.items())),
        )
        found.append((fitting, number))
    return tuple(found)


def _spread(index: int, ours: int, theirs: int) -> int:
    return theirs - 1 if index == ours - 1 else round(index * (theirs - 1) / (ours - 1))


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the parent gives a place, and what it makes of it.

    Attributes:
        tensors: x [B, C, H, W], temb [B, E] and text [B, T, D] by name.
        skips: [B, C, H, W] each.
        output: of the parent's unit [B, C, H, W].
    """

    tensors: Mapping[str, Tensor]
    skips: tuple[Tensor, ...]
    output: Tensor


class Unit(nn.Module):
    """A fitted unit and its adapter.

    Args:
        blocks: as of `fitted`; none at all is a place that the candidate leaves out, of which the adapter remains.
        at: where it stands.
    """

    def __init__(self, blocks: Sequence[tuple[BlockSpec, int | None]], at: Socket) -> None:
        super().__init__()
        self.names = [tuple(name for name, _ in block.inputs if name not in ("x", "skip")) for block, _ in blocks]
        self.skips = [number for _, number in blocks]
        self.blocks = nn.ModuleList([build_block(block) for block, _ in blocks])
        self.adapter = nn.Linear(_behind([block for block, _ in blocks], at.x[0]), at.out)

    def before(self, given: Given) -> Tensor:
        """What the adapter sees [B, C, H, W]."""
        x = given.tensors["x"]
        for block, names, skip in zip(self.blocks, self.names, self.skips, strict=True):
            more = {name: given.tensors[name] for name in names}
            if skip is not None:
                more["skip"] = given.skips[skip]
            x = block(x=x, **more)
        return x

    def forward(self, given: Given) -> Tensor:
        """What stands for the parent's output [B, C, H, W]."""
        output: Tensor = self.adapter(self.before(given).movedim(1, -1))
        return output.movedim(-1, 1).contiguous()

    @torch.no_grad()
    def fit_adapter(self, rows: Sequence[Given]) -> None:
        """Solves for the adapter that, on these rows, comes nearest to the parent's output (ridge regression)."""
        seen = torch.cat([_pixels(self.before(each)) for each in rows]).double()
        wanted = torch.cat([_pixels(each.output) for each in rows]).double()
        centre, level = seen.mean(0), wanted.mean(0)
        seen = seen - centre
        square = seen.T @ seen
        square.diagonal().add_(_RIDGE * square.diagonal().mean() + 1e-12)
        weight = torch.linalg.solve(square, seen.T @ (wanted - level)).T
        self.adapter.weight.copy_(weight)
        self.adapter.bias.copy_(level - weight @ centre)


def _pixels(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B H W, C]."""
    return x.movedim(1, -1).flatten(0, -2)


@dataclass
class Passage:
    """A network's call, halted between two blocks."""

    tensors: dict[str, Tensor]
    kept: dict[str, Tensor]

    def copy(self) -> Passage:
        """One that goes on by itself."""
        return Passage(tensors=dict(self.tensors), kept=dict(self.kept))

    def advance(self, network: Network, blocks: Sequence[BlockSpec]) -> Tensor:
        """Goes on through some of the network's blocks; x behind them."""
        for block in blocks:
            if block.skip is not None:
                self.tensors["skip"] = self.kept[block.skip]
            outputs = network.get_submodule(block.name)(**{name: self.tensors[name] for name, _ in block.inputs})
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            self.tensors.update(zip(block.writes, outputs, strict=True))
            self.kept[block.name] = outputs[0]
        return self.tensors["x"]
