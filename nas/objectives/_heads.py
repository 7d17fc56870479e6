"""Discriminators on features of a denoiser: which layers, the heads on them, the losses of the two sides.

Legend: B batch, C channels, H W height and width, L tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.errors import NasError
from nas.features import Anatomy

GanLoss = Literal["softplus", "hinge"]
GAN_LOSSES = ("softplus", "hinge")

_STAGE = re.compile(r"down_blocks\.(\d+)\.(resnets|attentions)\.\d+$")
_MIDDLE = re.compile(r"mid_block\.resnets\.\d+$")
_SIDE = 4  # the grid at which a head takes all places at once
_GROUPS = 32  # of a head's norms, as DMD2 has


def middle(anatomy: Anatomy) -> str:
    """The layer whose output is the middle block's.

    Raises:
        NasError: the network has none.
    """
    found = [name for name in anatomy.names if _MIDDLE.search(name)]
    if not found:
        raise NasError(
            "the network has no mid_block whose features a discriminator could look at",
            hint="name the layers in the recipe's objective",
        )
    return found[-1]


def encoder(anatomy: Anatomy) -> tuple[str, ...]:
    """The last layer of every down stage, and the middle's: what the network makes of an image before it decodes.

    Raises:
        NasError: the network has no such layers.
    """
    stages: dict[str, str] = {}
    for name in anatomy.names:
        match = _STAGE.search(name)
        # An attention follows the residual block of its unit, whichever of the two is listed first.
        if match and (match[2] == "attentions" or "attentions" not in stages.get(match[1], "")):
            stages[match[1]] = name
    return (*stages.values(), middle(anatomy))


class Head(nn.Module):
    """One logit per image from a feature map [B, C, H, W] or tokens of a square grid [B, L, C].

    4x4 convolutions of stride 2 down to a grid of at most 4x4, one of the whole grid, a 1x1 one; GroupNorm and SiLU
    between: DMD2's head, which at SD 1.5's middle of 8x8 is one convolution of each kind.

    Args:
        shape: of the feature, batch axis included.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        channels, height, width = _map_shape(shape)
        # At least four channels to a group: over one place, a group of one channel would be normalised to nothing.
        groups = math.gcd(_GROUPS, channels // 4) if channels % 4 == 0 else 1
        layers: list[nn.Module] = []
        while min(height, width) > _SIDE:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(groups, channels), nn.SiLU()]
            height, width = height // 2, width // 2
        layers += [nn.Conv2d(channels, channels, (height, width)), nn.GroupNorm(groups, channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, feature: Tensor) -> Tensor:
        """Logits [B]."""
        if feature.dim() == 3:
            _, height, width = _map_shape(feature.shape)
            feature = feature.transpose(1, 2).unflatten(2, (height, width))
        logits: Tensor = self.layers(feature)
        return logits.flatten(1).mean(1)


def _map_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W) of a feature."""
    if len(shape) == 4:
        return shape[1], shape[2], shape[3]
    side = math.isqrt(shape[1]) if len(shape) == 3 else 0
    if side == 0 or side**2 != shape[1]:
        raise NasError(f"a discriminator reads feature maps and square grids of tokens, not {tuple(shape)}")
    return shape[2], side, side


class Heads(nn.ModuleDict):
    """A head per layer; keys of a ModuleDict have no dots.

    Args:
        features: one output per layer, of any batch size.
    """

    def __init__(self, features: Mapping[str, Tensor]) -> None:
        super().__init__({name.replace(".", "/"): Head(feature.shape) for name, feature in features.items()})

    def logits(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, heads], in float32 at least whatever autocast made of them."""
        logits = torch.stack([self[name.replace(".", "/")](feature) for name, feature in features.items()], dim=1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def discriminator_loss(real: Tensor, fake: Tensor, kind: GanLoss) -> Tensor:
    """What a discriminator minimises, a mean over all logits.

    Softplus: -log sigmoid(real) - log(1 - sigmoid(fake)), at its optimum 2 ln 2 minus twice the Jensen-Shannon
    divergence. Hinge: at its optimum 2 minus twice the total variation distance.

    Args:
        real: logits of real images, any shape.
        fake: of generated ones, the same shape.
        kind: which.
    """
    if kind == "hinge":
        return functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()
    return functional.softplus(-real).mean() + functional.softplus(fake).mean()


def generator_loss(fake: Tensor, kind: GanLoss) -> Tensor:
    """What a generator minimises given the logits of its images: softplus(-logit), or -logit with hinge."""
    return -fake.mean() if kind == "hinge" else functional.softplus(-fake).mean()


def roughness(logits: Tensor, moved: Tensor) -> Tensor:
    """The mean squared change of logits when a little noise is added to the input: approximate R1.

    For small noise of standard deviation s it is s^2 times the squared gradient that R1 penalises, without a second
    derivative (APT; FastGen's LADD).
    """
    return (logits - moved).square().mean()
