"""Trained networks on disk: weights, how to ask them, how to sample them, and where they came from.

`network.safetensors` holds the network (its NetworkSpec in the header, see nas.checkpoint) and a record of everything
else, so that `nas sample`, `nas evaluate` and a later stage of a recipe need only the file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.blocks.time_embedding import guidance_features
from nas.build import Network
from nas.checkpoint import load_network, read_metadata, save_network
from nas.diffusion import (
    FLOW,
    Conditioning,
    FlowDenoiser,
    NativeDenoiser,
    Preconditioner,
    Schedule,
    sample,
    sample_few,
)
from nas.errors import NasError, UsageError
from nas.features import body
from nas.teachers.decoders import Decoder
from nas.teachers.vae import Scaling

WEIGHTS = "network.safetensors"
_HINT = "nas train STUDY#CANDIDATE makes one"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a trained network wants to be sampled.

    Attributes:
        steps: Euler steps along the flow, for a network that was not distilled to few steps.
        guidance: of classifier-free guidance with it.
        times: of a few-step model, the falling times at which it predicts (`nas.diffusion.sample_few`); empty for one
            that is sampled by Euler steps.
        unit_start: see `nas.diffusion.sample_few`.
        choices: other lists of times that a few-step model can be sampled at, each of another length.
    """

    steps: int = 20
    guidance: float = 2.0
    times: tuple[float, ...] = ()
    unit_start: bool = True
    choices: tuple[tuple[float, ...], ...] = ()

    @property
    def calls(self) -> int:
        """Denoiser calls per image; with guidance each is of two texts."""
        return len(self.times) or self.steps

    def at(self, steps: int) -> Sampling:
        """The same network sampled in another number of steps.

        A few-step model takes the list of `choices` of that length, else the first `steps` of its times: it has learnt
        to predict the clean image at those, and at no others.

        Raises:
            UsageError: fewer than 1, or more than a few-step model has times for.
        """
        if steps < 1:
            raise UsageError(f"sampling needs at least 1 step, got {steps}")
        if not self.times:
            return replace(self, steps=steps)
        for times in self.choices:
            if len(times) == steps:
                return replace(self, times=times)
        if steps > len(self.times):
            possible = sorted({*range(1, len(self.times) + 1), *map(len, self.choices)})
            raise UsageError(
                f"this network was distilled to few steps and cannot be sampled in {steps}; possible are"
                f" {', '.join(map(str, possible))}"
            )
        return replace(self, times=self.times[:steps])


@dataclass(frozen=True, kw_only=True)
class TrainedStudent:
    """A trained network read from disk.

    Attributes:
        denoiser: in eval mode; or an image decoder, which is asked for pictures of latents and never sampled.
        sampling: how it wants to be sampled.
        about: whatever else `save_student` was given: task, teacher, teacher_digest, recipe, candidate, ...
        path: the file.
    """

    denoiser: FlowDenoiser | NativeDenoiser | Decoder
    sampling: Sampling
    about: dict[str, Any] = field(default_factory=dict)
    path: Path


def save_student(path: Path, denoiser: nn.Module, sampling: Sampling, about: dict[str, Any]) -> Path:
    """Writes a denoiser or decoder of ours into one safetensors file, whole or not at all.

    Args:
        path: the file.
        denoiser: a FlowDenoiser, NativeDenoiser or Decoder around a network of ours.
        sampling: how to sample it.
        about: JSON-like; "denoiser" and "sampling" are added.
    """
    network = getattr(denoiser, "network", None)
    if not isinstance(network, Network):
        raise NasError(f"a student is a network of ours behind a denoiser, got {type(denoiser).__name__}")
    if isinstance(denoiser, FlowDenoiser):
        how: dict[str, Any] = {
            "kind": "flow",
            "preconditioner": asdict(denoiser.preconditioner),
            "patch": denoiser.patch,
        }
    elif isinstance(denoiser, Decoder):
        how = {"kind": "decoder", "scaling": denoiser.scaling.to_json()}
    else:
        schedule: Schedule = getattr(denoiser, "schedule", FLOW)
        levels = None if schedule.alpha_bar is None else schedule.alpha_bar.double().tolist()
        how = {"kind": "native", "prediction": schedule.prediction, "alpha_bar": levels}
    return save_network(path, network, {**about, "denoiser": how, "sampling": asdict(sampling)})


def load_student(source: Path, device: str = "cpu") -> TrainedStudent:
    """The trained network in a file, or in a run's folder.

    Raises:
        NasError: no such file, or a file of another kind.
    """
    path = source / WEIGHTS if source.is_dir() else source
    about = read_metadata(path)
    how, sampling = about.pop("denoiser", None), about.pop("sampling", None)
    if how is None or sampling is None:
        raise NasError(f"{path} is not a network that nas train wrote", hint=_HINT)
    network = load_network(path, device)
    denoiser: FlowDenoiser | NativeDenoiser | Decoder
    if how["kind"] == "flow":
        given = how["preconditioner"]
        preconditioner = Preconditioner(mean=tuple(given["mean"]), sd=given["sd"])
        denoiser = FlowDenoiser(network, preconditioner, patch=how["patch"])
    elif how["kind"] == "decoder":
        denoiser = Decoder(network, Scaling.from_json(how["scaling"]))
    else:
        levels = None if how["alpha_bar"] is None else torch.tensor(how["alpha_bar"], dtype=torch.float64)
        denoiser = NativeDenoiser(network, Schedule(prediction=how["prediction"], alpha_bar=levels))
    lists = {"times": tuple(sampling["times"]), "choices": tuple(map(tuple, sampling.get("choices", ())))}
    chosen = Sampling(**{**sampling, **lists})
    return TrainedStudent(denoiser=denoiser.eval(), sampling=chosen, about=about, path=path)


def draw(
    denoiser: Any,
    sampling: Sampling,
    text: Conditioning,
    null_text: Conditioning,
    *,
    shape: tuple[int, ...],
    generator: torch.Generator,
) -> Tensor:
    """Images [B, C, H, W] as the network wants to be sampled.

    Args:
        denoiser: whatever can be asked for clean images.
        sampling: how.
        text: the conditions of B images.
        null_text: of no caption, one row or B; few-step models do not use it.
        shape: (C, H, W) of one image.
        generator: CPU generator of all noise; its first draw is the starting noise.
    """
    if sampling.times:
        return sample_few(
            denoiser,
            told(denoiser, text, sampling.guidance),
            times=sampling.times,
            shape=shape,
            generator=generator,
            unit_start=sampling.unit_start,
        )
    # Guidance that is applied outside is none inside.
    return sample(
        denoiser,
        told(denoiser, text, 1.0),
        null_text,
        shape=shape,
        generator=generator,
        steps=sampling.steps,
        guidance=sampling.guidance,
    )


def takes_guidance(denoiser: Any) -> int:
    """The width of the guidance embedding that the network was distilled to take; 0 where it takes none."""
    spec = getattr(body(denoiser), "spec", None) if isinstance(denoiser, nn.Module) else None
    width: int = 0 if spec is None else spec.inputs.get("guidance", (0,))[0]
    return width


def told(denoiser: Any, text: Conditioning, guidance: float) -> Conditioning:
    """The conditions with the guidance scale k embedded, where the network takes it (LCM's w is k - 1)."""
    width = takes_guidance(denoiser)
    if not width or text.guidance is not None:
        return text
    w = torch.full((len(text),), guidance - 1.0, device=text.device)
    return replace(text, guidance=guidance_features(w, width).to(text.tokens.dtype))
