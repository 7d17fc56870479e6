"""`AutoencoderTiny`: the decoder of TAESD, TAESDXL and TAESD3 (diffusers 0.42).

Of the class's two halves only the decoder is ours; `own_name` passes the encoder over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from nas import families
from nas.errors import UsageError
from nas.formats._reading import is_whole, prove, read, refusal
from nas.network import BlockSpec, InputShape, NetworkSpec, Scalar

__all__ = ["CLASS", "FAMILY", "config", "network", "own_name", "their_name"]

CLASS: Final = "AutoencoderTiny"
FAMILY: Final = "decoder"

_DECIDES: Final[Mapping[str, Any]] = {
    "out_channels": 3,
    "decoder_block_out_channels": (64, 64, 64, 64),
    "num_decoder_blocks": (3, 3, 3, 1),
    "latent_channels": 4,
}
_FIXED: Final[Mapping[str, tuple[Any, ...]]] = {
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}
# The encoder's, and numbers that are used around the decoder rather than in it. diffusers writes block_out_channels
# beside decoder_block_out_channels.
_INERT: Final = (
    "in_channels",
    "encoder_block_out_channels",
    "num_encoder_blocks",
    "block_out_channels",
    "latent_magnitude",
    "latent_shift",
    "force_upcast",
    "scaling_factor",
    "shift_factor",
)
_DECODER: Final = "decoder."


def network(
    config: Mapping[str, Any],
    *,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int = 77,
    name: str = CLASS,
    where: str = "config.json",
) -> NetworkSpec:
    """The decoder of a configuration.

    Args:
        config: the content of config.json.
        height: of the latent; the class has no sample_size to take it from.
        width: likewise.
        text_tokens: not read; a decoder takes no text.
        name: of the network.
        where: the file, for errors.

    Raises:
        UsageError: an unknown key, a value that our blocks do not have, or no height or width; names the file.
    """
    reading = read(config, decides=_DECIDES, fixed=_FIXED, inert=_INERT, class_name=CLASS, where=where)
    widths, counts = (reading[key] for key in ("decoder_block_out_channels", "num_decoder_blocks"))
    if not isinstance(widths, list | tuple) or not widths or not all(map(is_whole, widths)) or len(set(widths)) > 1:
        raise reading.refuse("decoder_block_out_channels", "a list of equal whole numbers above 0, one per stage")
    if not isinstance(counts, list | tuple) or len(counts) != len(widths) or not all(map(is_whole, counts)):
        raise reading.refuse("num_decoder_blocks", f"a list of {len(widths)} whole numbers above 0")
    if height is None or width is None:
        raise UsageError(f"{where}: {CLASS} has no sample_size, so the height and width of the latent must be given")
    settings: dict[str, Scalar] = {
        "style": "taesd",
        "stages": len(widths),
        "norm_groups": 1,  # it has no norms
        "out_channels": reading.whole("out_channels"),
    }
    for stage, (wide, count) in enumerate(zip(widths, counts, strict=True)):
        settings |= {f"width_{stage}": wide, f"resnets_{stage}": count}
    shape = InputShape(channels=reading.whole("latent_channels"), height=height, width=width)
    return families.network_of(FAMILY, settings, shape, name=name, where=where)


def config(spec: NetworkSpec) -> dict[str, Any]:
    """The class's keyword arguments that make exactly this decoder; the encoder is the class's own.

    Raises:
        NasError: the class cannot hold it; names the block and the setting.
    """
    stages = _stages(spec)
    if not stages or not all(stages) or spec.blocks[-1].kind != "conv":
        raise refusal(spec, CLASS, "it is not a decoder of TAESD's kind")
    made: dict[str, Any] = {
        "out_channels": spec.blocks[-1].setting("out_channels"),
        "decoder_block_out_channels": tuple(stage[0].setting("out_channels") for stage in stages),
        "num_decoder_blocks": tuple(len(stage) for stage in stages),
        "latent_channels": spec.input.channels,
    }
    size: dict[str, Any] = {"height": spec.input.height, "width": spec.input.width, "name": spec.name}
    prove(spec, CLASS, lambda: network(made, where=f"network {spec.name}", **size))
    return made


def _stages(spec: NetworkSpec) -> list[list[BlockSpec]]:
    """The residual blocks between one convolution and the next."""
    stages: list[list[BlockSpec]] = []
    for block in spec.blocks[:-1]:
        if block.kind == "conv":
            stages.append([])
        elif block.kind == "tiny_resnet" and stages:
            stages[-1].append(block)
    return stages


def own_name(name: str) -> str | None:
    """The name of one of the class's tensors in our network; None for the encoder's."""
    return name.removeprefix(_DECODER) if name.startswith(_DECODER) else None


def their_name(name: str) -> str:
    """The inverse of `own_name`."""
    return f"{_DECODER}{name}"
