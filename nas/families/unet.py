"""The UNet family: SD, SDXL and SnapGen shapes from one wiring.

A down path of stages, a middle, and the mirrored up path. A stage holds units; a unit is a residual block and, where
the stage's transformer depth is not 0, a transformer. The up path has one unit more per stage than the down path and
concatenates the down path's outputs, last first. Module paths are those of diffusers' UNet2DConditionModel.

A space of this family sets, as a choice or in [fixed], for each stage s: `width_s`, `resnets_s` (units of the down
path), `conv_s` ("full", "separable-1", "separable-2"), `depth_s` (transformer layers per unit; `up_depth_s` where the
up path differs), `self_attention_s`; and once: `attention` ("mha", "gqa", "mqa"), `qk_norm` ("none", "rms_norm"),
`ffn_ratio`, `head_width`, `norm_groups`, `stages`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from nas.errors import NasError, UsageError
from nas.families import Values
from nas.network import BlockSpec, InputShape, Position, Scalar, Scale, block


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What every block of one network shares: input shape, units of width, and how many stages there are."""

    input: InputShape
    stages: int
    width_divisor: int
    head_width: int
    norm_groups: int

    def __post_init__(self) -> None:
        step = 1 << (self.stages - 1)
        if self.input.height % step or self.input.width % step:
            raise NasError(
                f"a {self.input.height}x{self.input.width} latent cannot be halved {self.stages - 1} times,"
                f" as {self.stages} stages need"
            )

    def width(self, value: Scalar) -> int:
        width, rest = divmod(int(value), self.width_divisor)
        if rest or width % self.norm_groups or width % self.head_width:
            raise NasError(
                f"width {value} divided by {self.width_divisor} must be a multiple of the head width"
                f" {self.head_width} and of {self.norm_groups} norm groups"
            )
        return width

    def size(self, stage: int) -> tuple[int, int]:
        return self.input.height >> stage, self.input.width >> stage


def positions(values: Values, shape: InputShape, scale: Scale | None = None) -> Iterator[Position]:
    """The positions of a UNet: stem, time embedding, down stages, middle, up stages, head.

    Raises:
        UsageError: a setting is missing or out of range.
        NasError: a width does not divide, or the latent cannot be halved down to the lowest stage.
    """
    frame = _Frame(
        input=shape,
        stages=values.count("stages"),
        width_divisor=1 if scale is None else scale.width_divisor,
        head_width=values.count("head_width") if scale is None else scale.head_width,
        norm_groups=values.count("norm_groups") if scale is None else scale.norm_groups,
    )
    return _positions(values, frame)


def _positions(values: Values, frame: _Frame) -> Iterator[Position]:
    builder = _Builder(values=values, frame=frame)
    first = values.depends("width_0")
    yield Position(name="stem", depends=first, blocks=builder.stem)
    yield Position(name="time_embedding", depends=first, blocks=builder.time_embedding)
    for stage in range(frame.stages):
        yield from _units(values, builder, "down", stage)
        if stage < frame.stages - 1:
            yield Position(
                name=f"down.{stage}.downsample",
                depends=values.depends(f"width_{stage}"),
                blocks=replace(builder, stage=stage).downsample,
            )
    yield from _middle(values, builder, frame.stages - 1)
    for stage in reversed(range(frame.stages)):
        yield from _units(values, builder, "up", stage)
        if stage > 0:
            yield Position(
                name=f"up.{stage}.upsample",
                depends=values.depends(f"width_{stage}"),
                blocks=replace(builder, stage=stage).upsample,
            )
    yield Position(name="head", depends=first, blocks=builder.head)


def _units(values: Values, builder: _Builder, side: str, stage: int) -> Iterator[Position]:
    """One residual block and one transformer position per unit that the stage may have."""
    neighbours = {"down": [stage - 1], "up": [stage + 1, stage - 1]}[side]
    widths = [f"width_{s}" for s in (0, stage, *neighbours) if 0 <= s < builder.frame.stages]
    depth = f"depth_{stage}"
    if side == "up" and f"up_depth_{stage}" in values:
        depth = f"up_depth_{stage}"
    most = values.most(f"resnets_{stage}") + (1 if side == "up" else 0)
    for unit in range(most):
        here = replace(builder, side=side, stage=stage, unit=unit, depth=depth)
        # The up path must know whether the unit that it skips from ends in a transformer: hence depth_<stage>.
        skip = (f"depth_{stage}",) if side == "up" else ()
        yield Position(
            name=f"{side}.{stage}.resnet.{unit}",
            depends=values.depends(*widths, f"resnets_{stage}", f"conv_{stage}", *skip),
            blocks=here.resnet,
        )
        yield Position(
            name=f"{side}.{stage}.attention.{unit}",
            depends=values.depends(
                f"width_{stage}",
                f"resnets_{stage}",
                depth,
                f"self_attention_{stage}",
                "attention",
                "qk_norm",
                "ffn_ratio",
            ),
            blocks=here.attention,
        )


def _middle(values: Values, builder: _Builder, stage: int) -> Iterator[Position]:
    """Residual block, transformer with self-attention, residual block, at the lowest stage's width and depth."""
    for unit in range(2):
        here = replace(builder, side="mid", stage=stage, unit=unit, depth=f"depth_{stage}")
        yield Position(
            name=f"mid.resnet.{unit}",
            depends=values.depends("width_0", f"width_{stage}", f"conv_{stage}"),
            blocks=here.resnet,
        )
        if unit == 0:
            yield Position(
                name="mid.attention",
                depends=values.depends(f"width_{stage}", f"depth_{stage}", "attention", "qk_norm", "ffn_ratio"),
                blocks=here.attention,
            )


@dataclass(frozen=True, kw_only=True)
class _Builder:
    """Makes the blocks of one position from the choice values that the position depends on."""

    values: Values
    frame: _Frame
    side: str = ""
    stage: int = 0
    unit: int = 0
    depth: str = ""

    def _get(self, values: Mapping[str, Scalar], name: str) -> Scalar:
        return values[name] if name in values else self.values.fixed[name]

    def _width(self, values: Mapping[str, Scalar], stage: int) -> int:
        return self.frame.width(self._get(values, f"width_{stage}"))

    @property
    def _path(self) -> str:
        if self.side == "mid":
            return "mid_block"
        return f"down_blocks.{self.stage}" if self.side == "down" else f"up_blocks.{self.frame.stages - 1 - self.stage}"

    def _exists(self, values: Mapping[str, Scalar]) -> bool:
        if self.side == "mid":
            return True
        return self.unit < int(self._get(values, f"resnets_{self.stage}")) + (self.side == "up")

    def stem(self, values: Mapping[str, Scalar]) -> tuple[BlockSpec, ...]:
        shape = self.frame.input
        inputs = {"x": (shape.channels, shape.height, shape.width)}
        width = self._width(values, 0)
        return (block("conv_in", "stem", inputs, in_channels=shape.channels, out_channels=width),)

    def time_embedding(self, values: Mapping[str, Scalar]) -> tuple[BlockSpec, ...]:
        width = self._width(values, 0)
        return (
            block(
                "time_embedding",
                "time_embedding",
                {"timestep": ()},
                writes=("temb",),
                frequency_width=width,
                time_width=4 * width,
            ),
        )

    def head(self, values: Mapping[str, Scalar]) -> tuple[BlockSpec, ...]:
        shape, width = self.frame.input, self._width(values, 0)
        return (
            block(
                "head",
                "head",
                {"x": (width, shape.height, shape.width)},
                in_channels=width,
                out_channels=shape.channels,
                norm_groups=self.frame.norm_groups,
            ),
        )

    def downsample(self, values: Mapping[str, Scalar]) -> tuple[BlockSpec, ...]:
        width = self._width(values, self.stage)
        inputs = {"x": (width, *self.frame.size(self.stage))}
        return (block(f"down_blocks.{self.stage}.downsamplers.0", "downsample", inputs, channels=width),)

    def upsample(self, values: Mapping[str, Scalar]) -> tuple[BlockSpec, ...]:
        width = self._width(values, self.stage)
        index = self.frame.stages - 1 - self.stage
        inputs = {"x": (width, *self.frame.size(self.stage))}
        return (block(f"up_blocks.{index}.upsamplers.0", "upsample", inputs, channels=width),)

    def resnet(self, values: Mapping[str, Scalar]) -> tuple[BlockSpec, ...]:
        if not self._exists(values):
            return ()
        conv = str(self._get(values, f"conv_{self.stage}"))
        kind, _, expansion = conv.partition("-")
        if kind not in ("full", "separable") or (kind == "separable" and expansion not in ("1", "2")):
            raise UsageError(
                f"{self.values.where}: conv_{self.stage} must be full, separable-1 or separable-2, got {conv!r}"
            )
        size, time_width = self.frame.size(self.stage), 4 * self._width(values, 0)
        out_channels = self._width(values, self.stage)
        x_channels, skip, skip_channels = self._resnet_inputs(values, out_channels)
        inputs: dict[str, tuple[int, ...]] = {"x": (x_channels, *size)}
        if skip is not None:
            inputs["skip"] = (skip_channels, *size)
        inputs["temb"] = (time_width,)
        settings: dict[str, Scalar] = {
            "in_channels": x_channels + skip_channels,
            "out_channels": out_channels,
            "time_width": time_width,
            "norm_groups": self.frame.norm_groups,
        }
        if kind == "separable":
            settings["expansion"] = int(expansion)
        name = f"{self._path}.resnets.{self.unit}"
        return (block(name, "resnet" if kind == "full" else "separable", inputs, skip=skip, writes=("x",), **settings),)

    def _resnet_inputs(self, values: Mapping[str, Scalar], width: int) -> tuple[int, str | None, int]:
        """Channels of x, the block skipped from, and its channels."""
        if self.side == "mid" or (self.side == "down" and self.unit > 0):
            return width, None, 0
        if self.side == "down":
            return (self._width(values, self.stage - 1) if self.stage else width), None, 0
        x_channels = width
        if self.unit == 0 and self.stage < self.frame.stages - 1:
            x_channels = self._width(values, self.stage + 1)
        resnets = int(self._get(values, f"resnets_{self.stage}"))
        if self.unit < resnets:
            part = "attentions" if int(self._get(values, f"depth_{self.stage}")) else "resnets"
            return x_channels, f"down_blocks.{self.stage}.{part}.{resnets - 1 - self.unit}", width
        if self.stage == 0:
            return x_channels, "conv_in", width
        return x_channels, f"down_blocks.{self.stage - 1}.downsamplers.0", self._width(values, self.stage - 1)

    def attention(self, values: Mapping[str, Scalar]) -> tuple[BlockSpec, ...]:
        depth = int(self._get(values, self.depth))
        if depth == 0 or not self._exists(values):
            return ()
        channels, shape = self._width(values, self.stage), self.frame.input
        heads = channels // self.frame.head_width
        # The middle always attends to itself, as in diffusers' UNetMidBlock2DCrossAttn.
        own = self.side == "mid" or bool(self._get(values, f"self_attention_{self.stage}"))
        return (
            block(
                f"{self._path}.attentions.{self.unit}",
                "transformer",
                {"x": (channels, *self.frame.size(self.stage)), "text": (shape.text_tokens, shape.text_width)},
                channels=channels,
                depth=depth,
                head_width=self.frame.head_width,
                kv_heads=kv_heads(heads, str(self._get(values, "attention"))),
                text_width=shape.text_width,
                self_attention=own,
                cross_attention=True,
                qk_norm=str(self._get(values, "qk_norm")),
                ffn_ratio=self._get(values, "ffn_ratio"),
                norm_groups=self.frame.norm_groups,
            ),
        )


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
