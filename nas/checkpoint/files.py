"""safetensors files: single, sharded, in half precision; nothing that runs code when it is read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nas.errors import NasError

WEIGHTS: Final = "diffusion_pytorch_model"
NETWORK: Final = "network.safetensors"  # of our own format in a folder, such as a training run's
_INDEX: Final = ".safetensors.index"
VARIANT: Final = "fp16"


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """Named tensors and the file that each was read from.

    Attributes:
        state: name -> tensor.
        where: what errors call the source of all of them.
        files: name -> the file that holds it.
    """

    state: Mapping[str, Tensor]
    where: str
    files: Mapping[str, Path]


def read_file(path: Path, names: set[str] | None = None) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of one file.

    Args:
        path: a .safetensors file.
        names: the tensors wanted; all if None, none if empty.

    Raises:
        NasError: no such file, one that is cut short or not of this format, or a tensor that it lacks.
    """
    if not path.is_file():
        raise NasError(f"no weights file at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            held = set(file.keys())
            for name in sorted((names or set()) - held):
                raise NasError(f"{path} lacks the tensor {name}, which the index beside it says it holds")
            wanted = held if names is None else names
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys() if name in wanted}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise NasError(f"{path} is not a readable safetensors file: {error}") from error


def write_file(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Writes one file whole or not at all.

    Raises:
        NasError: the system refuses (read-only folder, full disk).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, str(temporary), metadata=dict(metadata))
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.chmod(0o644)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (SafetensorError, OSError) as error:
        raise NasError(f"cannot write {path}: {error}", hint="choose another folder with --out") from error
    return path


def read_folder(folder: Path, dtype: torch.dtype | None = None, variant: str | None = None) -> Tensors:
    """The weights of a diffusers folder.

    Args:
        folder: it holds diffusion_pytorch_model.safetensors, the same in fp16, or shards with their index.
        dtype: floating-point type wanted; that of the file if None.
        variant: "fp16" for that variant, "" for the plain one; the plain one where there is one if None.

    Raises:
        NasError: no weights, pickled ones only, a missing shard, a tensor that its shard lacks, or an unreadable file.
    """
    found = find_weights(folder, variant)
    if found is None:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        if pickled:
            raise NasError(
                f"{folder} holds its weights as {pickled[0]} only, which is not read because a pickle runs code",
                hint="use a copy with .safetensors files",
            )
        raise NasError(f"{folder} holds no weights: no {WEIGHTS}.safetensors and no {WEIGHTS}{_INDEX}.json")
    tensors = _sharded(found) if found.suffix == ".json" else _single(found)
    if dtype is None:
        return tensors
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.state.items()}
    return Tensors(state=state, where=tensors.where, files=tensors.files)


def find_weights(folder: Path, variant: str | None = None) -> Path | None:
    """The index of a folder's shards, or else its one weights file, as diffusers looks; None where there is neither."""
    names = []
    if variant in (None, ""):
        names += [f"{WEIGHTS}{_INDEX}.json", f"{WEIGHTS}.safetensors"]
    if variant in (None, VARIANT):
        names += [f"{WEIGHTS}{_INDEX}.{VARIANT}.json", f"{WEIGHTS}.{VARIANT}.safetensors"]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _single(path: Path) -> Tensors:
    _, state = read_file(path)
    return Tensors(state=state, where=str(path), files=dict.fromkeys(state, path))


def _sharded(index: Path) -> Tensors:
    """Every tensor that the index lists, from the shard that it names."""
    places = _weight_map(index)
    files = {name: index.parent / shard for name, shard in places.items()}
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise NasError(f"{index.name} in {index.parent} lists the shard {path.name}, which is not there")
    state: dict[str, Tensor] = {}
    for path in sorted(set(files.values())):
        state |= read_file(path, {name for name in files if files[name] == path})[1]
    return Tensors(state=state, where=str(index), files=files)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content: Any = json.loads(index.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise NasError(f"{index} cannot be read as JSON: {error}") from error
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise NasError(f"{index} has no 'weight_map' of tensor names to files")
    for name, shard in places.items():
        # A shard stands beside its index; a path that leads elsewhere is no file of this checkpoint.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise NasError(
                f"{index}: weight_map gives {name} the file {shard!r}; it must be a .safetensors file beside it"
            )
    return places
