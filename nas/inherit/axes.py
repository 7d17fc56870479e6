"""What the axes of a UNet's tensors stand for, so that channels are kept together across tensors.

Every axis is one or more parts, each a run of channels of one group:

* the residual stream of a stage, on which its units, its samplers, the skips from it and, at the lowest stage, the
  middle live; stages that a residual sum joins without a projection (Stable Diffusion's two of width 1,280) are one
  group;
* the inside of a residual block, between its two convolutions;
* the tokens inside a transformer, its query heads (kept whole) with the key heads that they read, the inner channels
  of a feed-forward;
* the inside of the time embedding, and the embedding that all residual blocks read;
* sinusoidal features, which are matched by frequency;
* data (latent channels, text, sizes), which must be equal.

Groups are the teacher's. Where only the student sums two streams without a projection (its two stages are of one width,
the teacher's are not), each keeps its own choice, and no choice would make the sum the teacher's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from nas.families.unet import stage_count
from nas.network import BlockSpec, NetworkSpec

DATA: Final = "data"
FREQUENCY: Final = "frequency"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run of channels on an axis.

    Attributes:
        role: which part of the axis it is; the student's part starts from the teacher's of the same role.
        group: whose channels they are; "" for the leading ones.
        size: how many.
        unit: how many belong together (the width of a head); they are kept or dropped as one.
        shared: for key heads, how many query heads read each; the units of `group` are the query heads then.
    """

    role: str
    group: str
    size: int
    unit: int = 1
    shared: int = 1


Axis = tuple[Part, ...]
Axes = dict[str, tuple[Axis, ...]]  # tensor name below the block -> its axes


@dataclass(frozen=True, kw_only=True)
class Streams:
    """The groups of a UNet's residual streams.

    Attributes:
        stage_of: block -> the stage, counted from the outermost, whose stream its output is on.
        group_of: stage -> name of the group.
    """

    stage_of: Mapping[str, int]
    group_of: Mapping[int, str]

    def group(self, block: str) -> str:
        """The group that a block writes."""
        return self.group_of[self.stage_of[block]]


def streams(spec: NetworkSpec) -> Streams:
    """Where each block's output lives; stages joined by a sum without a projection share a group."""
    count = stage_count(spec)
    stage_of: dict[str, int] = {}
    joined = {stage: stage for stage in range(count)}
    before = 0
    for block in spec.blocks:
        if "x" not in block.writes:
            continue
        stage = _stage(block.name, count)
        if block.kind in ("resnet", "separable") and stage != before and _plain_sum(block):
            lower, upper = sorted((joined[stage], joined[before]))
            joined = {s: lower if other == upper else other for s, other in joined.items()}
        stage_of[block.name] = before = stage
    return Streams(stage_of=stage_of, group_of={s: f"stage {other}" for s, other in joined.items()})


def _plain_sum(block: BlockSpec) -> bool:
    return block.skip is None and block.setting("in_channels") == block.setting("out_channels")


def _index(name: str) -> int:
    return int(name.split(".")[1])


def _stage(name: str, count: int) -> int:
    if name.startswith("down_blocks."):
        return _index(name)
    if name.startswith("up_blocks."):
        return count - 1 - _index(name)
    return count - 1 if name.startswith("mid_block.") else 0


def axes(spec: NetworkSpec) -> dict[str, Axes]:
    """The axes of every tensor whose block kind is known here, by block and then by tensor."""
    found = streams(spec)
    given = ""
    result: dict[str, Axes] = {}
    if not found.group_of:
        return result  # no UNet: no streams to speak of, so tensors are taken whole or not at all
    for block in spec.blocks:
        make = _KINDS.get(block.kind)
        own = found.group(block.name) if "x" in block.writes else ""
        if make is not None:
            skip = found.group(block.skip) if block.skip is not None else ""
            result[block.name] = make(block, given, own, skip)
        given = own or given
    return result


def _part(role: str, group: str, size: int, unit: int = 1) -> Axis:
    return (Part(role=role, group=group, size=size, unit=unit),)


def _get(block: BlockSpec, name: str, default: Any = None) -> Any:
    return dict(block.settings).get(name, default)


def _stem(block: BlockSpec, given: str, own: str, skip: str) -> Axes:
    out = _part("x", own, _get(block, "out_channels"))
    return {"weight": (out, _part(DATA, DATA, _get(block, "in_channels"))), "bias": (out,)}


def _sampler(block: BlockSpec, given: str, own: str, skip: str) -> Axes:
    out = _part("x", own, _get(block, "out_channels") or _get(block, "channels"))
    return {"conv.weight": (out, _part("x", given, _get(block, "channels"))), "conv.bias": (out,)}


def _head(block: BlockSpec, given: str, own: str, skip: str) -> Axes:
    wide, out = _part("x", own, _get(block, "in_channels")), _part(DATA, DATA, _get(block, "out_channels"))
    return {**_norm("conv_norm_out", wide), "conv_out.weight": (out, wide), "conv_out.bias": (out,)}


def _norm(name: str, axis: Axis) -> Axes:
    return {f"{name}.weight": (axis,), f"{name}.bias": (axis,)}


def _linear(name: str, out: Axis, into: Axis) -> Axes:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _time_embedding(block: BlockSpec, given: str, own: str, skip: str) -> Axes:
    inner = _part("inner", f"{block.name} hidden", _get(block, "time_width"))
    features = _part(FREQUENCY, FREQUENCY, _get(block, "frequency_width"))
    out = _part("temb", "temb", _get(block, "time_width"))
    axes = _linear("linear_1", inner, features) | _linear("linear_2", out, inner)
    if guidance := _get(block, "guidance_width", 0):
        axes["cond_proj.weight"] = (features, _part("guidance", DATA, guidance))
    return axes


def _text_time(block: BlockSpec, given: str, own: str, skip: str) -> Axes:
    inner = _part("inner", f"{block.name} hidden", _get(block, "time_width"))
    sizes = _part("sizes", DATA, _get(block, "size_ids") * _get(block, "size_embedding_width"))
    out = _part("temb", "temb", _get(block, "time_width"))
    features = _part("pooled", DATA, _get(block, "pooled_width")) + sizes
    return _linear("linear_1", inner, features) | _linear("linear_2", out, inner)


def _resnet(block: BlockSpec, given: str, own: str, skip: str) -> Axes:
    """Both kinds of residual block; a skip is concatenated after x, and each half keeps its own group."""
    width = _get(block, "out_channels")
    inside = width * _get(block, "expansion", 1)
    x_channels = block.input("x")[0]
    into = _part("x", given, x_channels)
    if block.skip is not None:
        into += _part("skip", skip, block.input("skip")[0])
    inner, out = _part("inner", f"{block.name} inner", inside), _part("x", own, width)
    found: Axes = _norm("norm1", into) | _norm("norm2", inner)
    if _get(block, "time_width"):
        found |= _linear("time_emb_proj", inner, _part("temb", "temb", _get(block, "time_width")))
    if block.kind == "separable":
        for conv, a, b in (("conv1", into, inner), ("conv2", inner, out)):
            found |= {f"{conv}.depthwise.weight": (a,), f"{conv}.pointwise.weight": (b, a)}
    else:
        found |= _linear("conv1", inner, into) | _linear("conv2", out, inner)
    return found | _linear("conv_shortcut", out, into)


def _transformer(block: BlockSpec, given: str, own: str, skip: str) -> Axes:
    width = int(_get(block, "channels"))
    stream, tokens = _part("x", own, width), _part("tokens", f"{block.name} tokens", width)
    found: Axes = _norm("norm", stream) | _linear("proj_in", tokens, stream) | _linear("proj_out", stream, tokens)
    for layer in range(int(_get(block, "depth"))):
        path = f"transformer_blocks.{layer}"
        found |= {name: ax for n in (1, 2, 3) for name, ax in _norm(f"{path}.norm{n}", tokens).items()}
        for name, into in (("attn1", tokens), ("attn2", _part(DATA, DATA, int(_get(block, "text_width"))))):
            found |= _attention(block, f"{path}.{name}", tokens, into)
        inner = int(width * _get(block, "ffn_ratio"))
        group = f"{block.name}.{path} feed-forward"
        # GEGLU: a hidden half and the half that gates it, channel by channel.
        halves = _part("hidden", group, inner) + _part("gate", group, inner)
        found |= _linear(f"{path}.ff.net.0.proj", halves, tokens)
        found |= _linear(f"{path}.ff.net.2", tokens, _part("hidden", group, inner))
    return found


def _attention(block: BlockSpec, path: str, tokens: Axis, into: Axis) -> Axes:
    head, kv_heads, width = (int(_get(block, name)) for name in ("head_width", "kv_heads", "channels"))
    heads = width // head
    # Query heads that share keys in groups cannot be chosen one by one: then the leading ones are kept.
    group = f"{block.name}.{path} heads" if kv_heads in (1, heads) else ""
    queries = _part("heads", group, width, head)
    shared = Part(role="keys", group=group, size=kv_heads * head, unit=head, shared=heads // kv_heads)
    each = _part("head", "", head)
    return {
        f"{path}.to_q.weight": (queries, tokens),
        f"{path}.to_k.weight": ((shared,), into),
        f"{path}.to_v.weight": ((shared,), into),
        **_linear(f"{path}.to_out.0", tokens, queries),
        f"{path}.norm_q.weight": (each,),
        f"{path}.norm_k.weight": (each,),
    }


_KINDS: Final = {
    "stem": _stem,
    "time_embedding": _time_embedding,
    "text_time": _text_time,
    "resnet": _resnet,
    "separable": _resnet,
    "transformer": _transformer,
    "downsample": _sampler,
    "upsample": _sampler,
    "head": _head,
}

# The tensors that make the channels of their first axis: what a group's importance is summed over.
_MAKERS: Final = (
    "conv_in",
    "conv.weight",
    "conv1.weight",
    "conv2.weight",
    "pointwise.weight",
    "conv_shortcut.weight",
    "proj_in.weight",
    "proj_out.weight",
    "to_q.weight",
    "to_k.weight",
    "to_v.weight",
    "to_out.0.weight",
    "proj.weight",
    "net.2.weight",
    "linear_1.weight",
    "linear_2.weight",
)


def makes_channels(tensor: str, block: str) -> bool:
    """Whether a tensor produces the channels of its first axis."""
    return tensor.endswith(_MAKERS) or (tensor == "weight" and block in _MAKERS)
