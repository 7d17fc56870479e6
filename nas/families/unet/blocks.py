"""The blocks of a UNet's positions, made from the choices that each position depends on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nas.errors import UsageError
from nas.families.unet.plan import Chosen, Plan
from nas.network import BlockSpec, Scalar, block

Blocks = tuple[BlockSpec, ...]


def stem(plan: Plan, chosen: Chosen) -> Blocks:
    """The convolution from the latent."""
    shape = plan.shape
    inputs = {"x": (shape.channels, shape.height, shape.width)}
    return (block("conv_in", "stem", inputs, in_channels=shape.channels, out_channels=plan.width(chosen, 0)),)


def time_embedding(plan: Plan, chosen: Chosen) -> Blocks:
    """The embedding of the timestep; four times as wide as the first stage."""
    width, guidance = plan.width(chosen, 0), plan.shape.guidance_width
    inputs: dict[str, tuple[int, ...]] = {"timestep": ()}
    more: dict[str, Any] = {}
    if guidance:
        inputs["guidance"], more["guidance_width"] = (guidance,), guidance
    kind = "time_embedding"
    return (block(kind, kind, inputs, writes=("temb",), frequency_width=width, time_width=4 * width, **more),)


def add_embedding(plan: Plan, chosen: Chosen) -> Blocks:
    """SDXL's added conditions on the time embedding."""
    shape, time_width = plan.shape, 4 * plan.width(chosen, 0)
    return (
        block(
            "add_embedding",
            "text_time",
            {"temb": (time_width,), "pooled": (shape.pooled_width,), "size_ids": (shape.size_ids,)},
            writes=("temb",),
            pooled_width=shape.pooled_width,
            size_ids=shape.size_ids,
            size_embedding_width=plan.values.count("size_embedding_width"),
            time_width=time_width,
        ),
    )


def downsample(plan: Plan, stage: int, chosen: Chosen) -> Blocks:
    """From `stage` to the stage below it, if there is one."""
    if not plan.has(chosen, stage + 1):
        return ()
    width = plan.width(chosen, stage)
    name = f"{plan.path(chosen, 'down', stage)}.downsamplers.0"
    return (block(name, "downsample", {"x": (width, *plan.size(stage))}, channels=width),)


def upsample(plan: Plan, stage: int, chosen: Chosen) -> Blocks:
    """From `stage`, if there is one, to the stage above it."""
    if not plan.has(chosen, stage):
        return ()
    width = plan.width(chosen, stage)
    name = f"{plan.path(chosen, 'up', stage)}.upsamplers.0"
    return (block(name, "upsample", {"x": (width, *plan.size(stage))}, channels=width),)


def head(plan: Plan, chosen: Chosen) -> Blocks:
    """Norm and convolution to the prediction."""
    shape, width, channels = plan.shape, plan.width(chosen, 0), plan.shape.channels
    if plan.scale is None and "out_channels" in plan.values:
        channels = plan.values.count("out_channels")
    settings: dict[str, Scalar] = {
        "in_channels": width,
        "out_channels": channels,
        "norm_groups": plan.norm_groups,
        **plan.norm_eps,
    }
    return (_block("head", "head", {"x": (width, shape.height, shape.width)}, settings),)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A residual block and the transformer behind it, at one place of one stage ("down", "mid" or "up")."""

    plan: Plan
    side: str
    stage: int
    number: int

    @cached_property
    def _range(self) -> tuple[int, int]:
        """The fewest and most units that the stage may have."""
        return self.plan.units_range(self.side, self.stage)

    def names(self) -> tuple[str, ...]:
        """What decides whether this unit exists, and its path."""
        plan = self.plan
        if self.side == "mid":
            return ("stages", "mid")
        units = plan.names_of_units(self.side, self.stage) if self.number >= self._range[0] else ()
        return (*plan.names_of_path(self.side, self.stage), *units)

    def exists(self, chosen: Chosen) -> bool:
        """Whether the network has this unit."""
        plan = self.plan
        if self.side == "mid":
            mid = plan.get(chosen, "mid")
            return plan.stages(chosen) - 1 == self.stage and (mid == "full" or (mid, self.number) == ("residual", 0))
        # A unit that every network has needs no look at choices, on which the position may not depend.
        some = self.number < self._range[0] or self.number < plan.units(chosen, self.side, self.stage)
        return some and plan.has(chosen, self.stage)

    # The residual block

    def resnet_names(self) -> tuple[str, ...]:
        """What decides the residual block."""
        plan, stage = self.plan, self.stage
        names = [*self.names(), "width_0", f"width_{stage}", f"conv_{stage}"]
        if self.side == "down" and self.number == 0 and stage > 0:
            names.append(f"width_{stage - 1}")
        if self.side == "up":
            if self.number == 0 and stage + 1 < plan.most_stages:
                names += [*plan.names_of_path("down", stage + 1), f"width_{stage + 1}"]
            names += self._skip_names()
        return tuple(names)

    def _skip_names(self) -> tuple[str, ...]:
        """What decides which block an up unit skips from, and its width."""
        plan, stage = self.plan, self.stage
        fewest, most = self._range
        names: list[str] = []
        if fewest <= self.number + 1 <= most:  # may be the last, which takes the stage's input
            names += plan.names_of_units("up", stage)
            names += [f"width_{stage - 1}"] if stage else []
        if self.number + 1 < most:
            names.append(f"resnets_{stage}")
            for resnets in plan.values.all(f"resnets_{stage}"):
                if self.number < int(resnets):
                    names += plan.names_of_attending("down", stage, int(resnets) - 1 - self.number)
        return tuple(names)

    def resnet(self, chosen: Chosen) -> Blocks:
        """The residual block, if this unit exists."""
        if not self.exists(chosen):
            return ()
        plan = self.plan
        size, time_width, width = plan.size(self.stage), 4 * plan.width(chosen, 0), plan.width(chosen, self.stage)
        x_channels = self._x_channels(chosen, width)
        skip, skip_channels = self._skip(chosen, width) if self.side == "up" else (None, 0)
        inputs: dict[str, tuple[int, ...]] = {"x": (x_channels, *size), "temb": (time_width,)}
        if skip is not None:
            inputs["skip"] = (skip_channels, *size)
        settings: dict[str, Scalar] = {
            "in_channels": x_channels + skip_channels,
            "out_channels": width,
            "time_width": time_width,
            "norm_groups": plan.norm_groups,
            **plan.norm_eps,
        }
        kind, _, expansion = str(plan.get(chosen, f"conv_{self.stage}")).partition("-")
        if kind == "separable":
            settings["expansion"] = int(expansion)
        name = f"{plan.path(chosen, self.side, self.stage)}.resnets.{self.number}"
        return (_block(name, "separable" if kind == "separable" else "resnet", inputs, settings, skip),)

    def _x_channels(self, chosen: Chosen, width: int) -> int:
        plan, stage = self.plan, self.stage
        if self.number == 0 and self.side == "down" and stage > 0:
            return plan.width(chosen, stage - 1)
        # Into the lowest stage of the up path comes the middle, which has that stage's width.
        if self.number == 0 and self.side == "up" and plan.has(chosen, stage + 1):
            return plan.width(chosen, stage + 1)
        return width

    def _skip(self, chosen: Chosen, width: int) -> tuple[str | None, int]:
        """The block that an up unit skips from, and its channels."""
        plan, stage = self.plan, self.stage
        fewest, most = self._range
        last = self.number + 1 == most or (
            self.number + 1 >= fewest and self.number + 1 == plan.units(chosen, "up", stage)
        )
        if last:
            if stage == 0:
                return "conv_in", width
            return f"down_blocks.{stage - 1}.downsamplers.0", plan.width(chosen, stage - 1)
        output = plan.units(chosen, "down", stage) - 1 - self.number
        if output < 0:
            return None, 0
        part = "attentions" if plan.attends(chosen, "down", stage, output) else "resnets"
        return f"down_blocks.{stage}.{part}.{output}", width

    # The transformer

    def may_attend(self) -> bool:
        """Whether a transformer may stand here at all."""
        plan = self.plan
        if self.side == "mid":
            return self.number == 0 and "full" in (plan.values.all("mid") if "mid" in plan.values else ("full",))
        flag = plan.flag_name(self.side, self.stage)
        return any(plan.values.all(flag or plan.depth_name(self.side, self.stage, self.number)))

    def attention_names(self) -> tuple[str, ...]:
        """What decides the transformer."""
        plan, stage = self.plan, self.stage
        attending = plan.names_of_attending(self.side, stage, self.number) if self.side != "mid" else ()
        return (
            *self.names(),
            *attending,
            f"width_{stage}",
            plan.depth_name(self.side, stage, self.number),
            *(() if self.side == "mid" else (f"self_attention_{stage}",)),
            *plan.names_of_heads(stage),
            "attention",
            "qk_norm",
            "positions",
            "ffn_ratio",
            "projection",
        )

    def attention(self, chosen: Chosen) -> Blocks:
        """The transformer, if this unit exists and attends."""
        depth = self._depth(chosen) if self.exists(chosen) else 0
        if depth == 0:
            return ()
        plan, shape = self.plan, self.plan.shape
        channels, heads = plan.width(chosen, self.stage), plan.heads(chosen, self.stage)
        # The middle always attends to itself, as in diffusers' UNetMidBlock2DCrossAttn.
        own = self.side == "mid" or bool(plan.get(chosen, f"self_attention_{self.stage}"))
        settings: dict[str, Scalar] = {
            "channels": channels,
            "depth": depth,
            "head_width": channels // heads,
            "kv_heads": kv_heads(heads, str(plan.get(chosen, "attention"))),
            "text_width": shape.text_width,
            "self_attention": own,
            "cross_attention": True,
            "qk_norm": str(plan.get(chosen, "qk_norm")),
            "ffn_ratio": plan.get(chosen, "ffn_ratio"),
            "norm_groups": plan.norm_groups,
        }
        # What stands at the block's default is left out, so that a block's key outlives new options.
        if own and plan.get(chosen, "positions") == "rope":
            settings["rope"] = True
        if plan.get(chosen, "projection") != "linear":
            settings["projection"] = plan.get(chosen, "projection")
        inputs = {"x": (channels, *plan.size(self.stage)), "text": (shape.text_tokens, shape.text_width)}
        name = f"{plan.path(chosen, self.side, self.stage)}.attentions.{self.number}"
        return (_block(name, "transformer", inputs, settings),)

    def _depth(self, chosen: Chosen) -> int:
        """Transformer layers of this unit, which exists.

        Raises:
            UsageError: the unit is said to attend, with none.
        """
        plan = self.plan
        if self.side == "mid":
            full = plan.get(chosen, "mid") == "full"
            return int(plan.get(chosen, plan.depth_name("mid", self.stage, 0))) if full else 0
        if not plan.attends(chosen, self.side, self.stage, self.number):
            return 0
        name = plan.depth_name(self.side, self.stage, self.number)
        depth = int(plan.get(chosen, name))
        if depth < 1:
            flag = plan.flag_name(self.side, self.stage)
            raise UsageError(f"{plan.values.where}: {name} must be 1 or more where {flag} is true, got {depth}")
        return depth


def _block(
    name: str, kind: str, inputs: dict[str, tuple[int, ...]], settings: dict[str, Scalar], skip: str | None = None
) -> BlockSpec:
    """A block from x to x."""
    return block(name, kind, inputs, skip=skip, writes=("x",), **settings)


def kv_heads(heads: int, attention: str) -> int:
    """Key/value heads: all for "mha", one for "mqa", the largest divisor of `heads` not above half for "gqa".

    Raises:
        UsageError: another word.
    """
    if attention == "mha":
        return heads
    if attention == "mqa":
        return 1
    if attention == "gqa":
        return max(d for d in range(1, max(heads // 2, 1) + 1) if heads % d == 0)
    raise UsageError(f"attention must be mha, gqa or mqa, got {attention!r}")
