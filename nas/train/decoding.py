"""Where a decoder's training gets its teacher and pictures: a VAE, and drawings or cached images.

Legend: B batch, C channels, H W height and width of the latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas import families, formats, registry
from nas.batches import Batches, stream
from nas.build import Network, build
from nas.errors import NasError, UsageError
from nas.judge import grid
from nas.network import InputShape, NetworkSpec
from nas.space import Candidate
from nas.students import Sampling
from nas.tasks.latents import LatentBatches, Store
from nas.teachers.decoders import EMBEDDED, Decoder, Encoded, load_decoder
from nas.teachers.vae import Vae
from nas.train.recipe import DECODING as OBJECTIVE
from nas.train.recipe import Recipe, Stage, StudentSettings
from nas.train.sources import Subject

FAMILY = "decoder"
TASK = "shapes"
_GRID_PICTURES = 8
_GRID_SEED = 777  # the same pictures in every grid


def trains_decoder(recipe: Recipe) -> bool:
    """Whether a recipe's student is an image decoder."""
    return any(goal.name == OBJECTIVE for stage in recipe.stages for goal in stage.goals)


def open_decoding(subject: Subject, device: torch.device) -> Decoding:
    """The source of a decoder's training.

    Args:
        subject: the student's structure; a VAE or pipeline as teacher, "embedded" for the shipped one; and as data the
            task shapes (by default with "embedded"), or a folder that `nas cache --keep-images` wrote.
        device: to train on.

    Raises:
        UsageError: no data.
        NasError: the VAE or the data cannot be read, or they do not go together.
    """
    teacher, vae = load_decoder(subject.teacher, device=device)
    data = TASK if subject.data is None and subject.teacher == EMBEDDED else subject.data
    if data is None:
        raise UsageError(
            f"the VAE {subject.teacher} needs pictures to teach on",
            hint="cache some with nas cache IMAGES --keep-images and give the folder by --data",
        )
    if data == TASK:
        return Decoding(first=teacher, vae=vae, store=None, device=device)
    store = Store.open(Path(data))
    _check(store, vae, data)
    return Decoding(first=teacher, vae=vae, store=store, device=device)


def _check(store: Store, vae: Vae, data: str) -> None:
    """Refuses latents that this VAE's decoder cannot read, and data without pictures."""
    manifest = store.manifest
    hint = "cache the images anew: nas cache IMAGES --keep-images, with a pipeline that has this VAE"
    if manifest.latent_shape is None or not manifest.with_images:
        raise NasError(f"the data in {data} has no pictures beside its latents, which a decoder is trained on", hint)
    if manifest.latent_shape[0] != vae.channels or manifest.vae.get("scaling") != vae.scaling.to_json():
        raise NasError(
            f"the data in {data} was made with the VAE {manifest.vae.get('name')}: latents of"
            f" {manifest.latent_shape[0]} channels scaled by {manifest.vae.get('scaling', {}).get('factor')}; the"
            f" teacher {vae.name} takes {vae.channels} scaled by {vae.scaling.factor}",
            hint,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoding:
    """A `Source` of latents with their pictures.

    Attributes:
        first: the VAE's decoder, frozen, on the device.
        vae: it.
        store: cached data; None draws scenes of the task shapes and encodes them.
        device: to train on.
    """

    first: Decoder
    vae: Vae
    store: Store | None
    device: torch.device

    @property
    def identity(self) -> dict[str, Any]:
        """The VAE by its digest, and the data's; drawings are decided by the seed."""
        data = {"task": TASK} if self.store is None else {"data": self.store.digest}
        return {**data, "vae": self.vae.digest}

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is decoded."""
        if self.store is not None:
            assert self.store.manifest.latent_shape is not None  # was checked
            return self.store.manifest.latent_shape
        return self.vae.latent_shape(registry.load("nas.tasks", TASK).Task().image_shape[1])

    def teacher(self, name: str) -> nn.Module:
        """The VAE's decoder, or another's.

        Raises:
            NasError: another VAE's, whose latents are others.
        """
        if name == self.vae.name or name == EMBEDDED:
            return self.first
        other, vae = load_decoder(name, device=self.device)
        if vae.scaling != self.vae.scaling or vae.channels != self.vae.channels:
            raise NasError(f"the VAE {name} cannot take over from {self.vae.name}: its latents are scaled otherwise")
        return other

    def network(self) -> Network:
        """The teacher's decoder as a network of ours, with its weights.

        Raises:
            NasError: it is built in a way that this project does not describe.
        """
        vae: Any = self.vae.network
        module = formats.find(type(vae).__name__, self.vae.name)
        _, height, width = self.latent_shape
        spec = module.network(dict(vae.config), height=height, width=width, where=self.vae.name)
        state = {name: tensor for key, tensor in vae.state_dict().items() if (name := module.own_name(key)) is not None}
        made = build(spec, "meta")
        made.load_state_dict(state, assign=True)
        return made

    def spec(self, candidate: Candidate, settings: StudentSettings) -> NetworkSpec:
        """The candidate for this VAE's latents, its widths divided as the recipe says.

        Raises:
            UsageError: it is no decoder.
            NasError: it makes pictures of another size, or a width cannot be divided.
        """
        space = candidate.space
        if space.family != FAMILY:
            raise UsageError(
                f"{space.name} holds {space.family} networks, and this recipe trains image decoders",
                hint="--space decoder --reference snapgen-tiny",
            )
        chosen = {**space.fixed, **candidate.choices}
        factor = 2 ** (int(chosen["stages"]) - 1)
        if factor != self.vae.factor:
            raise NasError(
                f"{candidate} makes {factor}x{factor} pixels of a place, and the VAE {self.vae.name} encodes"
                f" {self.vae.factor}x{self.vae.factor}"
            )
        divisor = settings.width_divisor
        if divisor > 1:
            for name in [name for name in chosen if name.startswith("width_")]:
                width, rest = divmod(int(chosen[name]), divisor)
                if rest or not width:
                    raise NasError(f"{candidate}: {name} = {chosen[name]} cannot be divided by {divisor}")
                chosen[name] = width
            chosen["norm_groups"] = settings.norm_groups
        channels, height, width = self.latent_shape
        shape = InputShape(channels=channels, height=height, width=width)
        return families.network_of(FAMILY, chosen, shape, name=str(candidate))

    def denoiser(self, network: Network, settings: StudentSettings) -> nn.Module:
        """The network, told latents as the VAE's own decoder is."""
        return Decoder(network, self.vae.scaling).to(self.device)

    def batches(self, stage: Stage, teacher: nn.Module, seed: int) -> Batches:
        """Latents with their pictures."""
        size = stage.train.batch
        if self.store is None:
            return Encoded(vae=self.vae, pictures=drawings, size=size, seed=seed, device=self.device)
        return LatentBatches(store=self.store, size=size, seed=seed, null_share=0.0, images=True, device=self.device)

    def statement(self, stage: Stage, teacher: nn.Module) -> str:
        """What is painted."""
        if self.store is None:
            return f"scenes of the task {TASK}, drawn at every step and encoded by {self.vae.name}"
        return f"{len(self.store)} cached latents of {self.vae.name} with their pictures"

    def grid(self, denoiser: nn.Module, sampling: Sampling) -> Tensor:
        """Real pictures, the teacher's and the student's, one below the other."""
        pictures, latents = self._shown()
        mode = denoiser.training
        with torch.no_grad():
            painted = [network(latents).float().cpu() for network in (self.first, denoiser.eval())]
        denoiser.train(mode)
        return grid(torch.cat([pictures, *painted]), columns=len(pictures))

    def _shown(self) -> tuple[Tensor, Tensor]:
        """The pictures of every grid, on the CPU, and their latents: held-out scenes, or the first rows of the data."""
        if self.store is None:
            pictures = held_out(_GRID_PICTURES, _GRID_SEED)
            return pictures, self.vae.encode(pictures.to(self.device))
        rows = list(range(min(_GRID_PICTURES, len(self.store))))
        return self.store.images(rows, None), self.store.latents(rows, self.device)


def drawings(count: int, generator: torch.Generator) -> Tensor:
    """Random scenes [count, 3, 32, 32] of all training captions."""
    task = registry.load("nas.tasks", TASK).Task()
    pictures: Tensor = task.render(task.sample(count, "train", generator), generator)
    return pictures


def held_out(count: int, seed: int) -> Tensor:
    """Random scenes [count, 3, 32, 32] of captions that no training has."""
    task, generator = registry.load("nas.tasks", TASK).Task(), stream(seed)
    pictures: Tensor = task.render(task.sample(count, "held-out", generator), generator)
    return pictures
