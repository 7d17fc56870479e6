"""Published denoisers as teachers: pipelines of diffusers, from a local folder or the hub.

Text embeddings are not made here: such a teacher's text encoder is often larger than it is, so its data set brings
them (`nas cache`); `nas.teachers.pipeline` makes them where prompts are typed.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from nas.checkpoint.files import VARIANT, find_weights
from nas.checkpoint.hub import find_folder
from nas.diffusion import Conditioning, NativeDenoiser, Schedule
from nas.errors import NasError, UsageError
from nas.teachers.calls import Interface, interface
from nas.teachers.files import content_digest, first_line, read_json
from nas.teachers.vae import Scaling

HINT: Final = (
    "give 'embedded', a .safetensors teacher of nas, a local diffusers folder, or a hub id that can be reached"
)
_SCHEDULER: Final = "scheduler_config.json"
_SIDE_FILES: Final = ("model_index.json", f"scheduler/{_SCHEDULER}", _SCHEDULER, "vae/config.json")


class DiffusersTeacher(NativeDenoiser):
    """A denoiser of diffusers behind the signature of a rectified-flow denoiser.

    Args:
        network: of a class that `nas.teachers.calls` knows.
        schedule: what it was trained on.
        interface: how it is called.
        scaling: of the latents it was trained on; None where no VAE lies beside it.
    """

    def __init__(
        self, network: nn.Module, schedule: Schedule, interface: Interface, scaling: Scaling | None = None
    ) -> None:
        super().__init__(network, schedule, interface.call)
        self.interface = interface
        self.scaling = scaling

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents it was made for."""
        config: Any = self.network.config
        side = config.sample_size
        height, width = side if isinstance(side, list | tuple) else (side, side)
        return (self.interface.channels, height, width)

    @property
    def conditions(self) -> dict[str, int]:
        """The parts of `Conditioning` that it needs, and each one's width."""
        return dict(self.interface.conditions)

    def encode(self, tokens: Tensor) -> Conditioning:
        """Refused: its data set brings text embeddings."""
        raise NasError(
            "a diffusers teacher has no text encoder here; give it text embeddings from the data set",
            hint="nas cache IMAGES --pipeline ID --out FOLDER makes them",
        )

    def null_text(self, count: int = 1) -> Conditioning:
        """Refused: its data set brings the embedding of the empty caption."""
        return self.encode(torch.empty(count, 0))


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the parts of a teacher lie on disk.

    Attributes:
        denoiser: folder with config.json and weights.
        schedule: file of the scheduler's configuration.
        vae: the VAE's config.json; None where it is not there.
        name: what errors call it.
    """

    denoiser: Path
    schedule: Path
    vae: Path | None
    name: str

    def files(self) -> Iterator[tuple[str, Path]]:
        """What decides its answers: configuration, schedule and weights."""
        yield "schedule", self.schedule
        for path in sorted(self.denoiser.iterdir()):
            if path.suffix in (".safetensors", ".json"):
                yield path.name, path


def find_teacher(name: str) -> Place:
    """The parts of a diffusers folder or hub repository, fetched where they are on the hub.

    It may be a pipeline (denoiser in unet/ or transformer/, schedule in scheduler/) or a denoiser alone with
    scheduler_config.json beside its config.json.

    Raises:
        NasError: not found or unreachable, or no schedule.
    """
    try:
        denoiser = find_folder(name)
    except UsageError as error:
        raise NasError(f"the teacher {name} cannot be read: {error.message}", hint=HINT) from error
    except NasError as error:
        raise NasError(f"the teacher {name} cannot be fetched: {error.message}", hint=HINT) from error
    root = Path(name) if Path(name).is_dir() else _side_files(name)
    inside = root if (root / "scheduler").is_dir() else denoiser.parent
    schedules = (inside / "scheduler" / _SCHEDULER, denoiser / _SCHEDULER)
    schedule = next((path for path in schedules if path.is_file()), None)
    if schedule is None:
        raise NasError(
            f"the teacher {name} has no schedule: neither {schedules[0]} nor {schedules[1]} is there", hint=HINT
        )
    vae = inside / "vae" / "config.json"
    return Place(denoiser=denoiser, schedule=schedule, vae=vae if vae.is_file() else None, name=name)


def _side_files(repository: str) -> Path:
    """The small files of a hub repository beside its denoiser."""
    # Imported here: only a hub id needs it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_SIDE_FILES)))
    except OSError as error:
        raise NasError(f"the teacher {repository} cannot be fetched: {first_line(error)}", hint=HINT) from error


def pretrained_digest(name: str) -> str:
    """SHA-256 over the contents of the denoiser's configuration, weights and schedule.

    Raises:
        NasError: as `find_teacher`.
    """
    return content_digest(find_teacher(name).files())


def load_pretrained(
    name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> DiffusersTeacher:
    """The denoiser in a diffusers folder or hub repository, frozen, in eval mode; no pickled file is read.

    Args:
        name: see `find_teacher`.
        device: where it goes.
        dtype: of its weights; it is asked and answers in the data's own precision all the same.

    Raises:
        NasError: not found or unreachable, another class, conditions that no data here brings, no schedule, or weights
            that are missing or damaged.
    """
    # Imported here: diffusers takes seconds to import and only this kind of teacher needs it.
    import diffusers

    place = find_teacher(name)
    where = f"the teacher {name}"
    config = read_json(place.denoiser / "config.json")
    plain = getattr(diffusers, str(config.get("_class_name")), None)
    # Refused before gigabytes are read; the class's defaults fill in what an old configuration lacks.
    interface(config if plain is None else _defaults(plain) | config, where)
    weights = find_weights(place.denoiser)
    if weights is None:
        raise NasError(f"{where} has no .safetensors weights in {place.denoiser}", hint=HINT)
    variant = VARIANT if f".{VARIANT}." in weights.name else None
    assert plain is not None  # otherwise refused above
    try:
        network = plain.from_pretrained(
            place.denoiser, dtype=dtype, use_safetensors=True, variant=variant, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise NasError(f"{where} cannot be read: {first_line(error)}", hint=HINT) from error
    scaling = None if place.vae is None else Scaling.of(read_json(place.vae))
    schedule = Schedule.of(read_json(place.schedule), where)
    teacher = DiffusersTeacher(network.to(device), schedule, interface(network.config, where), scaling)
    return teacher.requires_grad_(False).eval()


def _defaults(plain: type) -> dict[str, Any]:
    """What a class takes for the keys that a configuration lacks."""
    parameters = inspect.signature(plain).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty}
