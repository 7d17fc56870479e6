"""What is profiled: one network, where it comes from, and which point of our spaces it is."""

from __future__ import annotations

from dataclasses import dataclass

from nas import families
from nas.locate import Point
from nas.network import NetworkSpec
from nas.space import Candidate

# Image pixels along one side of a latent cell, for every autoencoder that the denoisers which we read work on.
PIXELS_PER_LATENT = 8


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network to profile.

    Attributes:
        name: how tables and pages call it.
        spec: its blocks and its input.
        source: the space, or the file that it was read from.
        pixels_per_latent: image pixels along one side of a latent cell.
        point: which candidate it is; None if no space holds it.
        miss: why no space holds it; empty if one does, or if nobody looked.
    """

    name: str
    spec: NetworkSpec
    source: str
    pixels_per_latent: int
    point: Point | None = None
    miss: str = ""

    @property
    def candidate(self) -> Candidate | None:
        """The candidate that it is, or None."""
        return None if self.point is None else self.point.candidate

    @property
    def image(self) -> str:
        """The size of the image in pixels, height first: "512 × 768"."""
        shape, scale = self.spec.input, self.pixels_per_latent
        return f"{shape.height * scale} × {shape.width * scale}"

    @property
    def latent(self) -> str:
        """Channels, height and width of the latent."""
        shape = self.spec.input
        return f"{shape.channels} × {shape.height} × {shape.width}"

    @property
    def resolution_px(self) -> int:
        """Height of the image in pixels."""
        return self.spec.input.height * self.pixels_per_latent

    @property
    def call(self) -> str:
        """What one run of it is: a network that is not told a timestep is no denoiser."""
        return "denoiser call" if "timestep" in self.spec.inputs else "decoder call"

    @property
    def place(self) -> str:
        """Which point of our spaces it is, as a sentence without its end; empty if nobody looked."""
        if self.point is None:
            return f"no point of our spaces: {self.miss}" if self.miss else ""
        space, names = self.point.candidate.space.name, self.point.references
        if names:
            return f"the reference {' or '.join(names)} of the space {space}"
        return f"a candidate of the space {space}"


def candidate_subject(candidate: Candidate, name: str = "", *, reference: str | None = None) -> Subject:
    """A candidate as a subject.

    Args:
        candidate: whose network.
        name: what to call it; its key if empty.
        reference: the published network that it is, where that is known.
    """
    space = candidate.space
    return Subject(
        name=name or candidate.key,
        spec=families.network(candidate),
        source=f"space {space.name}",
        pixels_per_latent=space.input.pixels_per_latent,
        point=Point(candidate=candidate, references=() if reference is None else (reference,)),
    )
