"""Which block of a larger network each block of a smaller one starts from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from nas.network import NetworkSpec

_UP: Final = re.compile(r"(?P<prefix>(?:.*\.)?)up_blocks\.(?P<stage>\d+)\.(?P<part>\w+)\.(?P<unit>\d+)")


def plan(student: NetworkSpec, teacher: NetworkSpec) -> dict[str, str | None]:
    """The teacher's block for each of the student's; None where it has none.

    The published maps, in one rule. Stages are aligned from the outermost. A down unit starts from the unit of the same
    number, the middle from the middle. Of an up stage with skips the last unit starts from the teacher's last, because
    both take what the stage was given, and the others from the unit of the same number. That is BK-SDM's copy (arXiv
    2305.15798, `copy_weight_from_teacher`: in Base and Small up unit 1 from 2, in Tiny up stage k from k + 1), and
    KOALA's, which keeps the same places and the first transformer layers (arXiv 2312.04005, Table 11: the bottom layers
    are best). A chain of blocks without stages keeps its first blocks.

    Args:
        student: the network to start.
        teacher: the network whose weights there are.
    """
    ours, theirs = _units(student), _units(teacher)
    names = {block.name for block in teacher.blocks}
    skips = any(block.skip is not None for block in teacher.blocks)
    found: dict[str, str | None] = {}
    for block in student.blocks:
        name: str | None = block.name
        match = _UP.fullmatch(block.name)
        if match is not None:
            name = _up(match, ours, theirs, skips)
        found[block.name] = name if name in names else None
    return found


def _up(match: re.Match[str], ours: Mapping[int, int], theirs: Mapping[int, int], skips: bool) -> str | None:
    stage, part, unit = int(match["stage"]), match["part"], int(match["unit"])
    # The innermost up stage is number 0; the outermost ones of both networks correspond.
    other = stage + len(theirs) - len(ours)
    if other not in theirs:
        return None
    if part in ("resnets", "attentions") and skips:
        last, their_last = ours[stage] - 1, theirs[other] - 1
        if unit == last:
            unit = their_last
        elif unit >= their_last:
            return None
    return f"{match['prefix']}up_blocks.{other}.{part}.{unit}"


def _units(spec: NetworkSpec) -> dict[int, int]:
    """Number of residual blocks of each up stage."""
    counts: dict[int, int] = {}
    for block in spec.blocks:
        match = _UP.fullmatch(block.name)
        if match is not None:
            stage = int(match["stage"])
            counts[stage] = counts.get(stage, 0) + (match["part"] == "resnets")
    return counts
