"""`AutoencoderKL`: the decoder of the image VAEs of Stable Diffusion 1 to 3, SDXL and FLUX (diffusers 0.42).

Of the class's two halves only the decoder is ours, with post_quant_conv in front of it where the configuration has one;
`own_name` passes the encoder over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from nas import families
from nas.errors import UsageError
from nas.formats._reading import Reading, is_whole, prove, read, refusal
from nas.network import BlockSpec, InputShape, NetworkSpec, Scalar

__all__ = ["CLASS", "FAMILY", "config", "network", "own_name", "their_name"]

CLASS: Final = "AutoencoderKL"
FAMILY: Final = "decoder"

_UP: Final = "UpDecoderBlock2D"
_DOWN: Final = "DownEncoderBlock2D"
_DECIDES: Final[Mapping[str, Any]] = {
    "out_channels": 3,
    "up_block_types": (_UP,),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_FIXED: Final[Mapping[str, tuple[Any, ...]]] = {"act_fn": ("silu", "swish")}
# The encoder's, and numbers that are used around the decoder rather than in it.
_INERT: Final = (
    "in_channels",
    "down_block_types",
    "use_quant_conv",
    "scaling_factor",
    "shift_factor",
    "latents_mean",
    "latents_std",
    "force_upcast",
)
# The attention's layers had other names before diffusers 0.12, and many checkpoints still have them.
_OLD_NAMES: Final = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OUTPUT: Final = ("conv_norm_out.", "conv_out.")  # ours lie in one block, `head`
_POST_QUANT: Final = "post_quant_conv."
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
        height: of the latent; the image's sample_size over the decoder's enlargement if None.
        width: likewise.
        text_tokens: not read; a decoder takes no text.
        name: of the network.
        where: the file, for errors.

    Raises:
        UsageError: an unknown key, or a value that our blocks do not have; names the file and the key.
    """
    reading = read(config, decides=_DECIDES, fixed=_FIXED, inert=_INERT, class_name=CLASS, where=where)
    widths = reading["block_out_channels"]
    if not isinstance(widths, list | tuple) or not widths or not all(map(is_whole, widths)):
        raise reading.refuse("block_out_channels", "a list of whole numbers above 0, one per stage")
    reading.each("up_block_types", len(widths), lambda kind: kind == _UP, f'"{_UP}"')
    settings: dict[str, Scalar] = {
        "style": "vae",
        "stages": len(widths),
        "mid": "attention" if reading.flag("mid_block_add_attention") else "residual",
        "norm_groups": reading.whole("norm_num_groups"),
        "out_channels": reading.whole("out_channels"),
        "post_quant_conv": reading.flag("use_post_quant_conv"),
    }
    for stage, wide in enumerate(reversed(widths)):
        settings |= {f"width_{stage}": wide, f"resnets_{stage}": reading.whole("layers_per_block") + 1}
    high, wide = _latent_size(reading, height, width, 1 << (len(widths) - 1))
    shape = InputShape(channels=reading.whole("latent_channels"), height=high, width=wide)
    return families.network_of(FAMILY, settings, shape, name=name, where=where)


def _latent_size(reading: Reading, height: int | None, width: int | None, scale: int) -> tuple[int, int]:
    """Height and width of the latent; sample_size is the image's here, unlike a denoiser's."""
    size = reading["sample_size"]
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(map(is_whole, sides)):
        raise reading.refuse("sample_size", "a side, or a height and a width")
    high, wide = height or sides[0] // scale, width or sides[1] // scale
    if not high or not wide:
        raise UsageError(
            f"{reading.where}: sample_size = {size!r} is less than one latent cell of {scale} pixels, so the height and"
            " width of the latent must be given"
        )
    return high, wide


def config(spec: NetworkSpec) -> dict[str, Any]:
    """The class's keyword arguments that make exactly this decoder; the encoder comes out as its mirror image.

    Raises:
        NasError: the class cannot hold it; names the block and the setting.
    """
    blocks = {block.name: block for block in spec.blocks}
    stages = _stages(blocks)
    if "conv_in" not in blocks or "head" not in blocks or not stages:
        raise refusal(spec, CLASS, "it is not a VAE's decoder")
    try:
        widths = [int(found[0].setting("out_channels")) for found in stages]
        groups, out_channels = blocks["head"].setting("norm_groups"), blocks["head"].setting("out_channels")
    except KeyError as error:
        raise refusal(spec, CLASS, f"block {stages[0][0].name!r} is of kind {stages[0][0].kind!r}") from error
    shape, scale = spec.input, 1 << (len(stages) - 1)
    made: dict[str, Any] = {
        "out_channels": out_channels,
        "down_block_types": (_DOWN,) * len(stages),
        "up_block_types": (_UP,) * len(stages),
        "block_out_channels": tuple(reversed(widths)),
        "layers_per_block": len(stages[0]) - 1,
        "latent_channels": shape.channels,
        "norm_num_groups": groups,
        "sample_size": shape.height * scale,
        "use_post_quant_conv": "post_quant_conv" in blocks,
        "mid_block_add_attention": "mid_block.attentions.0" in blocks,
    }
    if not made["layers_per_block"]:
        raise refusal(spec, CLASS, "its stages have a single residual block, and the class has at least two")
    size: dict[str, Any] = {"height": shape.height, "width": shape.width, "name": spec.name}
    prove(spec, CLASS, lambda: network(made, where=f"network {spec.name}", **size))
    return made


def _stages(blocks: Mapping[str, BlockSpec]) -> list[list[BlockSpec]]:
    """The residual blocks of each stage, in order."""
    stages: list[list[BlockSpec]] = []
    while found := [block for name, block in blocks.items() if name.startswith(f"up_blocks.{len(stages)}.resnets.")]:
        stages.append(found)
    return stages


def own_name(name: str) -> str | None:
    """The name of one of the class's tensors in our network; None for the encoder's."""
    if name.startswith(_POST_QUANT):
        return name
    if not name.startswith(_DECODER):
        return None
    own = name.removeprefix(_DECODER)
    if own.startswith(_OUTPUT):
        return f"head.{own}"
    if own.startswith("mid_block.attentions."):
        path, _, layer = own.removesuffix(".weight").removesuffix(".bias").rpartition(".")
        if layer in _OLD_NAMES:
            return f"{path}.{_OLD_NAMES[layer]}.{own.rpartition('.')[2]}"
    return own


def their_name(name: str) -> str:
    """The inverse of `own_name`, in the names of today."""
    return name if name.startswith(_POST_QUANT) else f"{_DECODER}{name.removeprefix('head.')}"
