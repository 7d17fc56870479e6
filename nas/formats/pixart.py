"""diffusers' PixArtTransformer2DModel: PixArt-alpha, PixArt-Sigma and networks cut from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from nas import families
from nas.errors import UsageError
from nas.formats import _reading
from nas.network import BlockSpec, InputShape, NetworkSpec, Scalar

CLASS: Final = "PixArtTransformer2DModel"
FAMILY: Final = "dit"

# The keys that decide the network, with the class's defaults.
_DECIDES: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "sample_size": 128,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "interpolation_scale": None,
    "use_additional_conditions": None,
    "caption_channels": None,
    "num_embeds_ada_norm": 1000,
}
_FIXED: dict[str, tuple[Any, ...]] = {
    "dropout": (0.0,),
    "attention_bias": (True,),
    "upcast_attention": (False,),
    "norm_type": ("ada_norm_single",),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6,),
    "attention_type": ("default",),
    # Written by older versions, whose class had these keys.
    "double_self_attention": (False,),
    "only_cross_attention": (False,),
    "use_linear_projection": (False,),
    "num_vector_embeds": (None,),
}
_INERT = ("norm_num_groups",)
_FFN_KINDS = {"gelu-approximate": "gelu", "geglu": "geglu"}
_FFN_RATIO = 4  # of diffusers' FeedForward
_TRAINED_SIDE = 64  # interpolation_scale is by default sample_size over this
_CONDITIONED_SIDE = 128  # use_additional_conditions is by default whether sample_size is this
_AT_ROOT = ("scale_shift_table", "proj_out")  # of theirs; ours has them in its head


def network(
    config: Mapping[str, Any],
    *,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int = 77,
    name: str,
    where: str,
) -> NetworkSpec:
    """The network of a configuration.

    Args:
        config: the content of config.json.
        height: of the latent, in its own pixels; that of sample_size if None.
        width: likewise.
        text_tokens: T of the text that it will be called with (PixArt-alpha 120, PixArt-Sigma 300).
        name: of the network.
        where: the file, for errors.

    Raises:
        UsageError: an unknown key, or a value that our blocks do not have.
    """
    reading = _reading.read(config, decides=_DECIDES, fixed=_FIXED, inert=_INERT, class_name=CLASS, where=where)
    side = reading.whole("sample_size")
    reading.whole("num_embeds_ada_norm")  # decides nothing, but the class refuses to work without
    channels = reading.whole("in_channels")
    tokens_width = reading.whole("num_attention_heads") * reading.whole("attention_head_dim")
    projected = reading["caption_channels"] is not None
    text_width = reading.whole("caption_channels" if projected else "cross_attention_dim")
    if projected and reading["cross_attention_dim"] != tokens_width:
        raise reading.refuse("cross_attention_dim", f"{tokens_width}, the width that caption_channels are brought to")
    settings: dict[str, Scalar] = {
        "width": tokens_width,
        "heads": reading.whole("num_attention_heads"),
        "patch_size": _patch_size(reading, side),
        "depth": reading.whole("num_layers"),
        "kv_sharing": "mha",
        "ffn_ratio": _FFN_RATIO,
        "ffn_kind": reading.one_of("activation_fn", _FFN_KINDS),
        "attention": "full",
        "text": "cross",
        "caption_projection": projected,
        "out_channels": channels if reading["out_channels"] is None else reading.whole("out_channels"),
        "sample_size": side,
    }
    if reading["interpolation_scale"] is not None:
        settings["interpolation_scale"] = reading.number("interpolation_scale")
    else:
        settings["interpolation_scale"] = max(side // _TRAINED_SIDE, 1)
    conditioned = side == _CONDITIONED_SIDE
    if reading["use_additional_conditions"] is not None:
        conditioned = reading.flag("use_additional_conditions")
    if conditioned and tokens_width % 3:
        raise reading.refuse(
            "use_additional_conditions", f"false, because {tokens_width} channels are not a multiple of 3"
        )
    shape = InputShape(
        channels=channels,
        height=height or side,
        width=width or side,
        text_tokens=text_tokens,
        text_width=text_width,
        size_ids=3 if conditioned else 0,
    )
    return families.network_of(FAMILY, settings, shape, name=name, where=where)


def config(spec: NetworkSpec) -> dict[str, Any]:
    """The class's keyword arguments that make exactly this network.

    Raises:
        NasError: the first block and setting that the class cannot hold.
    """
    patches = _block(spec, "pos_embed", "patch_embedding")
    layer = _block(spec, "transformer_blocks.0", "dit_block")
    head = _block(spec, "head", "dit_head")
    settings = dict(layer.settings)
    width, heads = int(settings["width"]), int(settings["heads"])
    projected = any(block.kind == "text_projection" for block in spec.blocks)
    kinds = {ours: theirs for theirs, ours in _FFN_KINDS.items()}
    scale = float(dict(patches.settings).get("interpolation_scale", 1.0))
    found = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": spec.input.channels,
        "out_channels": int(head.setting("out_channels")),
        "num_layers": sum(block.kind == "dit_block" for block in spec.blocks),
        "cross_attention_dim": width if projected else spec.input.text_width,
        "sample_size": int(patches.setting("base_size")) * int(patches.setting("patch_size")),
        "patch_size": int(patches.setting("patch_size")),
        "activation_fn": kinds[str(settings.get("ffn_kind", "gelu"))],
        "interpolation_scale": int(scale) if scale.is_integer() else scale,
        "use_additional_conditions": bool(spec.input.size_ids),
        "caption_channels": spec.input.text_width if projected else None,
    }

    def rebuild() -> NetworkSpec:
        shape = spec.input
        return network(
            found,
            height=shape.height,
            width=shape.width,
            text_tokens=shape.text_tokens,
            name=spec.name,
            where=f"network {spec.name}",
        )

    _reading.prove(spec, CLASS, rebuild)
    return found


def own_name(name: str) -> str | None:
    """Our name of one of their tensors: what stands at their root is in our head."""
    return f"head.{name}" if name.partition(".")[0] in _AT_ROOT else name


def their_name(name: str) -> str:
    """Their name of one of our tensors."""
    return name.removeprefix("head.")


def _patch_size(reading: _reading.Reading, side: int) -> int:
    patch = reading.whole("patch_size")
    if side % patch:
        raise UsageError(f"{reading.where}: patch_size = {patch} must divide sample_size = {side}")
    return patch


def _block(spec: NetworkSpec, name: str, kind: str) -> BlockSpec:
    found = next((block for block in spec.blocks if block.name == name), None)
    if found is None or found.kind != kind:
        what = "no block" if found is None else f"a block of kind {found.kind!r}"
        raise _reading.refusal(spec, CLASS, f"it has {what} at {name!r}, where the class has a {kind}")
    return found
