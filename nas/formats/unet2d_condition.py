"""`UNet2DConditionModel`: SD 1 and 2, SDXL, BK-SDM, KOALA, SSD-1B, Segmind-Vega and SDXS (diffusers 0.42)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from nas import families
from nas.formats._reading import prove, read, refusal
from nas.formats._unet import (
    DECIDES,
    FIXED,
    INERT,
    StageType,
    own_name,
    settings_of,
    shape_of,
    shared_config,
    stages_of,
    their_name,
)
from nas.network import NetworkSpec

__all__ = ["CLASS", "FAMILY", "config", "network", "own_name", "their_name"]

CLASS: Final = "UNet2DConditionModel"
FAMILY: Final = "unet"

_DOWN: Final = {"CrossAttnDownBlock2D": StageType(attention=True), "DownBlock2D": StageType(attention=False)}
_UP: Final = {"CrossAttnUpBlock2D": StageType(attention=True), "UpBlock2D": StageType(attention=False)}
# diffusers builds UNetMidBlock2D with one residual block and no attention (SSD-1B, Segmind-Vega).
_MID: Final = {"UNetMidBlock2DCrossAttn": "full", "UNetMidBlock2D": "residual", None: "none"}


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
    """The network of a configuration.

    Args:
        config: the content of config.json.
        height: of the latent; that of sample_size if None.
        width: likewise.
        text_tokens: T of the text.
        size_ids: how many sizes condition it beside the pooled text; see `nas.formats._unet.shape_of` for None.
        name: of the network.
        where: the file, for errors.

    Raises:
        UsageError: an unknown key, or a value that our blocks do not have; names the file and the key.
    """
    reading = read(config, decides=DECIDES, fixed=FIXED, inert=INERT, class_name=CLASS, where=where)
    settings = settings_of(reading, down_types=_DOWN, up_types=_UP, mid_types=_MID)
    shape, more = shape_of(reading, settings, height=height, width=width, text_tokens=text_tokens, size_ids=size_ids)
    return families.network_of(FAMILY, settings | more, shape, name=name, where=where)


def config(spec: NetworkSpec) -> dict[str, Any]:
    """The class's keyword arguments that make exactly this network.

    Raises:
        NasError: the class cannot hold it; names the block and the setting.
    """
    shared = shared_config(spec)
    if shared is None:
        raise refusal(spec, CLASS, "it is not a UNet with a residual block in every stage")
    downs, ups, mid = stages_of(spec)
    shared |= {
        "down_block_types": tuple("CrossAttnDownBlock2D" if s.attentions else "DownBlock2D" for s in downs),
        "up_block_types": tuple("CrossAttnUpBlock2D" if s.attentions else "UpBlock2D" for s in reversed(ups)),
        "mid_block_type": next(
            name
            for name, kind in _MID.items()
            if kind == ("full" if mid.attentions else "residual" if mid.resnets else "none")
        ),
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
