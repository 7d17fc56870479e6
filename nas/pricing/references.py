"""Published networks of a space: what their publishers say, and what our networks of the same choices have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nas import families
from nas.errors import NasError, UsageError
from nas.space import Candidate, SearchSpace
from nas.space_file import Reference
from nas.trace import block_trace

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Call:
    """MACs of one call at one image side.

    Attributes:
        px: side of the image.
        macs: of our network.
        published_gmacs: as the space file gives it, or None.
        native: whether this is the size that the reference is published at.
    """

    px: int
    macs: int
    published_gmacs: float | None
    native: bool

    @property
    def difference(self) -> float | None:
        """Ours against the published figure, as a fraction of it; None without one."""
        return None if self.published_gmacs is None else self.macs / 1e9 / self.published_gmacs - 1


@dataclass(frozen=True, kw_only=True)
class ReferenceFigures:
    """A reference, its computed parameters, and its calls by size of the image, ascending."""

    reference: Reference
    params: int
    calls: tuple[Call, ...]


def figures(space: SearchSpace, name: str) -> ReferenceFigures:
    """Computes a reference at every image side that it has a published figure for, and at its own.

    Raises:
        UsageError: no such reference, or a figure at a size that the family cannot take.
        NasError: its parameters are not those it claims.
    """
    reference, native = space.find_reference(name), space.published(name)
    published = {_pixels(native.space, name, px): gmacs for px, gmacs in (reference.gmacs or {}).items()}
    params = check_params(space, name)
    sizes = sorted({*published, native.space.resolution_px})
    calls = [
        Call(
            px=px,
            macs=_macs(native.space.at_resolution(px).candidate(**dict(reference.choices))),
            published_gmacs=published.get(px),
            native=px == native.space.resolution_px,
        )
        for px in sizes
    ]
    return ReferenceFigures(reference=reference, params=params, calls=tuple(calls))


def check_params(space: SearchSpace, name: str) -> int:
    """The parameters of a reference's network, which must be those that the space file claims.

    Raises:
        UsageError: no such reference.
        NasError: they are not; names the file, the reference and both numbers.
    """
    reference = space.find_reference(name)
    # Parameters do not depend on the size of the image: at the space's own its blocks are likely traced already.
    own = space if reference.text_width is None else space.with_text_width(reference.text_width)
    network = families.network(own.candidate(**dict(reference.choices)))
    found = sum(block_trace(block).params for block in network.blocks)
    if reference.params is not None and reference.params != found:
        raise NasError(
            f"{space.path}: reference {name!r} claims {reference.params:,} parameters, but the network of its choices"
            f" has {found:,}",
            hint=f"correct params or [reference.choices] of {name}",
        )
    return found


def check_references(space: SearchSpace, progress: Progress | None = None) -> None:
    """Checks the parameters of every reference of a space that claims a number.

    Raises:
        NasError: one of them differs; see `check_params`.
    """
    claiming = [reference.name for reference in space.references if reference.params is not None]
    for i, name in enumerate(claiming):
        if progress is not None:
            progress(i, len(claiming), name)
        check_params(space, name)


def _macs(candidate: Candidate) -> int:
    return sum(block_trace(block).macs for block in families.network(candidate).blocks)


def _pixels(space: SearchSpace, name: str, text: str) -> int:
    if not text.isdigit():
        raise NasError(f"{space.path}: reference {name!r}: gmacs is keyed by the image's side in px, got {text!r}")
    try:
        space.at_resolution(int(text))
    except NasError as error:
        raise UsageError(
            f"{space.path}: reference {name!r}: gmacs is given at a size, where {error.message}"
        ) from error
    return int(text)
