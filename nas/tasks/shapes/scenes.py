"""Scenes drawn from captions: random places and sizes, shapes of equal area, antialiased edges.

Pixel (row i, column j) has its centre at (x, y) = (j + 0.5, i + 0.5); y grows downwards. Legend: B batch, H W height
and width in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nas.tasks.shapes.captions import COLOURS, RELATIONS, SHAPES, Caption, Thing

SIZE = 32
BACKGROUND = (30, 30, 36)
PALETTE = {
    "red": (230, 60, 50),
    "green": (60, 200, 80),
    "blue": (70, 110, 245),
    "yellow": (240, 215, 60),
    "cyan": (70, 215, 225),
    "magenta": (215, 75, 215),
}

MARGIN = 1.0  # pixels kept free at the image's border
GAP = 2.0  # pixels kept free between two objects
SLANT = 0.5  # how far a pair may lean: sideways offset over offset along the relation's axis
RADII_ALONE = (4.0, 7.0)  # of the circle of equal area, in pixels
RADII_PAIR = (3.5, 5.0)

_HALF_SIDE = math.sqrt(math.pi) / 2  # of the square with a unit circle's area
_INRADIUS = math.sqrt(math.pi / (3 * math.sqrt(3)))  # of the equilateral triangle with a unit circle's area
_HALF_BASE = _INRADIUS * math.sqrt(3)
# How far each shape of unit radius reaches from its centroid: left, right, up, down.
_REACH = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (_HALF_SIDE,) * 4,
    "triangle": (_HALF_BASE, _HALF_BASE, 2 * _INRADIUS, _INRADIUS),
}


def palette() -> Tensor:
    """The colours [6, 3] in [-1, 1], in the order of COLOURS."""
    return torch.tensor([PALETTE[name] for name in COLOURS]) / 127.5 - 1


def background() -> Tensor:
    """The background [3] in [-1, 1]."""
    return torch.tensor(BACKGROUND) / 127.5 - 1


def distances(dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Signed distances [3, ...] in pixels to each shape of SHAPES, negative inside, from offsets to its centroid.

    Exact inside and near edges; outside a corner the distance to the nearer side is given, which no pixel that
    antialiasing touches can tell. All three have the area pi radius^2.
    """
    circle = torch.sqrt(dx**2 + dy**2) - radius
    square = torch.maximum(dx.abs(), dy.abs()) - _HALF_SIDE * radius
    side = dx.abs() * (math.sqrt(3) / 2) - dy / 2
    triangle = torch.maximum(side, dy) - _INRADIUS * radius
    return torch.stack([circle, square, triangle])


def pixel_centres() -> tuple[Tensor, Tensor]:
    """The x and y [H, W] of the pixels' centres."""
    line = torch.arange(SIZE) + 0.5
    return line[None, :].expand(SIZE, SIZE), line[:, None].expand(SIZE, SIZE)


def render(captions: Sequence[Caption], generator: torch.Generator) -> Tensor:
    """One random scene per caption, [B, 3, 32, 32] in [-1, 1] on the CPU."""
    shape = torch.tensor([[SHAPES.index(t.shape) for t in _pair(c)] for c in captions])
    colour = palette()[torch.tensor([[COLOURS.index(t.colour) for t in _pair(c)] for c in captions])]
    two = torch.tensor([c.second is not None for c in captions])
    centre, radius = _geometry(captions, shape, two, generator)
    x, y = pixel_centres()
    image = background().view(1, 3, 1, 1).expand(len(captions), 3, SIZE, SIZE)
    for index in range(2):
        dx = x - centre[:, index, 0].view(-1, 1, 1)
        dy = y - centre[:, index, 1].view(-1, 1, 1)
        each = distances(dx, dy, radius[:, index].view(-1, 1, 1))
        own = each.gather(0, shape[:, index].view(1, -1, 1, 1).expand(1, -1, SIZE, SIZE))[0]
        coverage = (0.5 - own).clamp(0, 1)
        if index == 1:
            coverage = coverage * two.view(-1, 1, 1)
        coverage = coverage[:, None]
        image = image + coverage * (colour[:, index].view(-1, 3, 1, 1) - image)
    return image


def _pair(caption: Caption) -> tuple[Thing, Thing]:
    """Its two objects; a lone object stands in for the missing one so that a batch has one shape."""
    return caption.first, caption.second or caption.first


def _geometry(
    captions: Sequence[Caption], shape: Tensor, two: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Centroids [B, 2, (x, y)] and radii [B, 2] that obey the relations and keep the objects apart and inside."""
    count = len(captions)
    relation = [RELATIONS.index(c.relation) if c.relation else 0 for c in captions]
    vertical = torch.tensor([r % 2 == 1 for r in relation])
    swapped = torch.tensor([r >= 2 for r in relation])
    uniform = torch.rand((count, 7), generator=generator)
    low = torch.where(two, RADII_PAIR[0], RADII_ALONE[0])[:, None]
    high = torch.where(two, RADII_PAIR[1], RADII_ALONE[1])[:, None]
    radius = low + (high - low) * uniform[:, :2]
    reach = torch.tensor([_REACH[name] for name in SHAPES])[shape] * radius[..., None]
    # Work in (along, across) the relation's axis, the object that stands first along it first; undone at the end.
    flip = vertical.view(-1, 1, 1)
    along = torch.where(flip, reach[..., 2:], reach[..., :2])
    across = torch.where(flip, reach[..., :2], reach[..., 2:])
    along, across = _ordered(along, swapped), _ordered(across, swapped)
    spot_along = _place_pair(along, uniform[:, 2:4])
    alone = _within(along[:, 0], uniform[:, 2])
    spot_along[:, 0] = torch.where(two, spot_along[:, 0], alone)
    first_across = _within(across[:, 0], uniform[:, 4])
    lean = SLANT * (2 * uniform[:, 5] - 1) * (spot_along[:, 1] - spot_along[:, 0])
    second_across = (first_across + lean).clamp(MARGIN + across[:, 1, 0], SIZE - MARGIN - across[:, 1, 1])
    centre = torch.stack([spot_along, torch.stack([first_across, second_across], dim=1)], dim=-1)
    centre = torch.where(flip, centre.flip(-1), centre)
    return _ordered(centre, swapped), radius


def _ordered(pair: Tensor, swapped: Tensor) -> Tensor:
    """`pair` [B, 2, ...] with its two objects exchanged where `swapped` [B]."""
    return torch.where(swapped.view(-1, *(1,) * (pair.dim() - 1)), pair.flip(1), pair)


def _within(reach: Tensor, uniform: Tensor) -> Tensor:
    """A place [B] on one axis where an object that reaches [B, (before, after)] stays inside the image."""
    low, high = MARGIN + reach[:, 0], SIZE - MARGIN - reach[:, 1]
    return low + (high - low) * uniform


def _place_pair(along: Tensor, uniform: Tensor) -> Tensor:
    """Places [B, 2] along the axis; the free space is split uniformly into before, between and after."""
    free = SIZE - 2 * MARGIN - GAP - along.sum(dim=(1, 2))
    cuts = uniform.sort(dim=1).values
    first = MARGIN + cuts[:, 0] * free + along[:, 0, 0]
    second = MARGIN + cuts[:, 1] * free + GAP + along[:, 0].sum(dim=1) + along[:, 1, 0]
    return torch.stack([first, second], dim=1)
