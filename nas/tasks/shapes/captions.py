"""Captions of one or two objects, their words and token ids, and the split that holds captions out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nas.errors import NasError, UsageError, unknown

SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "green", "blue", "yellow", "cyan", "magenta")
# The first two come first because they are the default set: what stands first in the caption stands first in reading
# order. Each of the last two is the mirror of the one two places before it.
RELATIONS = ("left of", "above", "right of", "below")
SPLITS = ("train", "held-out", "all")
HELD_OUT_SHARE = 0.1

_WORDS = ("<pad>", "<start>", "<end>", "a", *COLOURS, *SHAPES, "left", "right", "above", "below", "of")
TOKENS = 12  # the longest caption has 8 words and its two ends; the rest is padding
VOCABULARY = {word: index for index, word in enumerate(_WORDS)}
_THING = rf"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_SENTENCE = re.compile(rf"{_THING}(?: ({'|'.join(RELATIONS)}) {_THING})?")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Thing:
    """One object: a colour of COLOURS and a shape of SHAPES."""

    colour: str
    shape: str

    def __post_init__(self) -> None:
        if self.colour not in COLOURS:
            raise unknown("colour", self.colour, COLOURS)
        if self.shape not in SHAPES:
            raise unknown("shape", self.shape, SHAPES)

    @property
    def text(self) -> str:
        """As in a sentence: "a red circle"."""
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """One object, or two different ones and how the first lies to the second."""

    first: Thing
    relation: str = ""
    second: Thing | None = None

    def __post_init__(self) -> None:
        if (self.second is None) != (self.relation == ""):
            raise NasError("a caption has a relation exactly when it has a second object")
        if self.relation and self.relation not in RELATIONS:
            raise unknown("relation", self.relation, RELATIONS)
        if self.second == self.first:
            # "A left of A" is also "A right of A": no checker could tell them apart.
            raise NasError(f"a caption needs two different objects, got {self.first.text!r} twice")

    @property
    def things(self) -> tuple[Thing, ...]:
        """Its one or two objects in the order of the sentence."""
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def text(self) -> str:
        """The sentence: "a red circle left of a blue square"."""
        return self.first.text if self.second is None else f"{self.first.text} {self.relation} {self.second.text}"

    @property
    def reading_order(self) -> Caption:
        """The caption of the same scene that uses only "left of" and "above"."""
        if self.second is None or self.relation in RELATIONS[:2]:
            return self
        mirrored = RELATIONS[RELATIONS.index(self.relation) - 2]
        return Caption(first=self.second, relation=mirrored, second=self.first)


def parse(text: str) -> Caption:
    """The caption that `text` says, as a person may type it at a prompt.

    Raises:
        UsageError: it is not one of this task's sentences.
    """
    match = _SENTENCE.fullmatch(" ".join(text.lower().split()))
    if match is None:
        raise UsageError(
            f"caption {text!r} is not one of the task shapes; it must read 'a COLOUR SHAPE' or 'a COLOUR SHAPE RELATION"
            f" a COLOUR SHAPE' with colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; relations"
            f" {', '.join(RELATIONS)}"
        )
    colour, shape, relation, other_colour, other_shape = match.groups()
    first = Thing(colour=colour, shape=shape)
    if relation is None:
        return Caption(first=first)
    return Caption(first=first, relation=relation, second=Thing(colour=other_colour, shape=other_shape))


def _order(caption: Caption) -> str:
    return hashlib.sha256(caption.reading_order.text.encode()).hexdigest()


@cache
def captions(split: str = "all", relations: int = 2) -> tuple[Caption, ...]:
    """Every caption of a split.

    A tenth of the two-object captions of each relation is held out: those whose scene (the caption in reading order)
    has the lowest SHA-256. A scene is held out in both its wordings, so that with four relations none is seen from
    the other side. One-object captions are all in "train".

    Args:
        split: "train", "held-out" or "all".
        relations: 2 (left of, above) or 4 (also right of, below).
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if relations not in (2, 4):
        raise UsageError(f"relations of the task shapes must be 2 or 4, got {relations}")
    things = [Thing(colour=colour, shape=shape) for colour in COLOURS for shape in SHAPES]
    chosen = [Caption(first=thing) for thing in things] if split != "held-out" else []
    for relation in RELATIONS[:relations]:
        pairs = [Caption(first=a, relation=relation, second=b) for a in things for b in things if a != b]
        held = set(sorted(pairs, key=_order)[: round(HELD_OUT_SHARE * len(pairs))])
        chosen += [pair for pair in pairs if split == "all" or (pair in held) == (split == "held-out")]
    return tuple(chosen)


def tokens(batch: Sequence[Caption | None]) -> Tensor:
    """Token ids [B, TOKENS] int64; None is the null caption (no words between its ends)."""
    rows = [_ids(caption) for caption in batch]
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), TOKENS)


@cache
def _ids(caption: Caption | None) -> tuple[int, ...]:
    words = ["<start>", *(caption.text.split() if caption else ()), "<end>"]
    return tuple(VOCABULARY[word] for word in words) + (VOCABULARY["<pad>"],) * (TOKENS - len(words))
