"""One small spec at least of every block kind, with the shapes of its outputs without batch, for tests/test_blocks.py.

A kind without one fails a test there.
"""

from __future__ import annotations

from nas.network import BlockSpec, Scalar, Shape, block

TRANSFORMER = {
    "channels": 16,
    "depth": 2,
    "head_width": 4,
    "kv_heads": 1,
    "text_width": 12,
    "self_attention": True,
    "cross_attention": True,
    "qk_norm": "rms_norm",
    "ffn_ratio": 3,
    "norm_groups": 4,
}
MAP, TEXT, TOKENS = (16, 4, 6), (5, 12), (24, 16)


def _residual(name: str, kind: str, **extra: Scalar) -> BlockSpec:
    settings: dict[str, Scalar] = {"in_channels": 24, "out_channels": 16, "time_width": 10, "norm_groups": 4, **extra}
    return block(name, kind, {"x": MAP, "skip": (8, 4, 6), "temb": (10,)}, skip="down", **settings)


SPECS: dict[str, tuple[BlockSpec, tuple[Shape, ...]]] = {
    spec.name: (spec, shape if isinstance(shape[0], tuple) else (shape,))
    for spec, shape in [
        (block("stem", "stem", {"x": (4, 4, 6)}, in_channels=4, out_channels=16), MAP),
        (
            block("time_embedding", "time_embedding", {"timestep": ()}, frequency_width=8, time_width=10),
            (10,),
        ),
        (
            block(
                "time_embedding-guidance",
                "time_embedding",
                {"timestep": (), "guidance": (6,)},
                frequency_width=8,
                time_width=10,
                guidance_width=6,
            ),
            (10,),
        ),
        (_residual("resnet", "resnet"), MAP),
        (_residual("separable-1", "separable", expansion=1), MAP),
        (_residual("separable-2", "separable", expansion=2), MAP),
        (block("transformer", "transformer", {"x": MAP, "text": TEXT}, **TRANSFORMER), MAP),
        (
            block(
                "transformer-gqa",
                "transformer",
                {"x": MAP, "text": TEXT},
                **{**TRANSFORMER, "kv_heads": 2, "qk_norm": "none", "self_attention": False},
            ),
            MAP,
        ),
        (
            block(
                "transformer-blind",
                "transformer",
                {"x": MAP},
                **{**TRANSFORMER, "kv_heads": 4, "cross_attention": False, "text_width": 0},
            ),
            MAP,
        ),
        (block("transformer-conv", "transformer", {"x": MAP, "text": TEXT}, **TRANSFORMER, projection="conv"), MAP),
        (block("transformer-rope", "transformer", {"x": MAP, "text": TEXT}, **TRANSFORMER, rope=True), MAP),
        (
            block(
                "text_time",
                "text_time",
                {"temb": (10,), "pooled": (7,), "size_ids": (3,)},
                pooled_width=7,
                size_ids=3,
                size_embedding_width=4,
                time_width=10,
            ),
            (10,),
        ),
        (block("downsample", "downsample", {"x": MAP}, channels=16), (16, 2, 3)),
        (block("downsample-wider", "downsample", {"x": MAP}, channels=16, out_channels=20), (20, 2, 3)),
        (block("upsample", "upsample", {"x": MAP}, channels=16), (16, 8, 12)),
        (block("head", "head", {"x": MAP}, in_channels=16, out_channels=4, norm_groups=4), (4, 4, 6)),
        # Diffusion transformers: tokens of a 4x6 grid.
        (
            block(
                "patch_embedding",
                "patch_embedding",
                {"x": (4, 8, 12)},
                in_channels=4,
                width=16,
                patch_size=2,
                base_size=4,
            ),
            TOKENS,
        ),
        (block("adaln_single", "adaln_single", {"timestep": ()}, writes=("temb",), width=16), (7 * 16,)),
        (
            block("text_projection", "text_projection", {"text": TEXT}, writes=("text",), text_width=12, width=16),
            (5, 16),
        ),
        (
            block(
                "dit_block",
                "dit_block",
                {"x": TOKENS, "temb": (7 * 16,), "text": (5, 16)},
                width=16,
                heads=4,
                kv_heads=2,
                text_width=16,
                ffn_ratio=2,
            ),
            TOKENS,
        ),
        (
            block(
                "mmdit_block",
                "mmdit_block",
                {"x": TOKENS, "temb": (16,), "text": (5, 16)},
                writes=("x", "text"),
                width=16,
                heads=4,
                kv_heads=1,
                ffn_ratio=2,
            ),
            (TOKENS, (5, 16)),
        ),
        (block("token_merge", "token_merge", {"x": TOKENS}, width=16, rows=4, columns=6), (6, 16)),
        (block("token_split", "token_split", {"x": TOKENS}, width=16, rows=4, columns=6), (96, 16)),
        (block("token_skip", "token_skip", {"x": TOKENS, "skip": TOKENS}, skip="down", width=16), TOKENS),
        (
            block(
                "dit_head",
                "dit_head",
                {"x": TOKENS, "temb": (16,)},
                width=16,
                patch_size=2,
                out_channels=4,
                rows=4,
                columns=6,
            ),
            (4, 8, 12),
        ),
        # Image decoders.
        (
            block("resnet-timeless", "resnet", {"x": MAP}, in_channels=16, out_channels=8, time_width=0, norm_groups=4),
            (8, 4, 6),
        ),
        (block("conv", "conv", {"x": MAP}, in_channels=16, out_channels=4, before="clamp", after="image"), (4, 4, 6)),
        (block("pixel_attention", "pixel_attention", {"x": MAP}, channels=16, norm_groups=4), MAP),
        (
            block("separable_decoder", "separable_decoder", {"x": MAP}, in_channels=16, out_channels=8, norm_groups=4),
            (8, 4, 6),
        ),
        (block("separable_upsample", "separable_upsample", {"x": MAP}, channels=16), (16, 8, 12)),
        (block("tiny_resnet", "tiny_resnet", {"x": MAP}, in_channels=16, out_channels=8), (8, 4, 6)),
    ]
}
