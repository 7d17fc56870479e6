"""`DreamLiteUNetModel`: the shape of SnapGen, with separable convolutions and shared key heads (diffusers 0.42)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from nas import families
from nas.families.unet import kv_heads
from nas.formats._reading import Reading, is_whole, prove, read, refusal
from nas.formats._unet import (
    DECIDES,
    FIXED,
    INERT,
    StageType,
    get,
    own_name,
    settings_of,
    shape_of,
    shared_config,
    stages_of,
    their_name,
)
from nas.network import BlockSpec, NetworkSpec, Scalar

__all__ = ["CLASS", "FAMILY", "config", "network", "own_name", "their_name"]

CLASS: Final = "DreamLiteUNetModel"
FAMILY: Final = "unet"

_CROSS, _PLAIN = StageType(attention=True), StageType(attention=False)
_BARE = StageType(attention=True, self_attention=False)
# The class's own names first; then those of the classes that it also reads.
_DOWN: Final = {
    "DreamLiteCrossAttnDownBlock2D": _CROSS,
    "DreamLiteCrossAttnNoSelfAttnDownBlock2D": _BARE,
    "DreamLiteDownBlock2D": _PLAIN,
    "CrossAttnDownBlock2D": _CROSS,
    "CrossAttnDownRemoveSelfAttnBlock2D": _BARE,
    "DownBlock2D": _PLAIN,
}
_UP: Final = {
    "DreamLiteCrossAttnUpBlock2D": _CROSS,
    "DreamLiteCrossAttnNoSelfAttnUpBlock2D": _BARE,
    "DreamLiteUpBlock2D": _PLAIN,
    "CrossAttnUpBlock2D": _CROSS,
    "CrossAttnUpRemoveSelfAttnBlock2D": _BARE,
    "CrossAttnUpRemoveSelfAttnBlock2DV1": _BARE,
    "UpBlock2D": _PLAIN,
}
_MID: Final = {"DreamLiteUNetMidBlock2DCrossAttn": "full", "UNetMidBlock2DCrossAttn": "full", None: "none"}

_DECIDES: Final[Mapping[str, Any]] = MappingProxyType(
    {
        **DECIDES,
        "down_block_types": (*("DreamLiteCrossAttnNoSelfAttnDownBlock2D",) * 2, "DreamLiteCrossAttnDownBlock2D"),
        "mid_block_type": "DreamLiteUNetMidBlock2DCrossAttn",
        "up_block_types": (
            "DreamLiteCrossAttnUpBlock2D",
            "DreamLiteCrossAttnNoSelfAttnUpBlock2D",
            "DreamLiteUpBlock2D",
        ),
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "attention_head_dim": 64,
        "qk_norm": "rms_norm",
        "use_sep_conv": True,
        "ff_mult": 6,
        "num_kv_heads": 1,
    }
)
_FIXED: Final = {**FIXED, "num_mid_layers": (1,)}
_EXPANSION: Final = 2  # of the class's separable convolutions


def network(
    config: Mapping[str, Any],
    *,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int = 77,
    size_ids: int | None = None,
    name: str = CLASS,
    where: str = "config.json",
) -> NetworkSpec:
    """The network of a configuration; arguments as in `nas.formats.unet2d_condition.network`.

    Raises:
        UsageError: an unknown key, or a value that our blocks do not have; names the file and the key.
    """
    reading = read(config, decides=_DECIDES, fixed=_FIXED, inert=INERT, class_name=CLASS, where=where)
    settings = settings_of(reading, down_types=_DOWN, up_types=_UP, mid_types=_MID)
    conv = f"separable-{_EXPANSION}" if reading.flag("use_sep_conv") else "full"
    settings |= {f"conv_{s}": conv for s in range(int(settings["stages"]))}
    settings["ffn_ratio"] = reading.whole("ff_mult")
    settings["qk_norm"] = reading.one_of("qk_norm", {"rms_norm": "rms_norm", None: "none"})
    settings["attention"] = _sharing(reading, settings)
    shape, more = shape_of(reading, settings, height=height, width=width, text_tokens=text_tokens, size_ids=size_ids)
    return families.network_of(FAMILY, settings | more, shape, name=name, where=where)


def _sharing(reading: Reading, settings: Mapping[str, Scalar]) -> str:
    """The word for a number of key and value heads that is the same in every stage."""
    count = reading["num_kv_heads"]
    if count is None:
        return "mha"
    stages = range(int(settings["stages"]))
    heads = [
        int(settings[f"heads_{s}"])
        for s in stages
        if settings[f"attention_{s}"]
        or settings[f"up_attention_{s}"]
        or (s == stages[-1] and settings["mid"] == "full")
    ]
    for word in ("mqa", "gqa", "mha") if is_whole(count) else ():
        if all(kv_heads(number, word) == count for number in heads):
            return word
    raise reading.refuse("num_kv_heads", f"null, 1, or a share of the {heads} heads of the stages that all have")


def config(spec: NetworkSpec) -> dict[str, Any]:
    """The class's keyword arguments that make exactly this network.

    Raises:
        NasError: the class cannot hold it; names the block and the setting.
    """
    shared = shared_config(spec)
    if shared is None:
        raise refusal(spec, CLASS, "it is not a UNet with a residual block in every stage")
    downs, ups, mid = stages_of(spec)
    transformers = [b for b in spec.blocks if b.kind == "transformer"]
    shared |= {
        "down_block_types": tuple(_name(_DOWN, stage.type) for stage in downs),
        "up_block_types": tuple(_name(_UP, stage.type) for stage in reversed(ups)),
        "mid_block_type": "DreamLiteUNetMidBlock2DCrossAttn" if mid.resnets else None,
        "use_sep_conv": downs[0].resnets[0].kind == "separable",
    }
    if transformers:
        ratio = float(get(transformers[0], "ffn_ratio", 4))
        if not ratio.is_integer():
            raise refusal(
                spec,
                CLASS,
                f"block {transformers[0].name!r} has ffn_ratio = {ratio!r}, where the class has whole numbers",
            )
        shared |= {
            "ff_mult": int(ratio),
            "qk_norm": None if get(transformers[0], "qk_norm", "none") == "none" else "rms_norm",
            "num_kv_heads": _kv_heads(transformers),
        }
    shape = spec.input
    prove(
        spec,
        CLASS,
        lambda: network(
            shared, text_tokens=shape.text_tokens, size_ids=shape.size_ids, name=spec.name, where=f"network {spec.name}"
        ),
    )
    return shared


def _name(types: Mapping[str, StageType], wanted: StageType) -> str:
    return next(name for name, kind in types.items() if kind == wanted)


def _kv_heads(blocks: list[BlockSpec]) -> int | None:
    """The class has one number for all stages, or as many as there are query heads."""
    counts = {int(get(block, "kv_heads", 0)) for block in blocks}
    heads = [int(get(block, "channels", 0)) // int(get(block, "head_width", 1)) for block in blocks]
    plain = all(get(block, "kv_heads", 0) == number for block, number in zip(blocks, heads, strict=True))
    return counts.pop() if len(counts) == 1 and not plain else None
