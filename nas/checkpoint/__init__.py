"""Weights on disk: our own safetensors files, and the folders of diffusers classes, each way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nas import formats
from nas.build import Network
from nas.checkpoint.diffusers import check_folder, load_diffusers, save_diffusers, write_folder
from nas.checkpoint.files import NETWORK
from nas.checkpoint.own import load_network, load_state, read_metadata, save_network

__all__ = [
    "NETWORK",
    "check_folder",
    "load",
    "load_diffusers",
    "load_network",
    "load_state",
    "read_metadata",
    "save",
    "save_diffusers",
    "save_network",
]


def load(
    path: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Network:
    """A network of either format: a file of ours, a folder with one, a diffusers folder, or a hub id.

    Args:
        path: what `save` wrote, a training run's folder, or anything that `load_diffusers` takes.
        height: of the latent that a diffusers network is described for; the configuration's if None.
        width: likewise.
        device: where the weights go.
        dtype: floating-point type of the weights; that of the file if None.

    Raises:
        UsageError: nothing there, or a class, key or value that cannot be read.
        NasError: damaged or unfitting weights.
    """
    here = Path(path)
    own = here / NETWORK if here.is_dir() else here
    if own.is_file() or here.suffix == ".safetensors":
        network = load_network(own, device)
        return network if dtype is None else network.to(dtype)
    return load_diffusers(path, height=height, width=width, device=device, dtype=dtype)


def save(path: str | Path, network: Network, metadata: Mapping[str, Any] | None = None) -> Path:
    """Writes a network so that `load` reads it: as a plain diffusers class where that can be, else in our format.

    Args:
        path: a folder; or a .safetensors file, which is always of our format.
        network: any; a diffusers class must hold all of it, and have nothing more, as an autoencoder's encoder.
        metadata: kept in a file of our format only; a diffusers folder has no place for it.

    Returns:
        What was written: the folder, or the file.

    Raises:
        NasError: it cannot be written.
    """
    target = Path(path)
    if target.suffix == ".safetensors":
        return save_network(target, network, metadata)
    plain = formats.plain_class(network.spec)
    if plain is not None and formats.is_complete(formats.find(plain, str(target))):
        return save_diffusers(target, network)

    def write(folder: Path) -> None:
        save_network(folder / NETWORK, network, metadata)

    return write_folder(target, write)
