"""What a folder of cached latents holds, and whether a teacher can be taught from it.

Legend: C channels, H W height and width of the latent, T text tokens, D text width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from nas.errors import NasError
from nas.network import InputShape
from nas.paths import atomic_write

MANIFEST: Final = "manifest.json"
FORMAT: Final = "nas-latents-1"
_MAKE: Final = "nas cache IMAGES --pipeline ID --out FOLDER makes one"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of rows.

    Attributes:
        name: of the file, in the folder.
        rows: how many there are in it.
        bytes: its size.
        sha256: of its content.
    """

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is in a folder of cached data, and what it was made with.

    Attributes:
        latent_shape: (C, H, W) of an image's latent; None where there are prompts only.
        conditions: the shape of one row of each part of `nas.diffusion.Conditioning`: tokens (T, D) and so on.
        image_size: side of the images in px; None for prompts.
        with_images: whether the pixels are there too, for decoders.
        vae: its name, digest, class ("kind"), scaling and factor; empty for prompts.
        text: name and digest of the pipeline whose text encoders were used, and their classes.
        shards: files of rows, in order.
        null: the file of the conditions of no prompt.
        identity: what decides the content, as it was asked for.
        skipped: images that could not be read.
    """

    latent_shape: tuple[int, int, int] | None
    conditions: dict[str, tuple[int, ...]]
    image_size: int | None
    with_images: bool = False
    vae: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    shards: tuple[Shard, ...]
    null: Shard
    identity: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """How many there are in all."""
        return sum(shard.rows for shard in self.shards)

    @property
    def digest(self) -> str:
        """SHA-256 of what a training sees: the contents of all files, not where they lie or what they came from."""
        content = [self.latent_shape, self.conditions, self.with_images]
        files = [each.sha256 for each in (*self.shards, self.null)]
        return hashlib.sha256(json.dumps([content, files], sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> Path:
        """Writes manifest.json, whole or not at all."""
        return atomic_write(folder / MANIFEST, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            NasError: there is none, it is unfinished, or it is of another format.
        """
        path = folder / MANIFEST
        if not path.is_file():
            if list(folder.glob("*.ledger.json")):
                raise NasError(f"the data in {folder} is not finished", hint="run the same nas cache command again")
            raise NasError(f"{folder} holds no cached data: it has no {MANIFEST}", hint=_MAKE)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found = data.pop("format", None)
            if found != FORMAT:
                raise NasError(f"{path} has format {found!r}, {FORMAT!r} is needed", hint=_MAKE)
            shape = data["latent_shape"]
            return cls(
                **{
                    **data,
                    "latent_shape": None if shape is None else tuple(shape),
                    "conditions": {name: tuple(each) for name, each in data["conditions"].items()},
                    "shards": tuple(Shard(**each) for each in data["shards"]),
                    "null": Shard(**data["null"]),
                    "skipped": tuple(data["skipped"]),
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise NasError(f"{path} is damaged: {error}", hint=_MAKE) from error


def check_fit(manifest: Manifest, teacher: Any, name: str = "the teacher") -> None:
    """Refuses data that a teacher, and so its student, cannot be asked about.

    Args:
        manifest: of the data.
        teacher: any of `nas.teachers`: `image_shape`, and where it has them `conditions` and `scaling`.
        name: what errors call it.

    Raises:
        NasError: latents of other channels or another scaling, or conditions that it needs and the data lacks or has
            in another width; both values are named.
    """
    made = f"cached with the VAE {manifest.vae.get('name')}"
    if manifest.latent_shape is not None:
        channels, wanted = manifest.latent_shape[0], int(teacher.image_shape[0])
        if channels != wanted:
            raise NasError(
                f"the data has latents of {channels} channels ({made}) and {name} takes {wanted}",
                hint="cache the images with the teacher's own pipeline: nas cache IMAGES --pipeline TEACHER",
            )
        scaling = getattr(teacher, "scaling", None)
        if scaling is not None:
            _check_scaling(manifest.vae.get("scaling", {}), scaling.to_json(), name, made)
    for part, width in getattr(teacher, "conditions", {}).items():
        given = manifest.conditions.get(part)
        if given is None or given[-1] != width:
            found = "none" if given is None else f"them of width {given[-1]}"
            raise NasError(
                f"{name} needs {part} of width {width}, and the data, made with {manifest.text.get('name')}, has"
                f" {found}",
                hint="cache the data with the teacher's own pipeline: nas cache IMAGES --pipeline TEACHER",
            )


def check_input(manifest: Manifest, shape: InputShape, latent: tuple[int, int, int], name: str) -> None:
    """Refuses data that a student's network cannot be trained on.

    Args:
        manifest: of the data.
        shape: what the network takes.
        latent: (C, H, W) of the data's latents; of prompts alone, of what the teacher was made for.
        name: what errors call the network.

    Raises:
        NasError: the data has latents, text or sizes of another shape; names both.
    """
    conditions = {part: each[-1] for part, each in manifest.conditions.items()}
    channels, height, width = latent
    # What the network takes, what the data has, and whether more than it reads does no harm.
    pairs = {
        "latent channels": (shape.channels, channels, False),
        "latent height": (shape.height, height, False),
        "latent width": (shape.width, width, False),
        "text width": (shape.text_width, conditions.get("tokens", 0), False),
        "pooled width": (shape.pooled_width, conditions.get("pooled", 0), True),
        "sizes": (shape.size_ids, conditions.get("size_ids", 0), True),
    }
    wrong = {each: pair for each, pair in pairs.items() if pair[0] != pair[1] and not (pair[2] and pair[0] == 0)}
    if wrong:
        told = ", ".join(f"{each} {ours} where the data has {given}" for each, (ours, given, _) in wrong.items())
        size = {"latent height", "latent width"} & wrong.keys()
        raise NasError(
            f"{name} has {told}",
            hint=f"--resolution {manifest.image_size} makes it for images of that size"
            if size and manifest.image_size
            else "cache the data with the pipeline that the space is of",
        )


def _check_scaling(ours: Mapping[str, Any], theirs: Mapping[str, Any], name: str, made: str) -> None:
    """Scalings are compared only between VAEs of one class: a tiny one gives latents that are scaled already."""
    if ours.get("kind") != theirs["kind"]:
        return
    for key in ("factor", "shift", "mean", "sd"):
        if ours.get(key) != theirs[key]:
            raise NasError(
                f"the data has latents with scaling {key} {ours.get(key)} ({made}) and the VAE of {name} has"
                f" {theirs[key]}; no factor makes the latents of one VAE those of another",
                hint="cache the images with the teacher's own pipeline: nas cache IMAGES --pipeline TEACHER",
            )
