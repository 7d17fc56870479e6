"""What goes on inside a network, for losses that compare more than outputs: hooks on submodules, by name.

Our networks and diffusers' name the same layer alike, so one name finds it in either. Legend: B batch, C channels, H W
height and width, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nas.errors import NasError, unknown
from nas.network import NetworkSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Tap:
    """Two layers whose outputs a loss compares.

    Attributes:
        student: the submodule's name in the student.
        teacher: its name in the teacher.
    """

    student: str
    teacher: str

    @property
    def key(self) -> str:
        """What both outputs are filed under."""
        return self.student if self.student == self.teacher else f"{self.student}={self.teacher}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """What a loss may know of a network before it chooses its taps.

    Attributes:
        names: every submodule's name, in the order of construction.
        spec: what it was built from, None of a class of diffusers that this project does not describe.
    """

    names: tuple[str, ...]
    spec: NetworkSpec | None


def body(denoiser: nn.Module) -> nn.Module:
    """The network whose submodules have the names of the blocks, below preconditioners and other wrappers."""
    inner: nn.Module | None = denoiser
    while isinstance(inner, nn.Module):
        found = inner
        inner = getattr(inner, "denoiser", None) or getattr(inner, "network", None)
    return found


def anatomy(denoiser: nn.Module) -> Anatomy:
    """The names of a denoiser's layers."""
    inner = body(denoiser)
    return Anatomy(names=tuple(name for name, _ in inner.named_modules() if name), spec=getattr(inner, "spec", None))


@contextmanager
def captured(denoiser: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of submodules while the network is called, by name; of several calls the last.

    Of a submodule that gives several tensors it is the image's: the first, but in the joint blocks of diffusers (Stable
    Diffusion 3), which give the text first.

    Raises:
        UsageError: no such submodule.
        NasError: on leaving, a submodule that was not called, or that gave no tensor.
    """
    inner, found, wanted = body(denoiser), dict[str, Tensor](), tuple(dict.fromkeys(names))
    handles = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] = output[_image(module)] if isinstance(output, tuple) else output

        return hook

    try:
        for name in wanted:
            handles.append(_layer(inner, name).register_forward_hook(keep(name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in wanted if not isinstance(found.get(name), Tensor)]:
        raise NasError(f"the network gave no output at {', '.join(missing)}")


def _image(module: nn.Module) -> int:
    """Which of a submodule's outputs is the image's."""
    return 1 if hasattr(module, "context_pre_only") and not hasattr(module, "to_q") else 0


def _layer(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        known = [each for each, _ in network.named_modules() if each]
        raise unknown("layer", name, known, where="the network") from None


class Projection(nn.Module):
    """A student's feature in the teacher's shape: a trainable linear map of channels, and a resize of the grid.

    Feature maps [B, C, H, W] get a 1x1 convolution and bilinear resizing (area where they shrink), tokens [B, L, C] a
    linear layer and, where L differs, resizing as a square grid (FitNets, Romero et al. 2015; SnapGen++, arXiv
    2601.08303, equation 7).

    Args:
        student: shape of the student's feature, batch axis included.
        teacher: of the teacher's.

    Raises:
        NasError: one is a map and the other tokens with no square grid.
    """

    def __init__(self, student: Sequence[int], teacher: Sequence[int]) -> None:
        super().__init__()
        self.target = tuple(teacher[1:])
        self.tokens = len(teacher) == 3
        channels = student[1] if len(student) == 4 else student[-1]
        wanted = teacher[-1] if self.tokens else teacher[1]
        self.grid = _grid(teacher) if self.tokens else (teacher[2], teacher[3])
        _grid(student)
        self.map = nn.Conv2d(channels, wanted, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """The feature in the teacher's shape."""
        if feature.dim() == 3:
            feature = feature.transpose(1, 2).unflatten(2, _grid(feature.shape))
        mapped: Tensor = self.map(feature)
        if tuple(mapped.shape[2:]) != self.grid:
            if mapped.shape[2] > self.grid[0]:
                mapped = functional.adaptive_avg_pool2d(mapped, self.grid)
            else:
                mapped = functional.interpolate(mapped, size=self.grid, mode="bilinear", align_corners=False)
        return mapped.flatten(2).transpose(1, 2) if self.tokens else mapped


def _grid(shape: Sequence[int]) -> tuple[int, int]:
    """The height and width of a feature: of tokens, a square."""
    if len(shape) == 4:
        return (shape[2], shape[3])
    if len(shape) != 3 or round(shape[1] ** 0.5) ** 2 != shape[1]:
        raise NasError(f"a feature of shape {tuple(shape)} is no map and no square grid of tokens")
    side = round(shape[1] ** 0.5)
    return (side, side)


def projections(
    taps: Iterable[Tap], student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], seed: int
) -> nn.ModuleDict:
    """A projection for every tap whose two shapes differ, initialised from `seed`; ModuleDict keys have no dots.

    Args:
        taps: the compared layers.
        student: an output per name.
        teacher: likewise.
        seed: of the initialisation.
    """
    made = nn.ModuleDict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for tap in taps:
            ours, theirs = student[tap.student], teacher[tap.teacher]
            if ours.shape[1:] != theirs.shape[1:]:
                made[module_key(tap)] = Projection(ours.shape, theirs.shape)
    return made


def module_key(tap: Tap) -> str:
    """The tap's key as a submodule's name."""
    return tap.key.replace(".", "/")
