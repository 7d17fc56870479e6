"""Weights on disk: our own safetensors files, and the state dicts and configurations of diffusers' UNet classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nas.build import Network, build
from nas.errors import NasError
from nas.network import BlockSpec, NetworkSpec, Scalar
from nas.paths import atomic_write

_SPEC, _METADATA = "nas.network", "nas.metadata"
# diffusers keeps the two output layers at the root of its network; ours are one block.
_HEAD = "head."
_HEAD_PARTS = ("conv_norm_out.", "conv_out.")


def save_network(path: str | Path, network: Network, metadata: Mapping[str, Any] | None = None) -> Path:
    """Writes the weights and the NetworkSpec, whole or not at all.

    Args:
        path: a .safetensors file.
        network: its weights are written in their own precision.
        metadata: anything that JSON holds, given back by `read_metadata`.

    Raises:
        NasError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    texts = {_SPEC: json.dumps(network.spec.to_json()), _METADATA: json.dumps(dict(metadata or {}))}
    return atomic_write(Path(path), save(tensors, metadata=texts))


def load_network(path: str | Path, device: torch.device | str = "cpu") -> Network:
    """The network of a file that `save_network` wrote, with its weights, in evaluation mode.

    Raises:
        NasError: no such file, not a file of ours, or weights that do not fit its NetworkSpec.
    """
    texts, state = _read(Path(path))
    if _SPEC not in texts:
        raise NasError(f"{path} holds weights but no network of nas", hint="use a file that nas train wrote")
    try:
        spec = NetworkSpec.from_json(json.loads(texts[_SPEC]))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise NasError(f"{path}: the network record in the file is damaged ({error})") from error
    network = build(spec, "meta")
    load_state(network, state, where=str(path))
    return network.to(device).eval()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `save_network` was given."""
    texts, _ = _read(Path(path), weights=False)
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


def to_diffusers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the names of diffusers' UNet classes; the tensors are shared, not copied."""
    return {name.removeprefix(_HEAD): tensor for name, tensor in state.items()}


def from_diffusers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers UNet's state dict under our names; the tensors are shared, not copied."""
    return {(_HEAD + name if name.startswith(_HEAD_PARTS) else name): tensor for name, tensor in state.items()}


def _read(path: Path, *, weights: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise NasError(f"no weights file at {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            texts = dict(file.metadata() or {})
            return texts, {name: file.get_tensor(name) for name in file.keys()} if weights else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise NasError(f"{path} is not a readable safetensors file: {error}") from error


# ------------------------------------------------------------------------------------ the plain diffusers class


def to_diffusers(spec: NetworkSpec) -> dict[str, Any]:
    """The configuration of diffusers' `DreamLiteUNetModel` that is this network.

    Args:
        spec: a UNet with the module paths of diffusers.

    Returns:
        Keyword arguments of the class; its weights are `to_diffusers_state(network.state_dict())`.

    Raises:
        NasError: the class cannot hold the network; names the block and the setting.
    """
    by_name = {block.name: block for block in spec.blocks}
    stages = 1 + max((int(b.name.split(".")[1]) for b in spec.blocks if b.name.startswith("down_blocks.")), default=-1)
    if not stages or "mid_block.attentions.0" not in by_name:
        raise NasError(f"network {spec.name} cannot be a diffusers DreamLiteUNetModel: it is not a UNet with a middle")
    downs = [_stage(spec, f"down_blocks.{i}") for i in range(stages)]
    ups = [_stage(spec, f"up_blocks.{i}") for i in range(stages)]
    middle = _stage(spec, "mid_block")
    for down, up in zip(downs, reversed(ups), strict=True):
        if len(up.resnets) != len(down.resnets) + 1 or (up.attentions and up.depth != (down.depth or up.depth)):
            _refuse(spec, (up.attentions or up.resnets)[0], "depth or number of units", "that of its down stage")
    _refuse_unless(spec, middle.depth == (downs[-1].depth or middle.depth), middle.attentions[0], "depth")
    transformers = [b for b in spec.blocks if b.kind == "transformer"]
    resnets = [b for b in spec.blocks if b.kind in ("resnet", "separable")]
    head_width = int(_common(spec, transformers, "head_width"))
    widths = [int(stage.resnets[0].setting("out_channels")) for stage in downs]
    return {
        "sample_size": spec.input.height if spec.input.height == spec.input.width else None,
        "in_channels": spec.input.channels,
        "out_channels": int(by_name["head"].setting("out_channels")),
        "block_out_channels": tuple(widths),
        "layers_per_block": tuple(len(stage.resnets) for stage in downs),
        # diffusers calls the number of heads attention_head_dim; a stage without transformers ignores it.
        "attention_head_dim": tuple(max(width // head_width, 1) for width in widths),
        "transformer_layers_per_block": tuple(d.depth or u.depth or 1 for d, u in zip(downs, ups[::-1], strict=True)),
        "down_block_types": tuple(stage.type_name("Down") for stage in downs),
        "mid_block_type": "DreamLiteUNetMidBlock2DCrossAttn",
        "up_block_types": tuple(stage.type_name("Up") for stage in ups),
        "cross_attention_dim": int(_common(spec, transformers, "text_width")),
        "ff_mult": _whole_ratio(spec, transformers),
        "qk_norm": None if _common(spec, transformers, "qk_norm") == "none" else "rms_norm",
        "num_kv_heads": _kv_heads(spec, transformers),
        "norm_num_groups": int(_common(spec, resnets + transformers, "norm_groups")),
        "use_sep_conv": _separable(spec, resnets),
        "use_linear_projection": True,
    }


class _Stage:
    """The blocks of one stage, and what diffusers derives its class from."""

    def __init__(self, spec: NetworkSpec, path: str) -> None:
        blocks = [b for b in spec.blocks if b.name.startswith(f"{path}.")]
        self.resnets = [b for b in blocks if ".resnets." in b.name]
        self.attentions = [b for b in blocks if ".attentions." in b.name]
        self.depth = int(self.attentions[0].setting("depth")) if self.attentions else 0
        self.self_attention = bool(self.attentions and self.attentions[0].setting("self_attention"))

    def type_name(self, side: str) -> str:
        """The diffusers class of the stage."""
        if not self.attentions:
            return f"DreamLite{side}Block2D"
        return f"DreamLiteCrossAttn{'' if self.self_attention else 'NoSelfAttn'}{side}Block2D"


def _stage(spec: NetworkSpec, path: str) -> _Stage:
    stage = _Stage(spec, path)
    for block in stage.attentions:
        _refuse_unless(spec, bool(block.setting("cross_attention")), block, "cross_attention")
        for name in ("depth", "self_attention"):
            _refuse_unless(spec, block.setting(name) == stage.attentions[0].setting(name), block, name)
    return stage


def _common(spec: NetworkSpec, blocks: list[BlockSpec], name: str) -> Scalar:
    """The value of a setting that the class has once for the whole network."""
    value = blocks[0].setting(name)
    for block in blocks:
        _refuse_unless(spec, block.setting(name) == value, block, name)
    return value


def _whole_ratio(spec: NetworkSpec, blocks: list[BlockSpec]) -> int:
    ratio = float(_common(spec, blocks, "ffn_ratio"))
    _refuse_unless(spec, ratio.is_integer(), blocks[0], "ffn_ratio")
    return int(ratio)


def _kv_heads(spec: NetworkSpec, blocks: list[BlockSpec]) -> int | None:
    counts = {int(block.setting("kv_heads")) for block in blocks}
    if len(counts) == 1:
        return counts.pop()
    # None gives every stage as many as it has query heads.
    for block in blocks:
        whole = int(block.setting("channels")) // int(block.setting("head_width"))
        _refuse_unless(spec, block.setting("kv_heads") == whole, block, "kv_heads")
    return None


def _separable(spec: NetworkSpec, blocks: list[BlockSpec]) -> bool:
    separable = blocks[0].kind == "separable"
    for block in blocks:
        if (block.kind == "separable") != separable:
            _refuse(spec, block, f"kind {block.kind!r}", f"that of every other, {blocks[0].kind!r}")
        if separable and block.setting("expansion") != 2:
            _refuse_unless(spec, False, block, "expansion")
    return separable


def _refuse_unless(spec: NetworkSpec, ok: bool, block: BlockSpec, name: str) -> None:
    if not ok:
        _refuse(spec, block, f"{name} = {block.setting(name)!r}", "one value that the class can hold there")


def _refuse(spec: NetworkSpec, block: BlockSpec, what: str, allowed: str) -> None:
    raise NasError(
        f"network {spec.name} cannot be a diffusers DreamLiteUNetModel: block {block.name!r} has {what};"
        f" it must be {allowed}",
        hint="load it with nas.checkpoint.load_network instead",
    )
