"""Folders of diffusers classes, read into our networks and written from them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from nas import formats
from nas.build import Network, build
from nas.checkpoint.files import NETWORK, WEIGHTS, Tensors, read_folder, write_file
from nas.checkpoint.hub import find_folder
from nas.errors import NasError

# Larger weights are written as several files, as the hub wants them; diffusers reads both.
MAX_SHARD_BYTES: Final = 5_000_000_000
_INDEX: Final = f"{WEIGHTS}.safetensors.index.json"


def load_diffusers(
    path: str | Path,
    *,
    subfolder: str | None = None,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int = 77,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    variant: str | None = None,
) -> Network:
    """The network of a diffusers folder, with its weights, in evaluation mode; no pickled file is ever read.

    Args:
        path: a folder with config.json, a pipeline's folder, or a hub id.
        subfolder: the part of a pipeline ("vae"); its denoiser if None.
        height: of the latent that the network is described for; the configuration's if None.
        width: likewise.
        text_tokens: T of the text that it is described for.
        device: where the weights go.
        dtype: floating-point type of the weights; that of the file if None.
        variant: "fp16" or "" (plain); the plain one where there is one if None.

    Raises:
        UsageError: nothing there, or a class, key or value that cannot be read.
        NasError: weights that are missing, damaged, or do not fit the configuration; names the file and the tensor.
    """
    folder = find_folder(path, subfolder, variant)
    config, where = formats.read_config(folder)
    module = formats.find(config.get("_class_name"), where)
    spec = formats.network(
        config, where, height=height, width=width, text_tokens=text_tokens, name=_name(path, subfolder)
    )
    tensors = read_folder(folder, dtype, variant)
    network = build(spec, "meta")
    state = _fitted(network, tensors, module)
    network.load_state_dict(state, assign=True)
    return network.to(device).eval()


def _name(path: str | Path, subfolder: str | None) -> str:
    name = Path(path).resolve().name if Path(path).exists() else str(path)
    return name if subfolder is None else f"{name}/{subfolder}"


def _fitted(network: Network, tensors: Tensors, module: ModuleType) -> dict[str, Tensor]:
    """The tensors under our names, proved to be those of the network."""
    wanted = network.state_dict()
    state: dict[str, Tensor] = {}
    problems = []
    for name, tensor in tensors.state.items():
        own = module.own_name(name)
        if own is None:
            continue
        place = tensors.files[name].name
        if own not in wanted:
            problems.append(f"{place} has {name}, which the network of config.json has not")
        elif tensor.shape != wanted[own].shape:
            problems.append(
                f"{place} has {name} of shape {tuple(tensor.shape)}, where config.json makes {tuple(wanted[own].shape)}"
            )
        elif not tensor.is_floating_point():
            problems.append(
                f"{place} has {name} of type {str(tensor.dtype).removeprefix('torch.')}, not floating-point"
            )
        state[own] = tensor
    problems = [f"it lacks {module.their_name(own)}" for own in wanted if own not in state] + problems
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise NasError(f"the weights {tensors.where} do not fit: {'; '.join(problems[:3])}{more}")
    return state


def save_diffusers(
    folder: str | Path,
    network: Network,
    class_name: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    encoder_from: str | Path | None = None,
) -> Path:
    """Writes config.json and the weights that the diffusers class loads with `from_pretrained`.

    The folder appears whole or not at all.

    Args:
        folder: new, empty, or holding only a network's files, which are replaced.
        network: any whose class can hold it; its weights are written in their own precision.
        class_name: the class; the first that can hold the network if None.
        max_shard_bytes: weights larger than this become several files with an index.
        encoder_from: for a decoder, the folder of an autoencoder whose encoder and configuration are written with it.

    Raises:
        NasError: no class can hold it (names the block and the setting), a decoder without `encoder_from` or one of
            another shape, or the folder cannot be written.
    """
    module, config = formats.holding(network.spec, class_name)
    state = {module.their_name(name): tensor for name, tensor in network.state_dict().items()}
    if encoder_from is not None:
        config, encoder = _autoencoder(network, Path(encoder_from))
        state |= encoder
    elif not formats.is_complete(module):
        raise NasError(
            f"network {network.spec.name} is the decoder of a diffusers {module.CLASS}, whose encoder it does not have",
            hint="give encoder_from, or save it in the format of nas, which holds every network",
        )
    version = importlib.metadata.version("diffusers")
    content = {"_class_name": module.CLASS, **config, "_diffusers_version": version}

    def write(target: Path) -> None:
        (target / formats.CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _write_weights(target, state, max_shard_bytes)

    return write_folder(Path(folder), write)


def _autoencoder(decoder: Network, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration of an autoencoder with this very decoder, and its tensors that are not the decoder's."""
    config, where = formats.read_config(folder)
    module, shape = formats.find(config.get("_class_name"), where), decoder.spec.input
    theirs = formats.network(config, where, height=shape.height, width=shape.width, name=decoder.spec.name)
    if theirs.blocks != decoder.spec.blocks:
        raise NasError(f"the decoder of {where} has another shape than network {decoder.spec.name}")
    tensors = read_folder(folder).state
    return config, {name: tensor for name, tensor in tensors.items() if module.own_name(name) is None}


def _write_weights(folder: Path, state: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        dict(state), filename_pattern=f"{WEIGHTS}{{suffix}}.safetensors", max_shard_size=max_shard_bytes
    )
    for file, names in split.filename_to_tensors.items():
        write_file(folder / file, {name: state[name] for name in names}, {"format": "pt"})
    if split.is_sharded:
        index: dict[str, Any] = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Makes a folder whole or not at all: `write` fills a sibling, which then takes its place.

    A process killed between the two moves of a replacement leaves no folder, but both beside its place, under hidden
    names.

    Args:
        folder: new, empty, or holding only a network's files, which are replaced; where it is a link, what it leads to.
        write: puts the files into the folder that it is given.

    Raises:
        NasError: the folder holds something else, or the system refuses.
    """
    place = folder.resolve()  # a folder cannot take the place of a link
    check_folder(folder)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _sibling(place) as fresh:
            write(fresh)
            fresh.chmod(0o755)
            _put(fresh, place)
    except OSError as error:
        raise NasError(f"cannot write {folder}: {error.strerror or error}", hint="choose another with --out") from error
    return folder


def check_folder(folder: Path) -> None:
    """Refuses a folder that `write_folder` would not replace, for commands that have long work to do before.

    Raises:
        NasError: it holds something else than a network's files, or is none.
    """
    try:
        found = folder.resolve()
        strangers = sorted(path.name for path in found.iterdir() if not _is_ours(path.name)) if found.exists() else []
    except OSError as error:
        raise NasError(f"cannot write {folder}: {error.strerror or error}", hint="choose another with --out") from error
    if strangers:
        raise NasError(
            f"{folder} holds {strangers[0]}, which is not of a network", hint="choose a new folder with --out"
        )


def _is_ours(name: str) -> bool:
    """Whether a file is of a network as `save` writes it, in either format."""
    weights = name.startswith(WEIGHTS) and name.endswith((".safetensors", ".json"))
    return weights or name in (formats.CONFIG, NETWORK)


def _put(fresh: Path, place: Path) -> None:
    """Moves a folder to a place; what stood there is gone afterwards, and is back if the move fails."""
    with _sibling(place) as old:
        stood = place.exists()
        if stood:
            os.replace(place, old)
        try:
            os.replace(fresh, place)
        except OSError:
            if stood:
                os.replace(old, place)
            raise


@contextmanager
def _sibling(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, on the same disk, removed at the end if it is still there."""
    path = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
