"""Edits of a network: how a search, or a person, walks from a teacher to a smaller network block by block.

An edit is a small record. Applied to a NetworkSpec it gives another valid one, or an error that names the block and the
reason; it also tells which block of the older network each block of the new one comes from, so that weights can be
handed down (`Edited`; `nas.inherit.inherit` takes its origins and layers). `moves` lists the edits that a network
allows, `walk` applies several and says what each saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nas.cost import Cost
from nas.edit.edited import Edit, Edited
from nas.edit.steps import AddBlock, RemoveBlock, SetDepth, is_step
from nas.edit.unet import RemoveInnermost, RemoveMiddle, RemoveUnit, sides, units
from nas.edit.wiring import check_wiring
from nas.errors import NasError, unknown
from nas.families.unet import stage_count
from nas.network import NetworkSpec

__all__ = [
    "AddBlock",
    "Edit",
    "Edited",
    "RemoveBlock",
    "RemoveInnermost",
    "RemoveMiddle",
    "RemoveUnit",
    "SetDepth",
    "Step",
    "check_wiring",
    "edited",
    "from_json",
    "moves",
    "walk",
]

_KINDS: dict[str, type[Edit]] = {
    edit.kind: edit for edit in (RemoveBlock, AddBlock, SetDepth, RemoveUnit, RemoveMiddle, RemoveInnermost)
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One edit of a walk.

    Attributes:
        edit: what was done.
        edited: the network after it, with origins in the network that the walk began with.
        cost: of that network.
        params_change, macs_change: against the network before this edit; below 0 is a saving.
    """

    edit: Edit
    edited: Edited
    cost: Cost
    params_change: int
    macs_change: int


def edited(spec: NetworkSpec, edits: Iterable[Edit]) -> Edited:
    """A network after several edits in order, with origins in `spec`.

    Raises:
        NasError: an edit is not possible where it stands.
    """
    found = Edited.nothing(spec)
    for edit in edits:
        found = found.then(edit)
    return found


def walk(spec: NetworkSpec, edits: Iterable[Edit], cost: Callable[[NetworkSpec], Cost]) -> tuple[Step, ...]:
    """Applies edits in order and says what each changes.

    Args:
        spec: where the walk begins.
        edits: applied one after the other.
        cost: what a network costs; given from outside, because counting needs torch and an edit does not.

    Raises:
        NasError: an edit is not possible where it stands.
    """
    found, before, steps = Edited.nothing(spec), cost(spec), []
    for edit in edits:
        found = found.then(edit)
        after = cost(found.spec)
        steps.append(
            Step(
                edit=edit,
                edited=found,
                cost=after,
                params_change=after.params - before.params,
                macs_change=after.macs - before.macs,
            )
        )
        before = after
    return tuple(steps)


def moves(spec: NetworkSpec) -> tuple[Edit, ...]:
    """The edits that the network allows.

    Each step left out or doubled, each transformer one layer less or more, each unit with each unit of the same stage's
    up side left out, the middle thinned or left out, the innermost stage left out.
    """
    return tuple(edit for edit in _thinkable(spec) if _allowed(edit, spec))


def from_json(data: Mapping[str, Any]) -> Edit:
    """The edit that `Edit.to_json` gave.

    Raises:
        NasError: no such kind of edit.
    """
    fields = dict(data)
    kind = str(fields.pop("edit", ""))
    if kind not in _KINDS:
        raise unknown("edit", kind, _KINDS)
    return _KINDS[kind].of_json(fields)


def _thinkable(spec: NetworkSpec) -> Iterator[Edit]:
    for block in spec.blocks:
        if is_step(block):
            yield RemoveBlock(block=block.name)
            if block.name.rpartition(".")[2].isdecimal():
                yield AddBlock.copy(spec, block.name)
        if "depth" in dict(block.settings):
            depth = int(block.setting("depth"))
            yield SetDepth(block=block.name, depth=depth + 1)
            if depth > 1:
                yield SetDepth(block=block.name, depth=depth - 1)
    for stage in range(stage_count(spec)):
        down, up = sides(spec, stage)
        yield from (
            RemoveUnit(stage=stage, unit=unit, up_unit=other) for unit in units(spec, down) for other in units(spec, up)
        )
    yield from (RemoveMiddle(keep_first=True), RemoveMiddle(), RemoveInnermost())


def _allowed(edit: Edit, spec: NetworkSpec) -> bool:
    try:
        edit.apply(spec)
    except NasError:
        return False
    return True
