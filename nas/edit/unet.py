"""Edits of a UNet's units, middle and stages, by which the published small UNets come from their teachers.

KOALA (arXiv 2312.04005) and BK-SDM (arXiv 2305.15798) take one unit out of every stage on both sides; SSD-1B (arXiv
2401.02677) and KOALA-700M thin or remove the middle; BK-SDM-Tiny leaves out the innermost stage. The names of blocks
are those of the family `unet`: stage s is `down_blocks.s` and `up_blocks.(stages - 1 - s)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nas.edit.edited import Edit, Edited, rebuilt
from nas.edit.steps import RemoveBlock
from nas.errors import NasError
from nas.families.unet import stage_count
from nas.network import NetworkSpec

MIDDLE = "mid_block."
_PARTS = ("resnets", "attentions")


def units(spec: NetworkSpec, side: str) -> list[int]:
    """The numbers of the residual blocks of one side of a stage ("down_blocks.1")."""
    path = f"{side}.resnets."
    return [int(block.name.removeprefix(path)) for block in spec.blocks if block.name.startswith(path)]


def sides(spec: NetworkSpec, stage: int) -> tuple[str, str]:
    """The module paths of a stage on the way down and on the way up.

    Raises:
        NasError: the network has no such stage.
    """
    count = stage_count(spec)
    if not 0 <= stage < count:
        raise NasError(f"network {spec.name} has {count} UNet stages, so none numbered {stage}")
    return f"down_blocks.{stage}", f"up_blocks.{count - 1 - stage}"


@dataclass(frozen=True, kw_only=True)
class RemoveUnit(Edit):
    """Takes a unit (residual block and transformer) out of a down stage, and one out of the same stage's up side.

    The units that stay on the up side take the outputs that stay, in the same order. With `up_unit` 1 of three, as
    KOALA and BK-SDM have it, every block that stays keeps its shapes.

    Attributes:
        stage: which stage; 0 is the outermost.
        unit: which unit on the way down.
        up_unit: which unit on the way up, in execution order.
    """

    kind: ClassVar[str] = "remove_unit"
    stage: int
    unit: int
    up_unit: int = 1

    @property
    def name(self) -> str:
        """The edit in words."""
        return f"remove unit {self.unit} of stage {self.stage} on the way down and unit {self.up_unit} on the way up"

    def edited(self, spec: NetworkSpec) -> Edited:
        """The network without both units; units after them move up in number."""
        down, up = sides(spec, self.stage)
        for side, unit in ((down, self.unit), (up, self.up_unit)):
            if unit not in units(spec, side):
                raise NasError(f"network {spec.name}: there is no block '{side}.resnets.{unit}' to remove")
            if len(units(spec, side)) == 1:
                raise NasError(f"network {spec.name}: '{side}.resnets.{unit}' is the only unit of {side}")
        gone = {
            f"{side}.{part}.{unit}" for side, unit in ((down, self.unit), (up, self.up_unit)) for part in _PARTS
        } & {block.name for block in spec.blocks}
        names = {**_renumbered(spec, down, self.unit), **_renumbered(spec, up, self.up_unit)}
        return rebuilt(spec, gone=gone, skips=self._skips(spec, up, gone), names=names)

    def _skips(self, spec: NetworkSpec, up: str, gone: set[str]) -> dict[str, str]:
        """Block of the up side -> the output that it takes once one output and one taker are gone."""
        taken = {block.name: block.skip for block in spec.blocks if block.skip is not None}
        here = {name: source for name, source in taken.items() if name.startswith(f"{up}.resnets.")}
        lost = [name for name, source in taken.items() if source in gone]
        removed = f"{up}.resnets.{self.up_unit}"
        if len(lost) != 1 or lost[0] not in here:
            raise NasError(
                f"network {spec.name}: unit {self.unit} of stage {self.stage} cannot be removed, because"
                f" {len(lost)} blocks of {up} take its output as their skip where one should"
            )
        if removed not in here:
            raise NasError(f"network {spec.name}: block {removed!r} takes no skip, so none would be free for the rest")
        sources = [source for name, source in here.items() if name != lost[0]]
        return dict(zip([name for name in here if name != removed], sources, strict=True))


@dataclass(frozen=True, kw_only=True)
class RemoveMiddle(Edit):
    """Takes out the middle: all of it (KOALA-700M, BK-SDM-Small), or all but its first residual block (SSD-1B).

    Attributes:
        keep_first: whether the first residual block stays.
    """

    kind: ClassVar[str] = "remove_middle"
    keep_first: bool = False

    @property
    def name(self) -> str:
        """The edit in words."""
        return "remove the middle" + (" but its first residual block" if self.keep_first else "")

    def edited(self, spec: NetworkSpec) -> Edited:
        """The network without these blocks."""
        first = f"{MIDDLE}resnets.0"
        middle = [block.name for block in spec.blocks if block.name.startswith(MIDDLE)]
        gone = [name for name in middle if not (self.keep_first and name == first)]
        if not gone or (self.keep_first and first not in middle):
            raise NasError(f"network {spec.name}: the middle has {middle or 'no blocks'}, so nothing can be removed")
        found = Edited.nothing(spec)
        for name in gone:
            found = found.then(RemoveBlock(block=name))
        return found


@dataclass(frozen=True, kw_only=True)
class RemoveInnermost(Edit):
    """Takes out the innermost stage on both sides, and the downsampler before it (BK-SDM-Tiny).

    The middle must be gone already. Up stages move down in number.
    """

    kind: ClassVar[str] = "remove_innermost"

    @property
    def name(self) -> str:
        """The edit in words."""
        return "remove the innermost stage"

    def edited(self, spec: NetworkSpec) -> Edited:
        """The network without the stage."""
        count = stage_count(spec)
        if count < 2:
            raise NasError(f"network {spec.name} has {count} UNet stages, so none can be removed")
        if middle := [block.name for block in spec.blocks if block.name.startswith(MIDDLE)]:
            raise NasError(
                f"network {spec.name}: the innermost stage cannot be removed while block {middle[0]!r} stands there",
                hint="remove the middle first",
            )
        paths = (f"down_blocks.{count - 1}.", "up_blocks.0.", f"down_blocks.{count - 2}.downsamplers.")
        gone = {block.name for block in spec.blocks if block.name.startswith(paths)}
        names = {}
        for block in spec.blocks:
            if block.name.startswith("up_blocks.") and block.name not in gone:
                side, stage, rest = block.name.split(".", 2)
                names[block.name] = f"{side}.{int(stage) - 1}.{rest}"
            if block.skip in gone and block.name not in gone:
                raise NasError(
                    f"network {spec.name}: the innermost stage cannot be removed, because block {block.name!r} of"
                    f" another stage skips from {block.skip!r}"
                )
        return rebuilt(spec, gone=gone, names=names)


def _renumbered(spec: NetworkSpec, side: str, unit: int) -> dict[str, str]:
    """Old name -> new name of the blocks of one side that stand in units after `unit`."""
    names = {}
    for block in spec.blocks:
        path, _, number = block.name.rpartition(".")
        if path in [f"{side}.{part}" for part in _PARTS] and int(number) > unit:
            names[block.name] = f"{path}.{int(number) - 1}"
    return names
