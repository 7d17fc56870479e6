"""Published denoisers as teachers: UNets of diffusers, from a local folder or the hub.

Text embeddings are not made here: such a teacher's text encoder is far larger than it, so its data set brings them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nas.diffusion import (
    TIMESTEPS,
    Prediction,
    clean_and_noise,
    convert,
    rectified_flow,
    to_variance_preserving,
    variance_preserving,
)
from nas.errors import NasError

CLASSES = ("UNet2DConditionModel", "DreamLiteUNetModel")
_PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "noise", "v_prediction": "velocity", "sample": "clean"}
_HINT = "give 'embedded', a .safetensors teacher of nas, a local diffusers folder, or a hub id that can be reached"


@dataclass(frozen=True, kw_only=True)
class Noising:
    """How the teacher was trained: rectified flow, or a discrete variance-preserving schedule.

    Attributes:
        prediction: what its network predicts.
        alpha_bar: the schedule's cumulative products [steps], falling; None for rectified flow.
    """

    prediction: Prediction
    alpha_bar: Tensor | None


class DiffusersTeacher(nn.Module):
    """A UNet of diffusers behind the signature of a rectified-flow denoiser.

    A network of a variance-preserving schedule is called at the point of equal signal-to-noise ratio, between its
    discrete steps by linear interpolation of log alpha_bar; past the schedule's ends at the nearest end, which is
    how its own sampler treats pure noise.
    """

    def __init__(self, network: nn.Module, noising: Noising) -> None:
        super().__init__()
        self.network = network
        self.noising = noising

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents it was made for."""
        config: Any = self.network.config
        return (config.in_channels, config.sample_size, config.sample_size)

    def encode(self, tokens: Tensor) -> Tensor:
        """Refused: its data set brings text embeddings."""
        raise NasError("a diffusers teacher has no text encoder here; give it text embeddings from the data set")

    def null_text(self, count: int = 1) -> Tensor:
        """Refused: its data set brings the embedding of the empty caption."""
        return self.encode(torch.empty(count, 0))

    def denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The expected clean latent [B, C, H, W] at x [B, C, H, W], t [B] in [0, 1], text [B, T, D]."""
        broad = t.to(x.dtype).view(-1, 1, 1, 1)
        if self.noising.alpha_bar is None:
            predicted = self._call(x, TIMESTEPS * t, text)
            return clean_and_noise(predicted, self.noising.prediction, x, rectified_flow(broad))[0]
        x, wanted = to_variance_preserving(x, broad)
        step, alpha_bar = self._nearest(wanted.flatten())
        at = variance_preserving(alpha_bar.to(x.dtype).view(-1, 1, 1, 1))
        return clean_and_noise(self._call(x, step, text), self.noising.prediction, x, at)[0]

    def velocity(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The expected eps - x0 [B, C, H, W]; t must be above 0."""
        clean = self.denoise(x, t, text)
        return convert(clean, "clean", "velocity", x, rectified_flow(t.to(x.dtype).view(-1, 1, 1, 1)))

    def _call(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        predicted: Tensor = self.network(x, timestep, encoder_hidden_states=text, return_dict=False)[0]
        return predicted

    def _nearest(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The fractional step [B] of each wanted alpha_bar [B], and the alpha_bar that it has."""
        assert self.noising.alpha_bar is not None
        grid = self.noising.alpha_bar.to(torch.float64).log()
        value = wanted.to(torch.float64).clamp_min(1e-12).log().clamp(grid[-1], grid[0])
        # searchsorted wants a rising grid; alpha_bar falls.
        right = torch.searchsorted(-grid, -value).clamp(1, len(grid) - 1)
        share = (grid[right - 1] - value) / (grid[right - 1] - grid[right])
        return (right - 1 + share).to(wanted.dtype), value.exp()


def load_pretrained(name: str) -> DiffusersTeacher:
    """The denoiser in a diffusers folder or hub repository, float32, frozen, in eval mode.

    It may be a pipeline (denoiser in unet/, schedule in scheduler/) or a denoiser alone with scheduler_config.json
    beside its config.json.

    Raises:
        NasError: not found or unreachable, another class, a class that wants more than text, or no schedule.
    """
    # Imported here: diffusers takes seconds to import and only this kind of teacher needs it.
    import diffusers

    if Path(name).is_absolute() or name.startswith(".") or name.count("/") != 1:
        _check_folder(Path(name))
    plain = diffusers.UNet2DConditionModel
    is_pipeline = not (Path(name) / "config.json").is_file()
    folders = {"subfolder": "unet"} if is_pipeline else {}
    config = _reach(name, plain.load_config, **folders)
    kind = config.get("_class_name")
    if kind not in CLASSES:
        raise NasError(f"the teacher {name} is a {kind}; denoisers that can teach are {', '.join(CLASSES)}", hint=_HINT)
    if config.get("addition_embed_type") == "text_time":
        raise NasError(
            f"the teacher {name} needs pooled text and image sizes besides text tokens, which is not supported"
        )
    place = {"subfolder": "scheduler"} if is_pipeline else {}
    schedule = _reach(name, diffusers.DDPMScheduler.load_config, **place)
    network = _reach(name, getattr(diffusers, kind).from_pretrained, **folders)
    teacher = DiffusersTeacher(network.float(), _noising(name, schedule))
    return teacher.requires_grad_(False).eval()


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise NasError(f"the teacher {folder} does not exist", hint=_HINT)


def _reach(name: str, load: Callable[..., Any], **options: str) -> Any:
    """What `load` finds among local files, else on the hub."""
    local = Path(name).is_dir()
    try:
        return load(name, local_files_only=True, **options)
    except OSError as error:
        if local:
            raise NasError(f"the teacher folder {name} cannot be read: {_first_line(error)}", hint=_HINT) from error
    try:
        return load(name, **options)
    except OSError as error:
        raise NasError(
            f"the teacher {name!r} is not here and cannot be fetched: {_first_line(error)}", hint=_HINT
        ) from error


def _first_line(error: OSError) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _noising(name: str, schedule: Mapping[str, Any]) -> Noising:
    import diffusers

    if str(schedule.get("_class_name", "")).startswith("FlowMatch"):
        return Noising(prediction="velocity", alpha_bar=None)
    prediction = schedule.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise NasError(
            f"the teacher {name} has prediction_type {prediction!r} in its scheduler; known: {', '.join(_PREDICTIONS)}"
        )
    alpha_bar = diffusers.DDPMScheduler.from_config(dict(schedule)).alphas_cumprod
    return Noising(prediction=_PREDICTIONS[prediction], alpha_bar=alpha_bar)
