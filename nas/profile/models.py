"""Networks that people bring: a diffusers config.json, a checkpoint's folder, a model of the hub, or a file of ours."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from nas import families, formats, locate
from nas.build import check
from nas.checkpoint import NETWORK, load_network
from nas.errors import NasError, UsageError
from nas.network import NetworkSpec
from nas.profile.subject import PIXELS_PER_LATENT, Subject

_OURS = ".safetensors"
_SIZE_MISSING = "the height and width of the latent must be given"  # how the formats say it
_PROBE = 64  # side of a latent that every class can take


def model_subject(model: str, resolution: int | None = None, *, text_tokens: int = 77) -> Subject:
    """The network of a model.

    Args:
        model: a config.json, a folder with one (or a pipeline's folder), a .safetensors file written by `nas` or the
            folder of a run with one, or OWNER/NAME or OWNER/NAME/SUBFOLDER on the hub.
        resolution: side of the image in px; the model's own if None.
        text_tokens: T of the text that it is called with.

    Raises:
        UsageError: there is no such model, its class or a key of its configuration is not known, or it cannot take
            images of this size.
        NasError: it cannot be read, or fetched.
    """
    path = Path(model)
    for own in (path, path / NETWORK):
        if own.suffix == _OURS and own.is_file():
            return _own_file(own, resolution, name=path.stem)
    config, where = formats.read_config(path if path.exists() else _fetched(model))

    def make(height: int | None, width: int | None) -> NetworkSpec:
        spec = formats.network(config, where, height=height, width=width, text_tokens=text_tokens)
        try:
            check(spec)
        except NasError as error:  # values that only a block knows not to go together
            raise UsageError(f"{where}: {error.message}", hint=error.hint) from error
        return spec

    try:
        spec, scale = _sized(make, resolution, where)
    except UsageError as error:
        if resolution is None and _SIZE_MISSING in error.message:
            raise UsageError(error.message, hint="--resolution PX") from error
        raise
    return _located(replace(spec, name=_name(path, model)), source=where, scale=scale)


def _sized(
    make: Callable[[int | None, int | None], NetworkSpec], resolution: int | None, where: str
) -> tuple[NetworkSpec, int]:
    """The network for images of `resolution` px, and its pixels per latent cell."""
    if resolution is None:
        spec = make(None, None)
        return spec, _scale(spec)
    scale = _scale(make(_PROBE, _PROBE))
    side, rest = divmod(resolution, scale)
    if rest or side < 1:
        raise UsageError(f"resolution {resolution} px must be a positive multiple of {scale} px for {where}")
    try:
        return make(side, side), scale
    except NasError as error:  # its latent cannot be halved as often as it must
        raise UsageError(f"resolution {resolution} px does not suit {where}: {error.message}") from error


def _scale(spec: NetworkSpec) -> int:
    """Pixels per latent cell: what a decoder enlarges by; a denoiser works on the latent of such a decoder."""
    if "timestep" in spec.inputs:
        return PIXELS_PER_LATENT
    return spec.blocks[-1].input("x")[1] // spec.input.height


def _own_file(path: Path, resolution: int | None, name: str) -> Subject:
    spec = replace(load_network(path).spec, name=name)
    found = _located(spec, source=str(path), scale=_scale(spec))
    if resolution is None or resolution == found.resolution_px:
        return found
    if found.candidate is None:
        raise UsageError(
            f"{path} can be profiled at its own latent only ({found.latent}), because it is no point of our spaces"
        )
    moved = found.candidate.space.at_resolution(resolution).candidate(**found.candidate.choices)
    return _located(replace(families.network(moved), name=name), source=str(path), scale=found.pixels_per_latent)


def _located(spec: NetworkSpec, *, source: str, scale: int) -> Subject:
    found = locate.search(spec)
    subject = Subject(name=spec.name, spec=spec, source=source, pixels_per_latent=scale)
    if isinstance(found, locate.Point):
        # The space knows its decoder's scale; a class of a network does not.
        return replace(subject, point=found, pixels_per_latent=found.candidate.space.input.pixels_per_latent)
    return replace(subject, miss=f"in {found.space}, {found.reason}" if found.space else found.reason)


def _name(path: Path, model: str) -> str:
    """What a path calls a model: "vega" of vega.json, vega/config.json or vega/unet/config.json; a hub id as it is."""
    if not path.exists():
        return model.replace("/", "-")
    path = path.resolve()
    if path.is_file() and path.stem != "config":
        return path.stem
    folder = path.parent if path.is_file() else path
    return folder.parent.name if folder.name in (*formats.DENOISERS, "vae") else folder.name


def _fetched(model: str) -> Path:
    """The config.json of a model on the hub, from its cache where it is there."""
    parts = model.split("/")
    if len(parts) not in (2, 3) or not all(parts) or model[0] in ".~" or Path(model).suffix in (_OURS, ".json"):
        raise UsageError(
            f"no model at {model}: there is no such file or folder, and a model on the hub is OWNER/NAME",
            hint="nas profile --model PATH/TO/config.json",
        )
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
    )

    repository = "/".join(parts[:2])
    folders = (parts[2],) if len(parts) == 3 else (*formats.DENOISERS, "")
    tried = [f"{folder}/{formats.CONFIG}".lstrip("/") for folder in folders]
    reason = f"has none of {', '.join(tried)} for it"
    try:
        for file in tried:
            if isinstance(cached := try_to_load_from_cache(repository, file), str):
                return Path(cached)
        for file in tried:
            with suppress(RemoteEntryNotFoundError):
                return Path(hf_hub_download(repository, file))
    except LocalEntryNotFoundError:
        reason = f"cannot be reached, and none of {', '.join(tried)} is in its cache here"
    except (HfHubHTTPError, HFValidationError) as error:
        reason = f"answers: {str(error).splitlines()[0]}"
    raise NasError(f"no model at {model}: there is no such file or folder, and the hub {reason}")
