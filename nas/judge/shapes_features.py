"""What the task shapes is seen with: a small classifier of drawn scenes, whose last hidden layer gives the features.

Its Fréchet distance is "shapes-FD": of this network and this task alone, comparable with no published FID. Trained and
written by benchmarks/train_feature_net.py. Legend: B batch, F features.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from nas.batches import stream
from nas.errors import NasError, unknown
from nas.judge.frechet import Statistics, frechet_distance, statistics
from nas.paths import package_data
from nas.tasks.shapes import SPLITS, Task

FILE = "shapes_features.safetensors"
FORMAT = "nas-shapes-features-1"
FEATURES = 64
TOTAL_VARIANCE = 100.0  # of real drawings in feature space, so a distance of 1 is a hundredth of how much they differ
# What the classifier says of a scene, and how many values each answer has: of both objects in reading order their
# colour and shape (of the second also "none"), how they lie (none, left of, above), and their centres over the side.
ANSWERS = {
    "first_colour": 6,
    "first_shape": 3,
    "second_colour": 7,
    "second_shape": 4,
    "relation": 3,
    "places": 4,
}
REFERENCES = tuple(f"{who}.{split}" for who in ("drawings", "teacher") for split in ("all", "held-out"))
DRAWINGS = 8192  # real drawings behind the shipped statistics of each split
DRAWINGS_SEED = 4242
_BATCH = 256


class FeatureNet(nn.Module):
    """Four convolutions, one hidden layer of F features, and a linear head per answer."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, kernel, stride in ((3, 24, 4, 2), (24, 32, 4, 2), (32, 48, 3, 1), (48, 48, 4, 2)):
            convolution = nn.Conv2d(before, after, kernel, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.SiLU()]
        # Not pooled: where an object lies is half of what a caption asks for.
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 16, FEATURES), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, size) for name, size in ANSWERS.items()})
        # Set after training so that the features of real drawings have a total variance of TOTAL_VARIANCE.
        self.register_buffer("scale", torch.ones(()))

    def features(self, images: Tensor) -> Tensor:
        """The features [B, F] of images [B, 3, 32, 32] in [-1, 1]."""
        found: Tensor = self.scale * self.body(images)
        return found

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The answers by name: scores of classes [B, n], and "places" [B, (x1, y1, x2, y2)] in [0, 1]."""
        found = self.body(images)
        return {name: head(found) for name, head in self.heads.items()}


@functools.cache
def _shipped() -> tuple[FeatureNet, dict[str, Statistics]]:
    path = package_data("judge", FILE)
    if not path.is_file():
        raise NasError(f"the feature net {path} is missing", hint="python benchmarks/train_feature_net.py")
    with safe_open(path, framework="pt") as opened:
        kind = (opened.metadata() or {}).get("format")
        tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    if kind != FORMAT:
        raise NasError(f"{path} has format {kind!r}, {FORMAT!r} is needed")
    network = FeatureNet()
    # As new ones: only the counters of batches are not in the file.
    weights = {name.removeprefix("net."): value.float() for name, value in tensors.items() if name.startswith("net.")}
    network.load_state_dict(network.state_dict() | weights)
    references = {name: _unpacked(name, tensors) for name in REFERENCES}
    return network.requires_grad_(False).eval(), references


def packed(name: str, found: Statistics) -> dict[str, Tensor]:
    """A reference as tensors of the shipped file; a covariance is symmetric, so its upper half is enough."""
    rows, columns = torch.triu_indices(FEATURES, FEATURES)
    return {
        f"{name}.count": torch.tensor(found.count),
        f"{name}.mean": torch.from_numpy(found.mean).float(),
        f"{name}.covariance": torch.from_numpy(found.covariance)[rows, columns].float(),
    }


def _unpacked(name: str, tensors: dict[str, Tensor]) -> Statistics:
    rows, columns = torch.triu_indices(FEATURES, FEATURES)
    covariance = torch.zeros((FEATURES, FEATURES), dtype=torch.float64)
    covariance[rows, columns] = covariance[columns, rows] = tensors[f"{name}.covariance"].double()
    return Statistics(
        count=int(tensors[f"{name}.count"]),
        mean=tensors[f"{name}.mean"].double().numpy(),
        covariance=covariance.numpy(),
    )


def feature_net() -> FeatureNet:
    """The shipped classifier, frozen, in eval mode, on the CPU."""
    return _shipped()[0]


def reference(name: str = "drawings.all") -> Statistics:
    """Shipped statistics: real drawings or the embedded teacher's samples, of captions of a split.

    Args:
        name: "drawings.all", "drawings.held-out", "teacher.all" or "teacher.held-out".

    Raises:
        UsageError: another name.
    """
    if name not in REFERENCES:
        raise unknown("reference of shapes-FD", name, REFERENCES)
    return _shipped()[1][name]


@torch.no_grad()
def shapes_statistics(images: Tensor, network: FeatureNet | None = None) -> Statistics:
    """Statistics of images [B, 3, 32, 32] in [-1, 1], values beyond them cut off as in a picture.

    Raises:
        NasError: another shape, fewer than two images, or a value that is not finite.
    """
    if images.dim() != 4 or images.shape[1:] != Task().image_shape:
        raise NasError(f"shapes-FD is of images [B, 3, 32, 32], got {list(images.shape)}")
    net = network or feature_net()
    return statistics(net.features(part.float().cpu().clamp(-1, 1)) for part in images.split(_BATCH))


def shapes_distance(images: Tensor, against: str | Statistics = "drawings.all") -> float:
    """shapes-FD of images [B, 3, 32, 32] in [-1, 1] to real drawings, or to another reference.

    It grows as images get fewer (the covariance of few is far from that of many), so distances compare at equal B only;
    `floor` says what B real drawings have.

    Args:
        images: what is judged.
        against: a name of `reference`, or statistics of other images (`shapes_statistics`).

    Raises:
        NasError: another shape, fewer than two images, or a value that is not finite.
    """
    other = reference(against) if isinstance(against, str) else against
    return frechet_distance(shapes_statistics(images), other)


def drawings(count: int, split: str, seed: int) -> Iterator[Tensor]:
    """`count` real drawings of random captions of a split, in batches [b, 3, 32, 32]; the same for the same seed."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    task = Task()
    for index, first in enumerate(range(0, count, _BATCH)):
        generator = stream(seed, index)
        captions = task.sample(min(_BATCH, count - first), split, generator)
        yield task.render(captions, generator)


def drawn_statistics(
    count: int = DRAWINGS, split: str = "all", seed: int = DRAWINGS_SEED, network: FeatureNet | None = None
) -> Statistics:
    """Statistics of `drawings`; with the defaults what the shipped file holds."""
    net = network or feature_net()
    with torch.no_grad():
        return statistics(net.features(part) for part in drawings(count, split, seed))


def floor(captions: Sequence[Any], against: str | Statistics = "drawings.all", seed: int = 99) -> float:
    """shapes-FD of one real drawing per caption: what no generator of that many images can be expected to beat."""
    return shapes_distance(Task().render(captions, stream(seed)), against)
