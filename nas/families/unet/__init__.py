"""The UNet family: Stable Diffusion, SDXL and SnapGen shapes from one wiring.

A down path of stages, a middle, and the mirrored up path. A stage holds units; a unit is a residual block and, where
it attends, a transformer with cross-attention. Module paths are those of diffusers' UNet2DConditionModel, except that
its two output layers are one block `head`.

The up path concatenates what the down path leaves: in a stage, unit j of n takes the j-th of the stage's outputs, last
first, and the last unit takes what the stage was given (the downsampler before it, or the stem). Units beyond the
outputs that there are take none; outputs that no unit takes are dropped. n = `resnets_s` + 1 is diffusers' form.

Settings, each a choice or in [fixed]; s is a stage, u a unit in execution order, both from 0:

* `stages`: how many; `width_s`: channels; `resnets_s`: units of the down path; `up_resnets_s`: of the up path
  (`resnets_s` + 1); `conv_s`: "full", "separable-1" or "separable-2" ("full").
* `attention_s`, `up_attention_s`: whether the units attend; by default the up path as the down path, and that where
  its depth is not 0. Where it is set, depths must be 1 or more.
* Transformer layers: `depth_s_u`, else `depth_s`; in the up path `up_depth_s_u`, else `up_depth_s`, else `depth_s`.
* `self_attention_s`: whether the transformers attend to the pixels too (true; always true in the middle).
* `mid`: "full" (residual block, transformer, residual block), "residual" (one residual block) or "none" ("full");
  `mid_depth`: its transformer layers (`depth_s` of the lowest stage).
* `attention`: "mha", "gqa" or "mqa" ("mha"); `qk_norm`: "none" or "rms_norm" ("none"); `positions`: "none" or "rope"
  ("none"); `ffn_ratio` (4); `projection`: "linear" or "conv" ("linear").
* Heads: `heads_s`, their number; else `head_layout`: "8-heads" (Stable Diffusion 1.x) or "64-wide" (all later ones);
  else `head_width`.

And in [fixed] only: `norm_groups`; `norm_eps` (1e-5); `out_channels` (those of the latent); `size_embedding_width`,
which SDXL's added conditions need: a space or configuration with pooled text gets the block `add_embedding`.

A small copy (`nas.network.Scale`) has the head width of its scale whatever the head layout, predicts as many channels
as its latent has, and has no added conditions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from nas.families import Values
from nas.families.unet.blocks import Unit, add_embedding, downsample, head, kv_heads, stem, time_embedding, upsample
from nas.families.unet.plan import Plan
from nas.network import InputShape, NetworkSpec, Position, Scale

__all__ = ["kv_heads", "positions", "stage_count"]


def positions(values: Values, shape: InputShape, scale: Scale | None = None) -> Iterator[Position]:
    """The positions of a UNet: stem, embeddings, down stages, middle, up stages, head.

    Raises:
        UsageError: a setting is unknown, missing or out of range.
        NasError: a width does not divide, or the latent cannot be halved down to the lowest stage.
    """
    return _positions(Plan(values=values, shape=shape, scale=scale))


def stage_count(spec: NetworkSpec) -> int:
    """How many stages a UNet has, whatever edits it went through; 0 for a network without a way down."""
    paths = [block.name.split(".") for block in spec.blocks]
    if not any(path[0] == "down_blocks" for path in paths):
        return 0
    # The way up counts too: every step of the lowest stage may have been taken out on the way down.
    return 1 + max(int(path[1]) for path in paths if path[0] in ("down_blocks", "up_blocks"))


def _positions(plan: Plan) -> Iterator[Position]:
    first = plan.depends("width_0")
    yield Position(name="stem", depends=first, blocks=partial(stem, plan))
    yield Position(name="time_embedding", depends=first, blocks=partial(time_embedding, plan))
    if plan.shape.pooled_width or plan.shape.size_ids:
        yield Position(name="add_embedding", depends=first, blocks=partial(add_embedding, plan))
    for stage in range(plan.most_stages):
        yield from _units(plan, "down", stage)
        if stage < plan.most_stages - 1:
            yield _between(plan, stage, "down")
    for stage in plan.stage_counts:
        yield from _middle(plan, stage - 1)
    for stage in reversed(range(plan.most_stages)):
        yield from _units(plan, "up", stage)
        if stage > 0:
            yield _between(plan, stage, "up")
    yield Position(name="head", depends=first, blocks=partial(head, plan))


def _between(plan: Plan, stage: int, side: str) -> Position:
    """The sampler behind a stage: down to the stage below, or up to the stage above."""
    below = stage + (side == "down")  # exists where this stage does
    return Position(
        name=f"{side}.{stage}.{side}sample",
        depends=plan.depends(*plan.names_of_path(side, below), f"width_{stage}"),
        blocks=partial(downsample if side == "down" else upsample, plan, stage),
    )


def _units(plan: Plan, side: str, stage: int) -> Iterator[Position]:
    """One residual block and, where it may attend, one transformer position per unit that the stage may have."""
    for number in range(plan.most_units(side, stage)):
        yield from _unit(Unit(plan=plan, side=side, stage=stage, number=number), f"{side}.{stage}", f".{number}")


def _middle(plan: Plan, stage: int) -> Iterator[Position]:
    """Below `stage` where it is the lowest: residual block, transformer with self-attention, residual block."""
    path = "mid" if len(plan.stage_counts) == 1 else f"mid.{stage}"
    for number in range(2):
        yield from _unit(Unit(plan=plan, side="mid", stage=stage, number=number), path, f".{number}")


def _unit(unit: Unit, path: str, number: str) -> Iterator[Position]:
    depends = unit.plan.depends
    yield Position(name=f"{path}.resnet{number}", depends=depends(*unit.resnet_names()), blocks=unit.resnet)
    if unit.may_attend():
        name = f"{path}.attention{number}"
        yield Position(name=name, depends=depends(*unit.attention_names()), blocks=unit.attention)
