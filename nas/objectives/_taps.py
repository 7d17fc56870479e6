"""Which layer of a student is compared with which of its teacher, and what every comparison of features checks.

A UNet's blocks are recognised by the module paths that this project shares with diffusers
(`down_blocks.S.resnets.U`, `mid_block.attentions.U`, `up_blocks.S.upsamplers.0`), a diffusion transformer's by
`transformer_blocks.N` (three stages: `down_blocks.N`, `mid_blocks.N`, `up_blocks.N`). Only blocks are tapped, never the
containers around them: those of our networks are not called. Legend: B batch, C channels, H W height and width,
L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from nas.errors import NasError, UsageError, nearest, unknown
from nas.features import Anatomy, Tap
from nas.inherit.mapping import plan
from nas.network import BlockSpec, InputShape, NetworkSpec
from nas.objectives import Outputs

POINTS: Final = ("stages", "stages+mid", "blocks", "last")
MATCHES: Final = ("first", "interleave", "last")
SIDES: Final = ("all", "encoder", "decoder")

_UNIT: Final = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<stage>\d+)|mid_block)\."
    r"(?P<part>resnets|attentions|downsamplers|upsamplers)\.(?P<unit>\d+)"
)
_LAYER: Final = re.compile(r"(?P<row>transformer_blocks|down_blocks|mid_blocks|up_blocks)\.(?P<number>\d+)")
# A joint attention (`attn`) of our networks is not called as a module, its last projection is; and there the output
# is a tensor in every class, text left out.
_ATTENTION: Final = re.compile(r"(?P<layer>.+)\.attn1?\.to_out\.0")
_PARTS: Final = ("resnets", "attentions", "downsamplers", "upsamplers")  # in the order in which a unit runs
_ENCODER: Final = "down"
_MIDDLE: Final = "mid"
_DECODER: Final = "up"
_ROW_SIDES: Final = {"down_blocks": _ENCODER, "mid_blocks": _MIDDLE, "up_blocks": _DECODER, "transformer_blocks": ""}


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of a network.

    Attributes:
        name: its module path.
        side: "down", "mid" or "up"; "" for the one row of a plain transformer.
        stage: number of its stage on that side, 0 where the side is one stage.
        part: "resnets", "attentions", "downsamplers", "upsamplers" of a UNet; "layer" of a diffusion transformer.
        unit: number within the stage.
    """

    name: str
    side: str
    stage: int
    part: str
    unit: int

    @property
    def is_sampler(self) -> bool:
        """Whether it changes the resolution between two stages."""
        return self.part in ("downsamplers", "upsamplers")

    @property
    def place(self) -> tuple[int, int, bool, int, int]:
        """Sorts blocks into the order in which they run; a stage's sampler is its last block."""
        side = ("", _ENCODER, _MIDDLE, _DECODER).index(self.side)
        part = _PARTS.index(self.part) if self.part in _PARTS else 0
        return (side, self.stage, self.is_sampler, self.unit, part)


def blocks_of(names: Iterable[str]) -> tuple[Block, ...]:
    """The blocks among a network's submodules, in the order in which they run."""
    known = tuple(names)
    attending = {match["layer"] for name in known if (match := _ATTENTION.fullmatch(name))}
    found = []
    for name in known:
        if match := _UNIT.fullmatch(name):
            side, stage = match["side"] or _MIDDLE, int(match["stage"] or 0)
            found.append(Block(name=name, side=side, stage=stage, part=match["part"], unit=int(match["unit"])))
        elif (match := _LAYER.fullmatch(name)) and name in attending:
            row = _ROW_SIDES[match["row"]]
            found.append(Block(name=name, side=row, stage=0, part="layer", unit=int(match["number"])))
    return tuple(sorted(found, key=lambda block: block.place))


def check_points(points: str, objective: str, words: tuple[str, ...] = POINTS) -> None:
    """Refuses what is neither one of the words nor a list of layers.

    Raises:
        UsageError: offers the nearest.
    """
    if points not in words and not all("." in each or "=" in each for each in _entries(points)):
        known = (*words, "student.layer=teacher.layer")
        raise unknown("points", points, known, where=f"the objective {objective}")


def chosen(points: str, student: Anatomy, teacher: Anatomy) -> tuple[Tap, ...]:
    """The layers that a setting `points` stands for.

    Args:
        points: "stages", the output of every down and up stage (BK-SDM, arXiv 2305.15798; of a diffusion transformer
            without stages, its last block); "stages+mid", the middle's too (distill-sd); "blocks", every block that has
            a counterpart; "last", the last transformer of each, whatever the two architectures (SnapGen++, arXiv
            2601.08303, equation 7); or layers by name, "a=b, c" for the student's a with the teacher's b and c of both.
        student: the student's layers.
        teacher: the teacher's.

    Raises:
        UsageError: a named layer does not exist.
        NasError: the two networks have no such blocks in common.
    """
    if points not in POINTS:
        return _named(points, student, teacher)
    if points == "last":
        return _last(student, teacher)
    if points == "blocks":
        return block_taps(student, teacher, (*_PARTS, "layer"))
    return stage_taps(student, teacher, middle=points == "stages+mid")


def stage_taps(student: Anatomy, teacher: Anatomy, *, middle: bool) -> tuple[Tap, ...]:
    """The output of every stage with that of its counterpart.

    Stages are aligned from the outermost, as weights are inherited. The output is that of the stage's last block; a
    sampler counts where both stages have one. So where the stage below was removed, and the sampler with it, the last
    unit is compared with the teacher's last unit: in BK-SDM-Tiny `down_blocks.2.attentions.0` with the teacher's
    `down_blocks.2.attentions.1` (whose authors tap `.proj_out` there, before the residual sum).

    Args:
        student: the student's layers.
        teacher: the teacher's.
        middle: whether the middle counts as a stage.

    Raises:
        NasError: they have no stage in common.
    """
    ours, theirs = blocks_of(student.names), blocks_of(teacher.names)
    shift = len({b.stage for b in theirs if b.side == _DECODER}) - len({b.stage for b in ours if b.side == _DECODER})
    taps = []
    for side, stage in dict.fromkeys((block.side, block.stage) for block in ours):
        if side == _MIDDLE and not middle:
            continue
        other = stage + (shift if side == _DECODER else 0)
        here = [block for block in ours if (block.side, block.stage) == (side, stage)]
        there = [block for block in theirs if (block.side, block.stage) == (side, other)]
        if not (here and there and (here[-1].part == "layer") == (there[-1].part == "layer")):
            continue
        if not (here[-1].is_sampler and there[-1].is_sampler):
            here, there = ([block for block in each if not block.is_sampler] for each in (here, there))
        if here and there:
            taps.append(Tap(student=here[-1].name, teacher=there[-1].name))
    return _some(taps, "stages")


def outer_taps(student: Anatomy, teacher: Anatomy) -> tuple[Tap, ...]:
    """The outputs of the outermost down and up stage; none of networks without such stages."""
    ours = [block for block in blocks_of(student.names) if block.part != "layer"]
    sides = (_ENCODER, _DECODER)
    if not all(any(block.side == side for block in ours) for side in sides):
        return ()
    outermost = {_ENCODER: 0, _DECODER: max(block.stage for block in ours if block.side == _DECODER)}
    wanted = {block.name for block in ours if outermost.get(block.side) == block.stage}
    return tuple(tap for tap in stage_taps(student, teacher, middle=False) if tap.student in wanted)


def block_taps(student: Anatomy, teacher: Anatomy, parts: tuple[str, ...]) -> tuple[Tap, ...]:
    """Every block of the student of these parts with the teacher's block that it would start from.

    A middle with one residual block is compared with the teacher's last, whose output is the middle's (SSD-1B, arXiv
    2401.02677: `mid_block.resnets.0` with the teacher's `mid_block.resnets.1`).

    Args:
        student: the student's layers.
        teacher: the teacher's.
        parts: which of `Block.part`.

    Raises:
        NasError: they have no such block in common.
    """
    ours, theirs = blocks_of(student.names), blocks_of(teacher.names)
    sources = _sources(student, teacher)
    middle = [block.name for block in ours if (block.side, block.part) == (_MIDDLE, "resnets")]
    their_middle = [block.name for block in theirs if (block.side, block.part) == (_MIDDLE, "resnets")]
    if len(middle) == 1 and their_middle:
        sources = {**sources, middle[0]: their_middle[-1]}
    known = {block.name for block in theirs}
    pairs = [(block.name, sources.get(block.name)) for block in ours if block.part in parts]
    return _some([Tap(student=a, teacher=b) for a, b in pairs if b is not None and b in known], "blocks")


def attention_taps(student: Anatomy, teacher: Anatomy, *, match: str, side: str) -> tuple[Tap, ...]:
    """The self-attention of matched transformer layers, behind its output projection [B, L, C].

    Args:
        student: the student's layers.
        teacher: the teacher's.
        match: which layers of the deeper transformer the shallower is compared with (`matched`).
        side: "all", "encoder" (way down) or "decoder" (way up).

    Raises:
        NasError: no transformers with self-attention correspond.
    """
    ours, theirs = _attentions(student), _attentions(teacher)
    sides = {"all": ("", _ENCODER, _MIDDLE, _DECODER), "encoder": (_ENCODER,), "decoder": (_DECODER,)}[side]
    sources = _sources(student, teacher)
    taps = []
    for (name, where), here in ours.items():
        # A row of transformer blocks corresponds to the row of the same name.
        there = theirs.get((sources.get(name, name) or "", where))
        if there is None or where not in sides:
            continue
        count = min(len(here), len(there))
        pairs = zip(matched(match, count, len(here)), matched(match, count, len(there)), strict=True)
        taps += [Tap(student=here[i], teacher=there[j]) for i, j in pairs]
    wanted = "self-attention" if side == "all" else f"self-attention in the {side}"
    return _some(taps, wanted)


def matched(match: str, count: int, total: int) -> tuple[int, ...]:
    """Which `count` of `total` layers are compared, numbered from 0 (KOALA, arXiv 2312.04005, appendix B.1).

    "first" are the bottom ones and "last" the top ones. "interleave" takes every ceil(total / count)-th from the first
    on, and where these run out the last ones: of ten layers six are 1, 3, 5, 7, 9, 10 counted from 1, as there.
    """
    if match == "first":
        return tuple(range(count))
    if match == "last":
        return tuple(range(total - count, total))
    step = -(-total // count)
    return tuple(min(step * i, total - count + i) for i in range(count))


def is_attention(key: str) -> bool:
    """Whether a feature's key is of a self-attention's output."""
    return _ATTENTION.fullmatch(key.partition("=")[0]) is not None


def compared(
    student: Outputs, teacher: Outputs, objective: str, difference: Callable[[Tensor, Tensor], Tensor]
) -> Mapping[str, Tensor]:
    """Each layer's difference per example [B] (or [2 B] where both texts were asked), by the key of its tap.

    Args:
        student: with its features in the teacher's shapes.
        teacher: with the same features.
        objective: for errors.
        difference: of two features, per example.

    Raises:
        NasError: there are none, one lacks its counterpart, or two shapes differ.
    """
    if not student.features:
        raise NasError(f"the objective {objective} compares layers, and was given the outputs of none")
    found = {}
    for key, ours in student.features.items():
        theirs = teacher.features.get(key)
        if theirs is None or theirs.shape != ours.shape:
            got = "nothing" if theirs is None else f"the shape {tuple(theirs.shape)}"
            raise NasError(
                f"the objective {objective} compares layer {key}: the student has the shape {tuple(ours.shape)}"
                f" there and the teacher {got}"
            )
        found[key] = difference(ours, theirs)
    return found


def summed(differences: Mapping[str, Tensor]) -> Tensor:
    """The sum over layers, each counted once, per example [B].

    (A published re-implementation of SSD-1B's loss adds its running sum to itself, so that earlier layers are doubled
    again and again.)
    """
    return torch.stack(list(differences.values())).sum(0)


def _entries(points: str) -> list[str]:
    return points.replace(",", " ").split() or [points]


def _named(points: str, student: Anatomy, teacher: Anatomy) -> tuple[Tap, ...]:
    taps = []
    for entry in _entries(points):
        ours, _, theirs = entry.partition("=")
        tap = Tap(student=ours, teacher=theirs or ours)
        for name, anatomy, whose in ((tap.student, student, "student"), (tap.teacher, teacher, "teacher")):
            if name not in anatomy.names:
                close = nearest(name, anatomy.names)
                guess = f"; did you mean {close!r}?" if close else ""
                raise UsageError(f"points {entry!r}: the {whose} has no layer {name!r}{guess}")
        taps.append(tap)
    return tuple(dict.fromkeys(taps))


def _last(student: Anatomy, teacher: Anatomy) -> tuple[Tap, ...]:
    """The last transformer of each: of a UNet the block with its residual sum, a map [B, C, H, W]."""
    last = [
        [block.name for block in blocks_of(each.names) if block.part in ("attentions", "layer")]
        for each in (student, teacher)
    ]
    return _some([Tap(student=last[0][-1], teacher=last[1][-1])] if all(last) else [], "transformers")


def _attentions(anatomy: Anatomy) -> dict[tuple[str, str], list[str]]:
    """The self-attentions of every transformer in order: (a UNet's block or a row's name, side) -> output layers."""
    own = {match["layer"]: name for name in anatomy.names if (match := _ATTENTION.fullmatch(name))}
    found: dict[tuple[str, str], list[str]] = {}
    for block in blocks_of(anatomy.names):
        if block.part == "layer":
            found.setdefault((block.name.rpartition(".")[0], block.side), []).append(own[block.name])
        elif block.part == "attentions":
            inside = f"{block.name}.transformer_blocks."
            layers = sorted(int(name.removeprefix(inside)) for name in own if name.startswith(inside))
            if layers:
                found[(block.name, block.side)] = [own[f"{inside}{layer}"] for layer in layers]
    return found


def _sources(student: Anatomy, teacher: Anatomy) -> Mapping[str, str | None]:
    """The teacher's block that each of the student's would start from."""
    return plan(_spec(student), _spec(teacher))


def _spec(anatomy: Anatomy) -> NetworkSpec:
    """What a network was built from; of a class of diffusers its blocks by name, which is all that `plan` reads."""
    if anatomy.spec is not None:
        return anatomy.spec
    blocks = blocks_of(anatomy.names)
    first = blocks[0].name if blocks else ""
    # A way up without a way down is a decoder, which has no skips.
    skips = any(block.side == _ENCODER for block in blocks)

    def record(block: Block) -> BlockSpec:
        skip = first if skips and (block.side, block.part) == (_DECODER, "resnets") else None
        return BlockSpec(name=block.name, kind=block.part, settings=(), inputs=(), skip=skip)

    shape = InputShape(channels=0, height=0, width=0)
    return NetworkSpec(name="", input=shape, blocks=tuple(map(record, blocks)))


def _some(taps: Iterable[Tap], what: str) -> tuple[Tap, ...]:
    found = tuple(dict.fromkeys(taps))
    if not found:
        raise NasError(
            f"the student and the teacher have no {what} in common whose outputs could be compared",
            hint="name the layers, as points = 'student.layer=teacher.layer', or choose the objective output",
        )
    return found
