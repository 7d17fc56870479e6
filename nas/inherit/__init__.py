"""Starting a smaller network from the weights of a larger one: which block from which, and which channels.

Blocks are matched by the published maps (`plan`). Where a tensor of the student is narrower, the same channels are
kept in every tensor that has them (`nas.inherit.axes`, `nas.inherit.choose`). What has no counterpart (another kind of
block, a wider tensor, text of another encoder) is newly initialised, and the report says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from nas.build import Network, build, build_block
from nas.errors import NasError, unknown
from nas.inherit.axes import Axes, axes
from nas.inherit.choose import WIDTHS, Chooser
from nas.inherit.mapping import plan
from nas.network import BlockSpec, NetworkSpec

__all__ = ["WIDTHS", "BlockReport", "Report", "inherit", "plan"]

COPIED: Final = "copied"
SLICED: Final = "sliced"
NEW: Final = "new"
_LAYER: Final = re.compile(r"^(transformer_blocks\.)(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """What became of one block.

    Attributes:
        name: the student's block.
        source: the teacher's block that it starts from, None if there is none or it is of another kind.
        tensors: how many were copied, sliced, new.
        params: likewise in parameters.
    """

    name: str
    source: str | None
    tensors: Mapping[str, int]
    params: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a network inherited, block by block.

    Attributes:
        blocks: in execution order; blocks without parameters are left out.
        widths: how channels were chosen, "first" or "l1".
    """

    blocks: tuple[BlockReport, ...]
    widths: str

    def tensors(self, what: str) -> int:
        """Tensors that were "copied", "sliced" or are "new"."""
        return sum(block.tensors[what] for block in self.blocks)

    def params(self, what: str) -> int:
        """Parameters likewise."""
        return sum(block.params[what] for block in self.blocks)

    @property
    def new_blocks(self) -> tuple[str, ...]:
        """The blocks of which nothing was inherited."""
        return tuple(b.name for b in self.blocks if not b.tensors[COPIED] and not b.tensors[SLICED])

    @property
    def moved_blocks(self) -> tuple[tuple[str, str], ...]:
        """The blocks that start from a block of another name, with it."""
        return tuple((b.name, b.source) for b in self.blocks if b.source is not None and b.source != b.name)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        totals = {what: {"tensors": self.tensors(what), "params": self.params(what)} for what in (COPIED, SLICED, NEW)}
        return {
            "widths": self.widths,
            **totals,
            "new_blocks": list(self.new_blocks),
            "blocks": [asdict(block) for block in self.blocks],
        }


def inherit(
    student: NetworkSpec,
    teacher: NetworkSpec,
    state: Mapping[str, Tensor],
    *,
    widths: str = "first",
    seed: int = 0,
    origin: Mapping[str, str] | None = None,
    kept_layers: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[dict[str, Tensor], Report]:
    """The weights that a network starts from, under our own names, and what each of them is.

    Args:
        student: the network to start.
        teacher: the network that `state` is of.
        state: its tensors; new tensors of the student have their precision.
        widths: which channels a narrower tensor keeps: "first" (the leading ones) or "l1" (the largest weights).
        seed: of what is newly initialised.
        origin: the teacher's block that each of the student's starts from, where edits tell it
            (`nas.edit.Edited.origin`); None takes the published maps of `plan`. A block that it leaves out is new.
        kept_layers: transformer -> the teacher's layer that each of its layers starts from; others keep the first.

    Returns:
        The state, none of whose tensors is one of `state`, and the report.

    Raises:
        UsageError: unknown `widths`.
        NasError: `state` is not of `teacher`.
    """
    if widths not in WIDTHS:
        raise unknown("way to choose channels", widths, WIDTHS)
    _check(teacher, state)
    ours, theirs = axes(student), axes(teacher)
    groups = _norm_groups(student) | _norm_groups(teacher)
    chooser = Chooser(widths, theirs, state, groups.pop() if len(groups) == 1 else 1)
    sources: Mapping[str, str | None] = plan(student, teacher) if origin is None else origin
    by_name = {block.name: block for block in teacher.blocks}
    empty = build(student, "meta")
    shapes = _by_block(empty)
    dtype = next((tensor.dtype for tensor in state.values() if tensor.is_floating_point()), torch.float32)
    found: dict[str, Tensor] = {}
    reports = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in student.blocks:
            source = sources.get(block.name)
            if source is not None and source not in by_name:
                raise unknown("block", source, by_name, where=f"network {teacher.name}")
            if source is not None and by_name[source].kind != block.kind:
                source = None
            taken: dict[str, tuple[str, Tensor]] = {}
            if source is not None:
                axis_pair = ours.get(block.name, {}), theirs.get(source, {})
                layers = (kept_layers or {}).get(block.name)
                taken = _take(shapes[block.name], source, state, axis_pair, chooser, layers)
            if shapes[block.name]:
                reports.append(_report(block.name, source, shapes[block.name], taken))
            found |= _complete(block, shapes[block.name], taken, dtype)
    return {name: found[name] for name in empty.state_dict()}, Report(blocks=tuple(reports), widths=widths)


def _check(teacher: NetworkSpec, state: Mapping[str, Tensor]) -> None:
    for name, tensor in build(teacher, "meta").state_dict().items():
        if name not in state or state[name].shape != tensor.shape:
            got = "nothing" if name not in state else f"shape {tuple(state[name].shape)}"
            raise NasError(
                f"the weights are not of network {teacher.name}: {name} has {got}, not {tuple(tensor.shape)}"
            )


def _norm_groups(spec: NetworkSpec) -> set[int]:
    settings = (dict(block.settings) for block in spec.blocks)
    return {int(found["norm_groups"]) for found in settings if "norm_groups" in found}


def _by_block(network: Network) -> dict[str, dict[str, torch.Size]]:
    """The shapes of every block's tensors, by their names below the block."""
    modules = {block.name: network.get_submodule(block.name) for block in network.spec.blocks}
    return {name: {key: t.shape for key, t in module.state_dict().items()} for name, module in modules.items()}


def _take(
    shapes: Mapping[str, torch.Size],
    source: str,
    state: Mapping[str, Tensor],
    axis_pair: tuple[Axes, Axes],
    chooser: Chooser,
    layers: tuple[int, ...] | None,
) -> dict[str, tuple[str, Tensor]]:
    """The tensors that can be had from the teacher's block, each with how."""
    taken = {}
    for name, shape in shapes.items():
        there = name if layers is None else _LAYER.sub(lambda match: f"{match[1]}{layers[int(match[2])]}.", name)
        tensor = state.get(f"{source}.{there}")
        if tensor is None:
            continue
        tensor = _as_convolution(tensor, shape)
        ours, theirs = axis_pair[0].get(name), axis_pair[1].get(there)
        if ours is None or theirs is None:
            if tensor.shape == shape:
                taken[name] = (COPIED, tensor.clone())
            continue
        sliced = tensor
        for axis, (wanted, given) in enumerate(zip(ours, theirs, strict=True)):
            index = chooser.index(wanted, given)
            if index is None:
                break
            if not torch.equal(index, torch.arange(tensor.shape[axis])):
                sliced = sliced.index_select(axis, index.to(tensor.device))
        else:
            if sliced.shape == shape:
                taken[name] = (COPIED, tensor.clone()) if sliced is tensor else (SLICED, sliced.clone())
    return taken


def _as_convolution(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A linear layer's weight as that of a 1x1 convolution or back, where the student has the other."""
    if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) and len(shape) == 2:
        return tensor[:, :, 0, 0]
    if tensor.ndim == 2 and len(shape) == 4 and shape[2:] == (1, 1):
        return tensor[:, :, None, None]
    return tensor


def _complete(
    block: BlockSpec, shapes: Mapping[str, torch.Size], taken: Mapping[str, tuple[str, Tensor]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """A block's tensors: those taken, and torch's default initialisation for the others."""
    fresh = build_block(block).state_dict() if len(taken) < len(shapes) else {}
    return {
        f"{block.name}.{name}": taken[name][1].contiguous() if name in taken else fresh[name].to(dtype)
        for name in shapes
    }


def _report(
    name: str, source: str | None, shapes: Mapping[str, torch.Size], taken: Mapping[str, tuple[str, Tensor]]
) -> BlockReport:
    tensors, params = dict.fromkeys((COPIED, SLICED, NEW), 0), dict.fromkeys((COPIED, SLICED, NEW), 0)
    for key, shape in shapes.items():
        what = taken[key][0] if key in taken else NEW
        tensors[what] += 1
        params[what] += shape.numel()
    return BlockReport(name=name, source=source, tensors=tensors, params=params)
