"""The tensors of a super-network: what all candidates of a space share, and which of it each of them has.

Networks of a family are laid over each other: a block's place is that of the published maps (`nas.inherit.plan`), a
tensor's axes are those of `nas.inherit.axes`, and of each part of an axis (the stream, a skip beside it, heads, the
inside of a feed-forward) a candidate has the leading channels, of heads the leading ones of each. Blocks of another
kind have tensors of their own; so has every shape of a tensor whose axes are not known.

All tensors lie in one row of numbers, so that a candidate is one list of places in it: loading is one gather, giving
back one scatter. Legend: P parameters of a candidate, S numbers of the store.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from nas.build import Network
from nas.inherit import plan
from nas.inherit.axes import DATA, Axis, Part, axes
from nas.inherit.choose import Chooser
from nas.network import BlockSpec, NetworkSpec

_FRAME: Final = 16  # more up stages, and more units in each, than any network has
_UP: Final = "up_blocks"
_CHOOSER: Final = Chooser("first", {}, {}, 1)  # the leading channels, whatever the weights are


@dataclass(frozen=True, kw_only=True)
class Form:
    """The shape of a tensor of the store.

    Attributes:
        axes: parts of the axes that candidates have slices of.
        rest: sizes of the axes after them, which all candidates have whole (a kernel's).
    """

    axes: tuple[Axis, ...]
    rest: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return (*(sum(part.size for part in axis) for axis in self.axes), *self.rest)

    @functools.lru_cache(maxsize=1 << 14)  # noqa: B019 - forms are values, and layers repeat them
    def joined(self, other: Form) -> Form:
        """The least shape that holds both."""
        pairs = zip(self.axes, other.axes, strict=True)
        return replace(self, axes=tuple(_joined(ours, theirs) for ours, theirs in pairs))

    @functools.lru_cache(maxsize=1 << 7)  # noqa: B019 - as above
    def index(self, part: Form) -> Tensor:
        """Where the elements of a smaller tensor are in this one, both in row-major order: int64 [elements]."""
        found = torch.zeros((), dtype=torch.int64)
        stride = math.prod(self.shape)
        chosen = [_CHOOSER.index(theirs, ours) for theirs, ours in zip(part.axes, self.axes, strict=True)]
        for size, index in zip(self.shape, [*chosen, *map(torch.arange, self.rest)], strict=True):
            assert index is not None  # a part of what was joined
            stride //= size
            found = found[..., None] + index * stride
        return found.flatten()


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A parameter of a candidate.

    Attributes:
        key: of its tensor in the store: place, kind of block, name below it.
        form: the shape that it has.
        parameter: itself.
    """

    key: str
    form: Form
    parameter: nn.Parameter


def slots(network: Network) -> tuple[Slot, ...]:
    """A network's parameters as slices of a store, in an order of their own."""
    known, places = axes(network.spec), _places(network.spec)
    found = []
    for block in network.spec.blocks:
        for name, parameter in network.get_submodule(block.name).named_parameters():
            form = _form(known.get(block.name, {}).get(name), tuple(parameter.shape))
            # What must be equal to be shared is part of the name.
            whole = [part.size for axis in form.axes for part in axis if part.group == DATA]
            fixed = "x".join(map(str, (*whole, *form.rest)))
            found.append(Slot(key=f"{places[block.name]}/{block.kind}/{name}/{fixed}", form=form, parameter=parameter))
    return tuple(found)


def _form(known: tuple[Axis, ...] | None, shape: tuple[int, ...]) -> Form:
    while len(shape) > 2 and shape[-1] == 1:  # a 1x1 convolution is a linear layer
        shape = shape[:-1]
    if known is None:
        return Form(axes=(), rest=shape)
    return Form(axes=known, rest=shape[len(known) :])


def _places(spec: NetworkSpec) -> dict[str, str]:
    """Each block's place: its counterpart in a network with more up stages and units than any."""
    up = [block.name.split(".") for block in spec.blocks if block.name.startswith(f"{_UP}.")]
    names = [block.name for block in spec.blocks if not block.name.startswith(f"{_UP}.")]
    for part in dict.fromkeys(["resnets", *(words[2] for words in up)]):
        names += [f"{_UP}.{stage}.{part}.{unit}" for stage in range(_FRAME) for unit in range(_FRAME)]
    skip = names[0] if any(block.skip is not None for block in spec.blocks) else None
    blocks = [BlockSpec(name=name, kind="", settings=(), inputs=()) for name in names]
    blocks.append(BlockSpec(name="", kind="", settings=(), inputs=(), skip=skip))
    counterpart = plan(spec, NetworkSpec(name="frame", input=spec.input, blocks=tuple(blocks)))
    return {name: place or name for name, place in counterpart.items()}


def _joined(ours: Axis, theirs: Axis) -> Axis:
    by_role = {part.role: _whole(part) for part in ours}
    for part in map(_whole, theirs):
        by_role[part.role] = _larger(by_role.get(part.role, part), part)
    return tuple(by_role.values())


def _whole(part: Part) -> Part:
    """The part with a key head for every query head: shared ones are the first of those that share."""
    return replace(part, size=part.size * part.shared, shared=1)


def _larger(one: Part, other: Part) -> Part:
    """As many units as either has, each as wide as either's."""
    unit = max(one.unit, other.unit)
    return replace(one, size=max(one.size // one.unit, other.size // other.unit) * unit, unit=unit)


class Layout:
    """Which tensors a store has, and where they lie in its row.

    Args:
        forms: by key, in the order in which they lie.
    """

    def __init__(self, forms: dict[str, Form]) -> None:
        self.forms = forms
        self.offsets: dict[str, int] = {}
        self.size = 0
        for key, form in forms.items():
            self.offsets[key] = self.size
            self.size += math.prod(form.shape)

    def holding(self, wanted: Iterable[Slot]) -> Layout:
        """A layout that has room for a candidate too; this one, if it has."""
        forms = dict(self.forms)
        for slot in wanted:
            forms[slot.key] = forms.get(slot.key, slot.form).joined(slot.form)
        return self if forms == self.forms else Layout(forms)

    def index(self, wanted: Sequence[Slot]) -> Tensor:
        """Where a candidate's parameters lie, one after another: int64 [P]; -1 where there is no room for one."""
        found = []
        for slot in wanted:
            form = self.forms.get(slot.key)
            if form is None or form.joined(slot.form) != form:
                found.append(torch.full((slot.parameter.numel(),), -1))
            else:
                found.append(form.index(slot.form) + self.offsets[slot.key])
        return torch.cat(found)

    def moved(self, larger: Layout) -> Tensor:
        """Where each number of this layout lies in a larger one: int64 [S]."""
        parts = [larger.forms[key].index(form) + larger.offsets[key] for key, form in self.forms.items()]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back equal."""
        return {key: asdict(form) for key, form in self.forms.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Layout:
        """The inverse of `to_json`."""
        return cls({key: _read(form) for key, form in data.items()})


def _read(data: dict[str, Any]) -> Form:
    parsed = tuple(tuple(Part(**part) for part in axis) for axis in data["axes"])
    return Form(axes=parsed, rest=tuple(data["rest"]))


def flat(wanted: Sequence[Slot]) -> Tensor:
    """A candidate's parameters one after another: [P]."""
    return torch.cat([slot.parameter.detach().flatten() for slot in wanted])


def put(wanted: Sequence[Slot], row: Tensor) -> None:
    """Makes a row [P] a candidate's parameters; they share its memory."""
    start = 0
    for slot in wanted:
        count = slot.parameter.numel()
        slot.parameter.data = row[start : start + count].view(slot.parameter.shape)
        start += count


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A trained store, to take candidates from.

    Attributes:
        layout: of its row.
        row: its numbers [S], NaN where no candidate that was trained has any.
    """

    layout: Layout
    row: Tensor

    def load(self, network: Network) -> float:
        """Gives a network its slices; what the store has not keeps the network's own weights.

        Returns:
            The share of its parameters that it was given.
        """
        wanted = slots(network)
        own = flat(wanted)
        index = self.layout.index(wanted).to(own.device)
        given = self.row.to(own.device)[index.clamp_min(0)]
        new = (index < 0) | given.isnan()
        put(wanted, torch.where(new, own, given))
        return 1 - float(new.double().mean())
