"""What diffusers' UNet classes share: their keys, and the settings of the family `unet` that those mean.

`attention_head_dim` is, by an old slip of naming that diffusers keeps, the NUMBER of heads
(https://github.com/huggingface/diffusers/issues/2011#issuecomment-1547958131).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from nas.errors import UsageError
from nas.families.unet import stage_count
from nas.formats._reading import Reading, is_whole, latent_size
from nas.network import BlockSpec, InputShape, NetworkSpec, Scalar

# The keys that decide the network, with the defaults of UNet2DConditionModel.
DECIDES: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "sample_size": None,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None,
        "attention_head_dim": 8,
        "use_linear_projection": False,
        "only_cross_attention": False,
        "time_embedding_dim": None,
        "time_cond_proj_dim": None,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None,
    }
)
# The keys that our blocks have at these values only, the default first.
FIXED: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {
        "center_input_sample": (False,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "dropout": (0.0,),
        "act_fn": ("silu", "swish"),
        "num_attention_heads": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "dual_cross_attention": (False,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0,),
        "time_embedding_type": ("positional",),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "mid_block_only_cross_attention": (None, False),
        "cross_attention_norm": (None,),
    }
)
# Precision of the attention's softmax, and the heads of an addition_embed_type that is refused.
INERT: Final = ("upcast_attention", "addition_embed_type_num_heads")

# Width of OpenCLIP bigG's pooled text, which SDXL and its refiner take, and the sizes that SDXL gives beside it.
_BIGG_POOLED: Final = 1280
_SDXL_SIZES: Final = 6
_TIME_FACTOR: Final = 4  # time embedding over the first stage's width
_HEAD: Final = "head."
_HEAD_PARTS: Final = ("conv_norm_out.", "conv_out.")


@dataclass(frozen=True, kw_only=True)
class StageType:
    """What a diffusers block type has in its units."""

    attention: bool
    self_attention: bool = True


def settings_of(
    reading: Reading,
    *,
    down_types: Mapping[str, StageType],
    up_types: Mapping[str, StageType],
    mid_types: Mapping[str | None, str],
) -> dict[str, Scalar]:
    """The settings of the family `unet` that the shared keys mean.

    Raises:
        UsageError: a value that the blocks do not have, or lists of different lengths.
    """
    count = len(_sequence(reading, "block_out_channels"))
    widths = reading.each("block_out_channels", count, is_whole, "whole numbers above 0")
    downs = [_type(reading, "down_block_types", name, down_types) for name in _types(reading, "down", count)]
    # The up path runs from the lowest stage; everything below is by stage, the outermost first.
    ups = [_type(reading, "up_block_types", name, up_types) for name in _types(reading, "up", count)][::-1]
    resnets = reading.each("layers_per_block", count, is_whole, "a whole number above 0")
    heads = reading.each("attention_head_dim", count, is_whole, "a whole number above 0 (of heads)")
    mid = reading.one_of("mid_block_type", mid_types)
    reading.each("only_cross_attention", count, lambda value: value is False, "false")
    if reading["time_embedding_dim"] not in (None, _TIME_FACTOR * widths[0]):
        raise reading.refuse("time_embedding_dim", f"null or {_TIME_FACTOR * widths[0]}")
    settings: dict[str, Scalar] = {
        "stages": count,
        "norm_groups": reading.whole("norm_num_groups"),
        "norm_eps": reading.number("norm_eps"),
        "out_channels": reading.whole("out_channels"),
        "projection": "linear" if reading.flag("use_linear_projection") else "conv",
        "mid": mid,
    }
    for s, (down, up) in enumerate(zip(downs, ups, strict=True)):
        attends = down.attention or up.attention or (s == count - 1 and mid == "full")
        if attends and widths[s] % heads[s]:
            raise reading.refuse(
                "attention_head_dim", f"a divisor of the width {widths[s]} (it is the number of heads)"
            )
        if down.attention and up.attention and down.self_attention != up.self_attention:
            raise reading.refuse("up_block_types", "with or without self-attention as the down stage of the same width")
        settings |= {
            f"width_{s}": widths[s],
            f"resnets_{s}": resnets[s],
            f"heads_{s}": heads[s] if attends else 1,
            f"attention_{s}": down.attention,
            f"up_attention_{s}": up.attention,
            f"self_attention_{s}": (down if down.attention else up).self_attention,
        }
    return settings | _depths(reading, resnets)


def _depths(reading: Reading, resnets: Sequence[int]) -> dict[str, Scalar]:
    """Transformer layers of every unit: one number for a stage, or one per unit."""
    count = len(resnets)
    key, back = "transformer_layers_per_block", "reverse_transformer_layers_per_block"

    def allowed(value: object) -> bool:
        return is_whole(value) or (isinstance(value, list | tuple) and bool(value) and all(map(is_whole, value)))

    downs = reading.each(key, count, allowed, "a whole number above 0 or one per unit")
    if reading[back] is None and any(not is_whole(value) for value in downs):
        raise reading.refuse(back, f"given, because {key} has a list inside")
    ups = downs[::-1]
    if reading[back] is not None:
        ups = reading.each(back, count, allowed, "a whole number above 0 or one per unit")
    settings: dict[str, Scalar] = {}
    for s, (down, up) in enumerate(zip(downs, ups[::-1], strict=True)):
        for name, value, units, where in (("depth", down, resnets[s], key), ("up_depth", up, resnets[s] + 1, back)):
            each = list(value) if isinstance(value, list | tuple) else [value]
            settings[f"{name}_{s}"] = each[0]
            if isinstance(value, list | tuple):
                if len(each) != units:
                    raise reading.refuse(where, f"of {units} entries for the units of stage {s}, where it has a list")
                settings |= {f"{name}_{s}_{unit}": depth for unit, depth in enumerate(each)}
    first = downs[-1]
    settings["mid_depth"] = first if isinstance(first, int) else first[0]
    return settings


def shape_of(
    reading: Reading,
    settings: Mapping[str, Scalar],
    *,
    height: int | None,
    width: int | None,
    text_tokens: int,
    size_ids: int | None,
) -> tuple[InputShape, dict[str, Scalar]]:
    """What the network is called with, and the setting that its sizes need, if it is conditioned on them.

    The configuration holds only the sum of the pooled text's width and the sizes' features. Where `size_ids` is None,
    the pooled text is OpenCLIP bigG's 1,280 if that leaves a whole number of sizes (6 in SDXL, 5 in its refiner), else
    there are 6 sizes; parameters are the same in any case.

    Raises:
        UsageError: no size, or sums that do not work out.
    """
    high, wide = latent_size(reading, height, width)
    stages = int(settings["stages"])
    attends = settings["mid"] == "full" or any(
        settings[f"{side}attention_{s}"] for s in range(stages) for side in ("", "up_")
    )
    text_width = _text_width(reading, stages) if attends else 0
    pooled, sizes, more = _conditions(reading, size_ids)
    shape = InputShape(
        channels=reading.whole("in_channels"),
        height=high,
        width=wide,
        text_tokens=text_tokens if attends else 0,
        text_width=text_width,
        pooled_width=pooled,
        size_ids=sizes,
        guidance_width=0 if reading["time_cond_proj_dim"] is None else reading.whole("time_cond_proj_dim"),
    )
    return shape, more


def _text_width(reading: Reading, stages: int) -> int:
    widths = reading.each("cross_attention_dim", stages, is_whole, "a whole number above 0")
    if len(set(widths)) != 1:
        raise reading.refuse("cross_attention_dim", "the same for every stage")
    return int(widths[0])


def _conditions(reading: Reading, size_ids: int | None) -> tuple[int, int, dict[str, Scalar]]:
    """Width of the pooled text, number of sizes, and the setting of their width."""
    if reading["addition_embed_type"] is None:
        return 0, 0, {}
    reading.one_of("addition_embed_type", {None: None, "text_time": None})
    whole = reading.whole("projection_class_embeddings_input_dim")
    each = reading.whole("addition_time_embed_dim")
    count = size_ids
    if count is None:
        rest = whole - _BIGG_POOLED
        count = rest // each if rest > 0 and rest % each == 0 else _SDXL_SIZES
    pooled = whole - count * each
    if pooled < 1:
        raise reading.refuse("projection_class_embeddings_input_dim", f"above {count} sizes of {each} features")
    return pooled, count, {"size_embedding_width": each}


def _sequence(reading: Reading, key: str) -> Sequence[Any]:
    value = reading[key]
    if not isinstance(value, list | tuple) or not value:
        raise reading.refuse(key, "a list with one entry per stage")
    return value


def _types(reading: Reading, side: str, count: int) -> Sequence[Any]:
    found = _sequence(reading, f"{side}_block_types")
    if len(found) != count:
        raise reading.refuse(f"{side}_block_types", f"a list of {count}, as block_out_channels is")
    return found


def _type(reading: Reading, key: str, name: object, known: Mapping[str, StageType]) -> StageType:
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"{reading.where}: {key} has {name!r}, which is not supported; known: {', '.join(known)}")
    return known[name]


def own_name(name: str) -> str | None:
    """Our name of a tensor: diffusers keeps the two output layers at the root of its network; ours are one block."""
    return _HEAD + name if name.startswith(_HEAD_PARTS) else name


def their_name(name: str) -> str:
    """Diffusers' name of a tensor."""
    return name.removeprefix(_HEAD)


# --------------------------------------------------------------------------------------------- from a network


class Stage:
    """The blocks of one stage of a network, by the module path that they hang on."""

    def __init__(self, spec: NetworkSpec, path: str) -> None:
        blocks = [b for b in spec.blocks if b.name.startswith(f"{path}.")]
        self.resnets = [b for b in blocks if ".resnets." in b.name]
        self.attentions = [b for b in blocks if ".attentions." in b.name]
        self.depths = [int(get(b, "depth", 1)) for b in self.attentions]

    @property
    def type(self) -> StageType:
        """What its diffusers block type has."""
        own = bool(self.attentions) and bool(get(self.attentions[0], "self_attention", True))
        return StageType(attention=bool(self.attentions), self_attention=own or not self.attentions)

    @property
    def depth(self) -> int | list[int]:
        """One number if all units agree, else one per unit; 1 where there are no transformers."""
        return self.depths if len(set(self.depths)) > 1 else (self.depths or [1])[0]

    @property
    def heads(self) -> int | None:
        """Number of query heads; None where there are no transformers."""
        if not self.attentions:
            return None
        return int(get(self.attentions[0], "channels", 0)) // int(get(self.attentions[0], "head_width", 1))


def get(block: BlockSpec, name: str, default: Scalar) -> Any:
    """A block's setting; `default` where it is left out."""
    return dict(block.settings).get(name, default)


def stages_of(spec: NetworkSpec) -> tuple[list[Stage], list[Stage], Stage]:
    """The down stages, the up stages and the middle; stages are in the order of their widths, the outermost first."""
    count = stage_count(spec)
    downs = [Stage(spec, f"down_blocks.{i}") for i in range(count)]
    ups = [Stage(spec, f"up_blocks.{count - 1 - i}") for i in range(count)]
    return downs, ups, Stage(spec, "mid_block")


def shared_config(spec: NetworkSpec) -> dict[str, Any] | None:
    """The keyword arguments that both classes have, but for the names of block types; None where it is no UNet.

    They are read off the blocks that usually decide them; whether they make this very network is proved afterwards.
    """
    downs, ups, mid = stages_of(spec)
    by_name = {block.name: block for block in spec.blocks}
    if not downs or not all(stage.resnets for stage in (*downs, *ups)) or not {"conv_in", "head"} <= set(by_name):
        return None
    transformers = [b for b in spec.blocks if b.kind == "transformer"]
    shape, head = spec.input, by_name["head"]
    config: dict[str, Any] = {
        "sample_size": shape.height if shape.height == shape.width else (shape.height, shape.width),
        "in_channels": shape.channels,
        "out_channels": int(get(head, "out_channels", shape.channels)),
        "block_out_channels": tuple(int(get(stage.resnets[0], "out_channels", 0)) for stage in downs),
        "layers_per_block": _one_or_all([len(stage.resnets) for stage in downs]),
        "norm_num_groups": int(get(head, "norm_groups", 32)),
        "norm_eps": float(get(downs[0].resnets[0], "norm_eps", DECIDES["norm_eps"])),
        "use_linear_projection": all(get(b, "projection", "linear") == "linear" for b in transformers),
        **_heads(downs, ups, mid),
        **_layers(downs, ups, mid),
        **_added(by_name.get("add_embedding"), shape),
    }
    if transformers:
        config["cross_attention_dim"] = int(get(transformers[0], "text_width", 0))
    if shape.guidance_width:
        config["time_cond_proj_dim"] = shape.guidance_width
    return config


def _one_or_all(values: Sequence[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else tuple(values)


def _heads(downs: Sequence[Stage], ups: Sequence[Stage], mid: Stage) -> dict[str, Any]:
    found = [down.heads or up.heads for down, up in zip(downs, ups, strict=True)]
    found[-1] = found[-1] or mid.heads
    known = [heads for heads in found if heads]
    if not known:
        return {}
    if len(set(known)) == 1 and len(known) > 1:
        return {"attention_head_dim": known[0]}
    # A stage without transformers ignores its number; the published configurations go on with the same head width.
    by_width = next(s for s, heads in enumerate(found) if heads)
    widths = [int(get(stage.resnets[0], "out_channels", 0)) for stage in downs]
    head_width = widths[by_width] // (found[by_width] or 1)
    return {"attention_head_dim": tuple(h or max(w // head_width, 1) for h, w in zip(found, widths, strict=True))}


def _layers(downs: Sequence[Stage], ups: Sequence[Stage], mid: Stage) -> dict[str, Any]:
    """Transformer layers; the up path's own list only where it is not the down path's reversed."""
    down = [stage.depth for stage in downs]
    for s, (stage, above) in enumerate(zip(downs, ups, strict=True)):
        if not stage.attentions and isinstance(above.depth, int):
            down[s] = above.depth
    if not downs[-1].attentions and mid.attentions:
        down[-1] = mid.depth
    up = [
        stage.depth if stage.attentions else (below if isinstance(below, int) else 1)
        for stage, below in zip(ups, down, strict=True)
    ]
    if down == up and all(isinstance(value, int) for value in down):
        return {"transformer_layers_per_block": _one_or_all(down)}
    return {"transformer_layers_per_block": down, "reverse_transformer_layers_per_block": up[::-1]}


def _added(block: BlockSpec | None, shape: InputShape) -> dict[str, Any]:
    """The keys of the pooled text and the sizes, where there are any."""
    if block is None or not shape.size_ids:
        return {}
    width = int(get(block, "size_embedding_width", 0))
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": width,
        "projection_class_embeddings_input_dim": shape.pooled_width + shape.size_ids * width,
    }
