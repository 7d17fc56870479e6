"""Which of a teacher's channels a narrower network keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

from nas.inherit.axes import DATA, FREQUENCY, Axes, Axis, Part, makes_channels

WIDTHS: Final = ("first", "l1")


class Chooser:
    """The channels to keep, the same for every tensor that has them.

    "first" keeps the leading ones. "l1" keeps, of every group of channels, those that the teacher's layers write with
    the largest sum of absolute weights (Li et al. 2017, arXiv 1608.08710, section 3.1), summed over all layers that
    write the group. On a stream and inside a residual block the same number is kept of each group of the GroupNorm, so
    that a group of the student normalises channels that the teacher normalised together. Kept channels stay in their
    order, and a narrower choice is always a part of a wider one.

    Args:
        widths: "first" or "l1".
        axes: of the teacher, by block and tensor.
        state: the teacher's tensors.
        norm_groups: of the GroupNorms of both networks; 1 where they differ, and then channels are chosen over all.
    """

    def __init__(self, widths: str, axes: Mapping[str, Axes], state: Mapping[str, Tensor], norm_groups: int) -> None:
        self._by_weight = widths == "l1"
        self._norm_groups = norm_groups
        self._state = state
        self._importance: dict[str, Tensor] = {}
        self._makers: dict[str, list[tuple[str, int, int]]] = {}
        for block, tensors in axes.items() if self._by_weight else ():
            for tensor, tensor_axes in tensors.items():
                name = f"{block}.{tensor}"
                if name not in state or not makes_channels(tensor, block):
                    continue
                start = 0
                for part in tensor_axes[0]:
                    self._makers.setdefault(part.group, []).append((name, start, part.size))
                    start += part.size

    def index(self, student: Axis, teacher: Axis) -> Tensor | None:
        """The teacher's channels on an axis for each of the student's; None where they cannot be had.

        A part of the student's axis starts from the part of the same role.
        """
        starts, found = {}, []
        start = 0
        for part in teacher:
            starts[part.role] = (start, part)
            start += part.size
        for part in student:
            if part.role not in starts:
                return None
            start, theirs = starts[part.role]
            chosen = self._part(part, theirs)
            if chosen is None:
                return None
            found.append(chosen + start)
        return torch.cat(found)

    def _part(self, student: Part, teacher: Part) -> Tensor | None:
        alike = (student.unit, student.shared) == (teacher.unit, teacher.shared)
        if student.size == teacher.size and alike:
            return torch.arange(teacher.size)
        if student.group == DATA or student.size > teacher.size:
            return None
        if student.role == FREQUENCY:
            return _frequencies(student.size, teacher.size)
        # Heads first, then the leading channels of each. A key head is that of the first query head that reads it.
        count, units = (part.size // part.unit * part.shared for part in (student, teacher))
        if student.unit > teacher.unit or count > units:
            return None
        heads = self._best(teacher.group, count, units, teacher.unit)[:: student.shared] // teacher.shared
        return (heads[:, None] * teacher.unit + torch.arange(student.unit)).flatten()

    def _best(self, group: str, count: int, units: int, width: int) -> Tensor:
        """Which `count` of `units` to keep, ascending; each unit is `width` channels."""
        if count == units or not self._by_weight or not group:
            return torch.arange(count)
        if group not in self._importance:
            total = torch.zeros(units * width, dtype=torch.float64)
            for name, start, size in self._makers.get(group, ()):
                if size == len(total):
                    rows = self._state[name].detach().narrow(0, start, size)
                    total += rows.abs().flatten(1).sum(1, dtype=torch.float64).cpu()
            self._importance[group] = total
        value = self._importance[group].reshape(units, width).sum(1)
        normed = group.startswith("stage ") or group.endswith(" inner")
        even = units % self._norm_groups == count % self._norm_groups == 0
        parts = self._norm_groups if normed and even else 1
        # A stable order: of equal channels the first is kept.
        order = value.reshape(parts, -1).sort(dim=1, descending=True, stable=True).indices[:, : count // parts]
        offsets = torch.arange(parts)[:, None] * (units // parts)
        return (order + offsets).flatten().sort().values


def _frequencies(student: int, teacher: int) -> Tensor:
    """The teacher's cosines, then sines, of the frequency nearest to each of the student's, 10000^(-i / half)."""
    ours, theirs = student // 2, teacher // 2
    nearest = (torch.arange(ours, dtype=torch.float64) * theirs / ours).round().to(torch.int64).clamp_max(theirs - 1)
    return torch.cat([nearest, nearest + theirs])
