"""The diffusion transformer family: PixArt, MM-DiT and three-stage transformers from one wiring.

Patches of the latent become tokens, a row of transformer blocks works on them, a head turns them back. Module paths are
those of diffusers' PixArtTransformer2DModel. With three stages the middle works on a quarter of the tokens: 2x2 are
merged before it and split after it, and the up stage's block j takes the output of the down stage's block of the same
distance from the middle as skip. That follows SnapGen++ (arXiv 2601.08303), whose exact blocks are not public: three
stages are our reconstruction.

A network of this family has a setting, as a choice or in [fixed], for each of

* `width` (of the tokens), `patch_size`, `ffn_ratio` (inner width of the feed-forward layers over `width`);
* `heads`, or else `head_width`;
* `kv_sharing`: "mha" (all heads have keys and values of their own), "gqa" (half as many), "mqa" (one for all);
* `attention`, of the image tokens to themselves: "full", "kv-compressed", "window", "sparse", "linear" (see
  `nas.blocks._attention`); `window` is the most tokens along a side of a window (default 16), the side being
  the largest divisor of the grid's that is not above;
* `text`: "cross" (cross-attention, modulated by adaLN-single as PixArt) or "joint" (image and text attend to each other
  with weights of their own, modulated by adaLN-Zero as Stable Diffusion 3; the last block leaves the text);
* `stages`: 1 (default), with `depth`, or 3, with `down_depth`, `middle_depth`, `up_depth`;

and may have `ffn_kind` ("gelu", default, or "geglu"), `caption_projection` (default true: two linear layers bring the
text to `width`), `middle_attention` (default "full") and `middle_ffn_ratio` (default `ffn_ratio`) of three stages,
`out_channels` (default: the latent's), `sample_size` (side of the latent that positions are counted on, default: the
latent's height) and `interpolation_scale` (what positions are divided by; default sample_size // 64, at least 1).
With 3 size_ids the network is also conditioned on height, width and aspect ratio of the wanted image.

Small copies (`Scale`) have heads of the scale's head width, whatever `heads` says, predict as many channels as they are
given, count positions on their own latent, and have patches of one pixel where a side of the latent is below 16, so
that three stages and windows still have tokens to work on.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from nas.families import Values
from nas.families.dit.blocks import DOWN, MIDDLE, ONLY, UP, Builder, Place
from nas.network import InputShape, Position, Scale


def positions(values: Values, shape: InputShape, scale: Scale | None = None) -> Iterator[Position]:
    """The positions of a diffusion transformer: patches, time, text, blocks, head.

    Raises:
        UsageError: a setting is missing or out of range.
        NasError: a width does not divide, or the latent does not divide into patches and merged tokens.
    """
    builder = Builder(values=values, shape=shape, scale=scale)
    builder.check()
    return _positions(builder)


def _positions(builder: Builder) -> Iterator[Position]:
    depends = builder.depends
    yield Position(name="pos_embed", depends=depends("width", "patch_size"), blocks=builder.patches)
    yield Position(name="adaln_single", depends=depends("width", "text"), blocks=builder.time)
    yield Position(
        name="caption_projection", depends=depends("width", "caption_projection"), blocks=builder.text_projection
    )
    stages = builder.all("stages")
    if 1 in stages:
        yield from _row(builder, ONLY)
    if 3 in stages:
        sizes = depends("stages", "width", "patch_size")
        yield from _row(builder, DOWN)
        yield Position(name="merge", depends=sizes, blocks=builder.merge)
        yield from _row(builder, MIDDLE)
        yield Position(name="split", depends=sizes, blocks=builder.split)
        yield from _row(builder, UP)
    yield Position(name="head", depends=depends("width", "patch_size", "text"), blocks=builder.head)


def _row(builder: Builder, place: Place) -> Iterator[Position]:
    """One position per block that the row may have, in the up stage with its skip before it."""
    depths = [int(depth) for depth in builder.all(place.depth)]
    depends = builder.depends
    heads = ("heads", "head_width", "kv_sharing")
    shape = ("stages", "width", "patch_size", *heads, "ffn_kind", "window", "text", "caption_projection")
    for index in range(max(depths)):
        if place is UP:
            yield Position(
                name=f"up_skips.{index}",
                depends=depends("stages", "width", "patch_size", "down_depth", "up_depth"),
                blocks=partial(builder.skip, index=index),
            )
        # A block that every depth has, and that is never the last, does not ask how deep the row is.
        may_end = place.ends and index + 1 in depths and "joint" in builder.all("text")
        counted = (place.depth,) if index >= min(depths) or may_end else ()
        yield Position(
            name=f"{place.path}.{index}",
            depends=depends(*shape, *builder.attention_settings(place), *counted),
            blocks=partial(builder.layer, place=place, index=index, sure=not counted),
        )
