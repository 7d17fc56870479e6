"""The UNet classes of diffusers: every key, and published shapes against the classes themselves."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from format_cases import DREAMLITE, UNET

from nas import formats
from nas.build import build
from nas.errors import NasError, UsageError
from nas.formats import dreamlite_unet, unet2d_condition
from nas.network import NetworkSpec


def read(config: dict, **options) -> NetworkSpec:
    return formats.network(config, "unet/config.json", **{"height": 16, "width": 16, **options})


def unet(**changes) -> NetworkSpec:
    return read({"_class_name": "UNet2DConditionModel", **UNET, **changes}, height=None, width=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_size": None}, "sample_size is null, so the height and width"),
        ({"sample_size": [16]}, r"sample_size = \[16\]"),
        ({"time_cond_proj_dim": 0}, "time_cond_proj_dim = 0 is not supported; it must be a whole number above 0"),
        ({"num_class_embeds": 10}, "num_class_embeds = 10"),
        ({"freq_shift": 1}, "freq_shift = 1 is not supported; it must be 0"),
        ({"num_attention_heads": 8}, "num_attention_heads = 8"),
        ({"attention_head_dim": 7}, r"attention_head_dim = 7 .* divisor of the width 32"),
        ({"attention_head_dim": [4, 4, 4]}, r"attention_head_dim = .* a list of 2, one per stage"),
        ({"only_cross_attention": [True, False]}, "only_cross_attention"),
        ({"down_block_types": ["CrossAttnDownBlock2D"]}, "down_block_types .* a list of 2"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types has 'AttnDownBlock2D'"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type = .* or null"),
        ({"transformer_layers_per_block": 0}, "transformer_layers_per_block = 0"),
        ({"transformer_layers_per_block": [[1, 2], 1]}, "reverse_transformer_layers_per_block = None .* list inside"),
        (
            {"transformer_layers_per_block": [[1, 2, 3], 1], "reverse_transformer_layers_per_block": [1, 1]},
            "transformer_layers_per_block .* 2 entries for the units of stage 0",
        ),
        (
            {"transformer_layers_per_block": [[1, 2], 1], "reverse_transformer_layers_per_block": [1, [1, 2]]},
            "reverse_transformer_layers_per_block .* 3 entries",
        ),
        ({"cross_attention_dim": [24, 32]}, "cross_attention_dim .* the same for every stage"),
        ({"time_embedding_dim": 100}, "time_embedding_dim = 100 .* null or 128"),
        ({"addition_embed_type": "text"}, "addition_embed_type = 'text'"),
        ({"addition_embed_type": "text_time"}, "projection_class_embeddings_input_dim = None"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 48,
            },
            "projection_class_embeddings_input_dim = 48 .* above 6 sizes of 8",
        ),
        ({"norm_num_groups": None}, "norm_num_groups = None"),
        ({"use_linear_projection": 1}, "use_linear_projection = 1 .* true or false"),
        ({"center_input_sample": 0}, "center_input_sample = 0 .* must be false"),
        ({"down_block_types": [["DownBlock2D"], "DownBlock2D"]}, r"down_block_types has \['DownBlock2D'\]"),
        ({"norm_eps": float("nan")}, "norm_eps = nan is not supported; it must be a number above 0"),
    ],
)
def test_what_our_blocks_do_not_have_is_refused_by_name(changes, message):
    with pytest.raises(UsageError, match=rf"unet/config\.json: {message}"):
        unet(**changes)


def test_the_size_of_the_latent():
    assert unet().input.height == unet().input.width == 16
    assert (unet(sample_size=[8, 24]).input.height, unet(sample_size=[8, 24]).input.width) == (8, 24)
    config = {"_class_name": "UNet2DConditionModel", **UNET}
    given = read(config, height=32, width=8, text_tokens=5)
    assert (given.input.height, given.input.width, given.input.text_tokens) == (32, 8, 5)
    assert unet2d_condition.config(given)["sample_size"] == (32, 8)


@pytest.mark.parametrize(
    ("whole", "each", "size_ids", "pooled"),
    [(2816, 256, 6, 1280), (2560, 256, 5, 1280), (80, 8, 6, 32)],
)
def test_the_pooled_text_and_the_sizes_of_the_sdxl_family(whole, each, size_ids, pooled):
    keys = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": each,
        "projection_class_embeddings_input_dim": whole,
    }
    spec = unet(**keys)
    assert (spec.input.size_ids, spec.input.pooled_width) == (size_ids, pooled)
    assert {name: unet2d_condition.config(spec)[name] for name in keys} == keys
    two = unet2d_condition.network({**UNET, **keys}, size_ids=2, where="here")
    assert (two.input.size_ids, two.input.pooled_width) == (2, whole - 2 * each)


def test_numbers_of_heads_where_some_stages_have_none():
    # One number for all is how Stable Diffusion 1 says it; later ones keep the width of a head.
    both = ["CrossAttnDownBlock2D"] * 2
    assert unet2d_condition.config(unet(down_block_types=both))["attention_head_dim"] == 4
    wide = unet(attention_head_dim=[2, 4], mid_block_type=None)
    assert unet2d_condition.config(wide)["attention_head_dim"] == (2, 4)


def test_what_a_class_cannot_hold_is_named():
    spec = unet()
    with pytest.raises(NasError, match=r"DreamLiteUNetModel: it lacks the block 'mid_block\.attentions\.0'"):
        dreamlite_unet.config(unet(mid_block_type="UNetMidBlock2D"))
    assert formats.plain_class(spec) == "UNet2DConditionModel"
    separable = read({"_class_name": "DreamLiteUNetModel", **DREAMLITE})
    assert formats.plain_class(separable) == "DreamLiteUNetModel"
    with pytest.raises(NasError, match=r"UNet2DConditionModel: .*block 'down_blocks.0.resnets.0' has kind 'separable'"):
        unet2d_condition.config(separable)
    with pytest.raises(NasError, match="it is not a UNet"):
        unet2d_condition.config(NetworkSpec(name="stem", input=spec.input, blocks=spec.blocks[:2]))


def dreamlite(**changes) -> NetworkSpec:
    return read({"_class_name": "DreamLiteUNetModel", **DREAMLITE, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, r"num_kv_heads = 3 .* \[4, 8\] heads"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"num_mid_layers": 2}, "num_mid_layers = 2"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type"),
        ({"ff_mult": 2.5}, "ff_mult = 2.5"),
        (
            {"up_block_types": ["DreamLiteCrossAttnUpBlock2D", "DreamLiteCrossAttnUpBlock2D"]},
            "up_block_types .* self-attention",
        ),
    ],
)
def test_what_dreamlite_is_refused_for(changes, message):
    with pytest.raises(UsageError, match=rf"unet/config\.json: {message}"):
        dreamlite(**changes)


@pytest.mark.parametrize(("count", "expected"), [(None, {4, 8}), (1, {1}), (2, None), (4, None)])
def test_shared_key_heads(count, expected):
    heads = [4, 4] if expected is None else [4, 8]
    spec = dreamlite(num_kv_heads=count, attention_head_dim=heads)
    found = {block.setting("kv_heads") for block in spec.blocks if block.kind == "transformer"}
    assert found == (expected or {count})
    assert read({"_class_name": "DreamLiteUNetModel", **dreamlite_unet.config(spec)}) == spec


def test_dreamlite_reads_the_names_of_older_configurations():
    older = dreamlite(
        down_block_types=["CrossAttnDownRemoveSelfAttnBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        mid_block_type="UNetMidBlock2DCrossAttn",
    )
    assert older == dreamlite()


# -------------------------------------------------------------------------- published shapes beyond the spaces'

_SD = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
_TINY = {
    "sample_size": 64,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    "mid_block_type": None,
    "layers_per_block": 1,
}
PUBLISHED = {
    # stabilityai/stable-diffusion-2-1-base (mirror jack-op11/stable-diffusion-2-1-base, unet/config.json).
    "sd-2.1-base": {
        **_SD,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "dual_cross_attention": False,
        "num_class_embeds": None,
    },
    # runwayml/stable-diffusion-inpainting (mirror jack-op11/stable-diffusion-inpainting): 4 latent channels, 4 of the
    # masked image, 1 of the mask.
    "sd-inpainting": {
        **_SD,
        "sample_size": 32,
        "in_channels": 9,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    # stabilityai/stable-diffusion-2-inpainting (mirror Teiboku/std2-inpaint).
    "sd-2-inpainting": {
        **_SD,
        "sample_size": 32,
        "in_channels": 9,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    # stabilityai/stable-diffusion-xl-refiner-1.0 (snapshot 5d4cfe85 in Shanav12/CartoonModel, unet/config.json; depths
    # also in ComfyUI's model_detection.py at 006dd0ae, SDXL_refiner).
    "sdxl-refiner": {
        "sample_size": 128,
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
        "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": 4,
        "use_linear_projection": True,
    },
    # IDKiro/sdxs-512-dreamshaper (snapshot 76f72026 in lsb/6-bit-palettized-sdxs-512-dreamshaper; ComfyUI's SD_XS).
    "sdxs-512-dreamshaper": {
        **_TINY,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    # segmind/tiny-sd (copied in anokimchen/tiny-sd-openvino at db48576c).
    "tiny-sd": {**_TINY, "cross_attention_dim": 768, "attention_head_dim": 8, "norm_eps": 1e-5},
    # nota-ai/bk-sdm-v2-tiny (Nota-NetsPresso/BK-SDM at fe4cb338, src/unet_config_v2/bk_tiny).
    "bk-sdm-v2-tiny": {
        **_TINY,
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    # No published network: block removal in the inner stages only, written as a list.
    "sd-with-a-list-of-layers": {
        **_SD,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "layers_per_block": [2, 1, 1, 1],
        "mid_block_type": None,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_tensors_of_the_class(name):
    config = json.loads(json.dumps({"_class_name": "UNet2DConditionModel", **PUBLISHED[name]}))
    spec = formats.network(config, name)
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(config)
        again = diffusers.UNet2DConditionModel(**unet2d_condition.config(spec))
    wanted = {key: t.shape for key, t in theirs.state_dict().items()}
    ours = {unet2d_condition.their_name(key): t.shape for key, t in build(spec, "meta").state_dict().items()}
    assert ours == wanted == {key: t.shape for key, t in again.state_dict().items()}
    assert sum(shape.numel() for shape in ours.values()) == sum(p.numel() for p in theirs.parameters())


def test_sdxs_of_version_0_9_is_refused_by_the_key_that_sets_it_apart():
    # IDKiro/sdxs-512-0.9: its first stage attends to the text in place of itself (ComfyUI's SD09_XS).
    config = {**_TINY, "cross_attention_dim": 1024, "only_cross_attention": [True, False, False]}
    with pytest.raises(UsageError, match="only_cross_attention"):
        unet2d_condition.network(config, name="sdxs", where="here")
