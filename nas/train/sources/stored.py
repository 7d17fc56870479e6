"""A folder of latents and text embeddings that nas cache made, and diffusers teachers that fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas import families
from nas.batches import Batches
from nas.build import Network
from nas.checkpoint import load_diffusers
from nas.diffusion import FLOW, NativeDenoiser
from nas.judge import LatentPipeline, drawn, grid
from nas.judge.scoring import SEED
from nas.network import NetworkSpec
from nas.objectives import is_game
from nas.space import Candidate
from nas.students import Sampling
from nas.tasks.latents import Task, check_fit, check_input
from nas.teachers import DiffusersTeacher, load_teacher, teacher_digest
from nas.train.recipe import SamplingSettings, Stage, StudentSettings
from nas.train.sources.source import times_of


class Stored:
    """See `nas.train.sources.source.Source`.

    Args:
        teacher: the first, on the device.
        name: its, as for `nas.teachers.load_teacher`.
        folder: of the data.
        sampling: its `prompts` are drawn in every grid.
        device: to train on.

    Raises:
        NasError: no such data, or the teacher does not fit it.
    """

    def __init__(
        self, teacher: DiffusersTeacher, name: str, folder: str, sampling: SamplingSettings, device: torch.device
    ) -> None:
        self.task = Task(Path(folder))
        self.manifest = self.task.store.manifest
        check_fit(self.manifest, teacher, f"the teacher {name}")
        self.first = teacher
        self.name = name
        self._names: dict[nn.Module, str] = {teacher: name}
        self.prompts = sampling.prompts
        self.device = device
        self._pipeline: LatentPipeline | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The digest of all rows; where they lie does not matter."""
        return {"data": self.task.digest}

    def teacher(self, name: str) -> nn.Module:
        """A teacher of diffusers.

        Raises:
            NasError: it takes other latents or other text than the data has.
        """
        if name == self.name:
            return self.first
        loaded: Any = load_teacher(name, device=self.device)
        check_fit(self.manifest, loaded, f"the teacher {name}")
        self._names[loaded] = name
        found: nn.Module = loaded
        return found

    def network(self) -> Network:
        """The teacher's denoiser as a network of ours."""
        _, height, width = self._latents()
        tokens = self.manifest.conditions["tokens"][0]
        return load_diffusers(self.name, height=height, width=width, text_tokens=tokens)

    def _latents(self) -> tuple[int, int, int]:
        """(C, H, W) of the data's latents; of prompts alone, of what the teacher was made for."""
        return self.manifest.latent_shape or self.first.image_shape

    def spec(self, candidate: Candidate, settings: StudentSettings) -> NetworkSpec:
        """The candidate's network as it is.

        Raises:
            NasError: the data has latents, text or sizes of another shape; names both.
        """
        spec = families.network(candidate)
        check_input(self.manifest, spec.input, self._latents(), str(candidate))
        return spec

    def denoiser(self, network: Network, settings: StudentSettings) -> nn.Module:
        """The network with its teacher's schedule and prediction, or as a rectified flow."""
        schedule = self.first.schedule if settings.keep_schedule else FLOW
        return NativeDenoiser(network, schedule).to(self.device)

    def batches(self, stage: Stage, teacher: nn.Module, seed: int) -> Batches:
        """Rows of the folder; with the teacher's cached answers where there are any and they are enough."""
        size, device = stage.train.batch, self.device
        if stage.data == "prompts":
            return self.task.prompts(size, seed=seed, null_share=stage.null_share, device=device)
        # A game asks the teacher about images that nobody has drawn before.
        playing = any(is_game(each) for each in stage.objectives)
        return self.task.batches(
            size,
            seed=seed,
            null_share=stage.null_share,
            times=times_of(stage, teacher),
            teacher_digest=None if playing else teacher_digest(self._names[teacher]),
            device=device,
        )

    def statement(self, stage: Stage, teacher: nn.Module) -> str:
        """How many rows there are, at which times, and whether samples are drawn."""
        what = f"{self.manifest.rows:,} {stage.data} in {self.task.folder}"
        if stage.data == "images":
            batches: Any = self.batches(stage, teacher, 0)
            what = f"{what}; {batches.statement()}"
        return what if self.prompts else f"{what}; no samples are drawn, because sampling.prompts has none"

    def grid(self, denoiser: nn.Module, sampling: Sampling) -> Tensor | None:
        """What the recipe's prompts look like, by the text encoders and the VAE of the first teacher's pipeline."""
        if not self.prompts:
            return None
        if self._pipeline is None:
            # Imported here: it brings transformers, which a run without samples does not need.
            from nas.teachers.pipeline import load_pipeline

            asked: Any = self.first
            self._pipeline = LatentPipeline(
                published=load_pipeline(self.name, device=self.device),
                teacher=asked,
                shape=self._latents(),
                device=str(self.device),
            )
        network: Any = denoiser
        prompts = self._pipeline.prompts(self.prompts)
        return grid(drawn(network, self._pipeline, sampling, prompts, seed=SEED))
