"""The exact checker: which objects an image shows, and whether they are those of its caption.

In the spirit of GenEval (Ghosh et al. 2023), with exact geometry in the detector's place: each pixel is unmixed into
background and one colour, connected components become objects, a shape is the best-fitting template of equal area,
a relation is read off the centroids. Legend: B images, K components, H W height and width in pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from nas.errors import NasError
from nas.tasks.shapes.captions import COLOURS, SHAPES, Caption
from nas.tasks.shapes.scenes import SIZE, background, distances, palette, pixel_centres

Flags = NDArray[np.bool_]

MIN_AREA = 12  # pixels; the smallest rendered object has about 38
MIN_IOU = 0.70  # with the best template; below it the component is an object of no known shape
MIN_OFFSET = 3.0  # pixels between the centroids along the relation's axis
_JITTER = (-0.5, 0.0, 0.5)  # template centres tried around the centroid, in pixels, per axis
_CHUNK = 256  # components fitted at once: 27 templates of 32x32 each


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One object seen in an image; `shape` is "" where no template fits."""

    colour: str
    shape: str
    area: float
    x: float
    y: float


@dataclass(frozen=True, kw_only=True)
class CheckScores:
    """What an image has right about its caption, one flag per image [B].

    Attributes:
        count: as many objects as asked for.
        colour: count, and the same colours.
        shape: count, and the same (colour, shape) pairs: attributes bound to the right object.
        relation: both asked objects are there (by colour, or by shape where the colours are equal) and lie as asked;
            true where no relation was asked for.
        asked_relation: whether the caption has a relation.
    """

    count: Flags
    colour: Flags
    shape: Flags
    relation: Flags
    asked_relation: Flags

    @property
    def correct(self) -> Flags:
        """All of them at once."""
        return self.count & self.colour & self.shape & self.relation

    def means(self) -> dict[str, float]:
        """Shares in [0, 1]; "relation" and "two_objects" are over the images with a relation (NaN if none)."""
        asked = self.asked_relation
        return {
            "count": float(self.count.mean()),
            "colour": float(self.colour.mean()),
            "shape": float(self.shape.mean()),
            "relation": float(self.relation[asked].mean()) if asked.any() else float("nan"),
            "two_objects": float(self.correct[asked].mean()) if asked.any() else float("nan"),
            "correct": float(self.correct.mean()),
        }


def check(images: Tensor, captions: Sequence[Caption]) -> CheckScores:
    """Scores images [B, 3, 32, 32] in [-1, 1] against one caption each.

    Raises:
        NasError: another shape, not one caption per image, or a value that is not finite.
    """
    if images.shape[1:] != (3, SIZE, SIZE) or len(images) != len(captions):
        raise NasError(
            f"the checker needs images [B, 3, {SIZE}, {SIZE}] and one caption each, got {list(images.shape)}"
            f" and {len(captions)} captions"
        )
    rows = [_judge(found, caption) for found, caption in zip(detect(images), captions, strict=True)]
    flags = np.array(rows, dtype=bool).reshape(len(captions), 4)
    asked = np.array([caption.second is not None for caption in captions], dtype=bool)
    return CheckScores(
        count=flags[:, 0], colour=flags[:, 1], shape=flags[:, 2], relation=flags[:, 3], asked_relation=asked
    )


def detect(images: Tensor) -> list[list[Found]]:
    """The objects in each of images [B, 3, 32, 32], largest first."""
    if not bool(torch.isfinite(images).all()):
        raise NasError("the checker was given an image with a value that is not finite")
    images = images.detach().to("cpu", torch.float32)
    masks = _foreground(images).numpy()
    labels, _ = ndimage.label(masks.reshape(-1, SIZE, SIZE), structure=_IN_PLANE)
    found: list[list[Found]] = [[] for _ in range(len(images))]
    places = ndimage.find_objects(labels)
    kept = [(label, place) for label, place in enumerate(places, 1) if (labels[place] == label).sum() >= MIN_AREA]
    components = torch.zeros((len(kept), SIZE, SIZE), dtype=torch.bool)
    for index, (label, place) in enumerate(kept):
        components[index][place[1:]] = torch.from_numpy((labels[place] == label)[0])
    for (_, place), shape, (area, x, y) in zip(kept, _shapes(components), _moments(components), strict=True):
        image, colour = divmod(place[0].start, len(COLOURS))
        found[image].append(Found(colour=COLOURS[colour], shape=shape, area=area, x=x, y=y))
    return [sorted(objects, key=lambda o: -o.area) for objects in found]


# Labels never join across the stacked images and colours: the structuring element has only its middle plane.
_IN_PLANE = np.zeros((3, 3, 3), dtype=bool)
_IN_PLANE[1] = True


def _foreground(images: Tensor) -> Tensor:
    """Masks [B, 6, H, W]: where a pixel is more than half made of that colour.

    A pixel is taken as background + a (colour - background) for the colour whose line it lies nearest to. Comparing
    it with the palette alone would give an antialiased edge the name of some other, darker colour.
    """
    offset = images - background().view(1, 3, 1, 1)
    direction = palette() - background()
    amount = torch.einsum("bchw,kc->bkhw", offset, direction) / direction.square().sum(1).view(1, -1, 1, 1)
    amount = amount.clamp(0, 1)
    mixed = amount[:, :, None] * direction.view(1, -1, 3, 1, 1)
    nearest = (offset[:, None] - mixed).square().sum(2).argmin(1, keepdim=True)
    own = torch.zeros_like(amount, dtype=torch.bool).scatter(1, nearest, True)
    return own & (amount > 0.5)


def _moments(components: Tensor) -> list[tuple[float, float, float]]:
    """Area, x and y of each component [K, H, W]."""
    x, y = pixel_centres()
    weights = components.to(torch.float32)
    area = weights.sum((1, 2))
    rows = torch.stack([area, (weights * x).sum((1, 2)) / area, (weights * y).sum((1, 2)) / area], dim=1)
    return [(a, b, c) for a, b, c in rows.tolist()]


def _shapes(components: Tensor) -> list[str]:
    """The name of the best template of equal area for each component [K, H, W], "" where none fits."""
    names: list[str] = []
    for chunk in components.split(_CHUNK) if len(components) else ():
        best = _overlap(chunk)
        fit, index = best.max(dim=0)
        names += [SHAPES[i] if iou >= MIN_IOU else "" for i, iou in zip(index.tolist(), fit.tolist(), strict=True)]
    return names


def _overlap(components: Tensor) -> Tensor:
    """The best intersection over union [3, K] of each component with each shape, over the jittered centres."""
    area, centre_x, centre_y = torch.tensor(_moments(components)).T[..., None, None]
    radius = (area / torch.pi).sqrt()
    x, y = pixel_centres()
    best = torch.zeros((len(SHAPES), len(components)))
    for shift_x in _JITTER:
        for shift_y in _JITTER:
            template = distances(x - centre_x - shift_x, y - centre_y - shift_y, radius) < 0
            both = (template & components).sum((2, 3))
            either = (template | components).sum((2, 3))
            best = torch.maximum(best, both / either)
    return best


def _judge(found: list[Found], caption: Caption) -> tuple[bool, bool, bool, bool]:
    """Count, colour, shape and relation of one image."""
    count = len(found) == len(caption.things)
    colour = Counter(f.colour for f in found) == Counter(t.colour for t in caption.things)
    pairs = Counter((f.colour, f.shape) for f in found) == Counter((t.colour, t.shape) for t in caption.things)
    return count, colour, pairs, _relation(found, caption)


def _relation(found: list[Found], caption: Caption) -> bool:
    """Whether the two asked objects lie as asked: far enough along the axis, and more along it than across."""
    if caption.second is None:
        return True
    by_colour = caption.first.colour != caption.second.colour
    places = []
    for thing in caption.things:
        same = [f for f in found if (f.colour == thing.colour if by_colour else f.shape == thing.shape)]
        if not same:
            return False
        places.append(same[0])
    right, down = places[1].x - places[0].x, places[1].y - places[0].y
    along, across = {
        "left of": (right, down),
        "above": (down, right),
        "right of": (-right, down),
        "below": (-down, right),
    }[caption.relation]
    return along >= MIN_OFFSET and along > abs(across)
