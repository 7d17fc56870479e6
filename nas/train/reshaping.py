"""What a stage changes of the student's network: blocks and layers that it loses, an input that it gets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from nas.edit import Edited, SetDepth
from nas.edit.edited import rebuilt
from nas.edit.wiring import changed, checked
from nas.errors import NasError, UsageError, unknown
from nas.network import NetworkSpec

_LAYER = re.compile(r"^(?P<block>.+)\.transformer_blocks\.(?P<first>\d+)(?:-(?P<last>\d+))?$")


def removed(spec: NetworkSpec, names: Sequence[str], where: str) -> Edited:
    """The network without some blocks and transformer layers.

    What stands before a removed block is handed on: to the block after it, and to whoever took its output as a skip.
    Residual blocks behind it are made to fit.

    Args:
        spec: the network before.
        names: blocks ("mid_block.attentions.0"), or layers of a transformer, one or several
            ("up_blocks.0.attentions.1.transformer_blocks.4-9").
        where: what errors call the place that the names come from.

    Raises:
        UsageError: a block or layer that is not there; the nearest is named.
        NasError: without them the network does not fit together.
    """
    known = [block.name for block in spec.blocks]
    layers: dict[str, set[int]] = {}
    gone: list[str] = []
    for name in names:
        matched = _LAYER.match(name)
        block = matched["block"] if matched else name
        if block not in known:
            raise unknown("block", block, known, where=f"{where}: remove")
        if matched is None:
            gone.append(block)
            continue
        first, last = int(matched["first"]), int(matched["last"] or matched["first"])
        layers.setdefault(block, set()).update(range(first, last + 1))
    found = Edited.nothing(spec)
    try:
        for block, lost in layers.items():
            found = found.then(_shallower(found.spec, block, lost, where))
        if not gone:
            return found
        after = rebuilt(found.spec, gone=gone, skips=_skips(found.spec, gone))
    except UsageError:
        raise
    except NasError as error:
        raise NasError(f"{where}: {error.message}", hint=error.hint) from error
    kept = {name: order for name, order in found.kept_layers.items() if name in after.origin}
    return Edited(spec=after.spec, origin=after.origin, kept_layers=kept)


def guided(edited: Edited, width: int, where: str) -> Edited:
    """The network with an input for the embedding of a guidance scale, whose weights are new (Luo et al. 2023, LCM).

    Args:
        edited: the network and where its blocks come from.
        width: of the embedding.
        where: what errors call the place that asks for it.

    Raises:
        UsageError: the network has such an input already, or no time embedding that could take it.
    """
    spec = edited.spec
    if spec.input.guidance_width:
        raise UsageError(f"{where}: the network takes an embedding of the guidance already")
    blocks = [
        changed(block, {"guidance_width": width}, {"guidance": (width,)}) if block.kind == "time_embedding" else block
        for block in spec.blocks
    ]
    if tuple(blocks) == spec.blocks:
        raise UsageError(f"{where}: network {spec.name} has no time embedding that could take the guidance")
    shape = replace(spec.input, guidance_width=width)
    return replace(edited, spec=checked(blocks, shape, spec.name))


def _shallower(spec: NetworkSpec, block: str, lost: set[int], where: str) -> SetDepth:
    settings = dict(next(each for each in spec.blocks if each.name == block).settings)
    depth = int(settings.get("depth", 0))
    strangers = sorted(lost - set(range(depth)))
    if strangers:
        raise UsageError(
            f"{where}: remove names layer {strangers[0]} of {block}, which has {depth or 'no'} transformer layers"
        )
    kept = tuple(layer for layer in range(depth) if layer not in lost)
    if not kept:
        raise UsageError(f"{where}: remove names all layers of {block}", hint=f'remove "{block}" itself')
    return SetDepth(block=block, depth=len(kept), layers=kept)


def _skips(spec: NetworkSpec, gone: Sequence[str]) -> dict[str, str]:
    """Block that took the output of a removed one -> the kept block whose output was handed to that."""
    before: dict[str, str] = {}
    writer = ""
    for block in spec.blocks:
        if block.name in gone:
            before[block.name] = writer
        elif "x" in block.writes:
            writer = block.name
    found = {}
    for block in spec.blocks:
        if block.skip in before and block.name not in gone:
            if not before[block.skip]:
                raise NasError(
                    f"block {block.skip!r} cannot be removed: {block.name!r} takes its output, and nothing"
                    " stands before it"
                )
            found[block.name] = before[block.skip]
    return found
