"""Our own format: one safetensors file with the NetworkSpec in its header, which holds every network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from nas.build import Network, build
from nas.checkpoint.files import read_file, write_file
from nas.errors import NasError
from nas.network import NetworkSpec

_SPEC: Final = "nas.network"
_METADATA: Final = "nas.metadata"


def save_network(path: str | Path, network: Network, metadata: Mapping[str, Any] | None = None) -> Path:
    """Writes the weights and the NetworkSpec, whole or not at all.

    Args:
        path: a .safetensors file.
        network: its weights are written in their own precision.
        metadata: anything that JSON holds, given back by `read_metadata`.

    Raises:
        NasError: the file cannot be written.
    """
    texts = {_SPEC: json.dumps(network.spec.to_json()), _METADATA: json.dumps(dict(metadata or {}))}
    return write_file(Path(path), network.state_dict(), texts)


def load_network(path: str | Path, device: torch.device | str = "cpu") -> Network:
    """The network of a file that `save_network` wrote, with its weights, in evaluation mode.

    Raises:
        NasError: no such file, not a file of ours, or weights that do not fit its NetworkSpec.
    """
    texts, state = read_file(Path(path))
    if _SPEC not in texts:
        raise NasError(
            f"{path} holds weights but no network of nas",
            hint="use a file that nas train wrote; of a diffusers network give the folder, with its config.json",
        )
    try:
        spec = NetworkSpec.from_json(json.loads(texts[_SPEC]))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise NasError(f"{path}: the network record in the file is damaged ({error})") from error
    network = build(spec, "meta")
    load_state(network, state, where=str(path))
    return network.to(device).eval()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `save_network` was given."""
    texts, _ = read_file(Path(path), set())
    metadata: dict[str, Any] = json.loads(texts.get(_METADATA, "{}"))
    return metadata


def load_state(network: Network, state: Mapping[str, Tensor], where: str = "the state dict") -> None:
    """Gives a network (which may be on `meta`) the tensors of `state`, under our own names.

    Raises:
        NasError: names or shapes differ; the first few are listed.
    """
    own = network.state_dict()
    problems = [f"lacks {name}" for name in own if name not in state]
    problems += [f"has {name}, which the network has not" for name in state if name not in own]
    problems += [
        f"has {name} of shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise NasError(f"{where} does not fit network {network.spec.name}: it {'; '.join(problems[:3])}{more}")
    network.load_state_dict(dict(state), assign=True)
