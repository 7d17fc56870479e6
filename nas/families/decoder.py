"""The image decoder family: from a latent to pixels, as a VAE's decoder, as TAESD's, or as a separable one.

A decoder has `stages` stages, each but the last followed by a doubling of height and width. Stages count in the order
in which they run: stage 0 works on the latent's own grid. Settings, as choices or in [fixed]:

* `style`: "vae" (diffusers' AutoencoderKL), "taesd" (diffusers' AutoencoderTiny) or "separable" (after SnapGen's tiny
  decoder: each stage puts out the width of the next, so that the stages with many pixels are thin);
* `width_s` and `resnets_s` (residual blocks) of each stage s;
* `mid`: "attention" (two residual blocks with attention between), "residual" (two residual blocks) or "none", of the
  styles "vae" and "separable";
* `expansion`: what a separable block's middle is widened by;
* fixed: `stages`, `norm_groups`, and optionally `out_channels` (3) and `post_quant_conv` (false).

Module paths are those below `decoder.` in the diffusers classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from nas.errors import NasError, UsageError
from nas.families import Values
from nas.network import BlockSpec, InputShape, Position, Scalar, Scale, block

STYLES = ("vae", "taesd", "separable")
MIDS = ("attention", "residual", "none")
_NAMES = (
    "style",
    "mid",
    "expansion",
    "stages",
    "norm_groups",
    "out_channels",
    "post_quant_conv",
    "width_#",
    "resnets_#",
)
NO_PROXY = "a decoder has no small copy, so there is no proxy for its quality"
NORM_EPS = 1e-6  # of diffusers' image decoders
_Chosen = Mapping[str, Scalar]


def positions(values: Values, shape: InputShape, scale: Scale | None = None) -> Iterator[Position]:
    """The positions of a decoder: input convolution, middle, stages, output.

    Raises:
        UsageError: a setting is missing or out of range.
        NasError: a small copy is asked for.
    """
    if scale is not None:
        raise NasError(NO_PROXY)
    builder = _Builder(values=values, shape=shape)
    builder.check()
    for name, allowed in (("style", STYLES), ("mid", MIDS)):
        for value in values.all(name) if name == "style" or builder.may_be("vae", "separable") else ():
            if value not in allowed:
                raise UsageError(f"{values.where}: {name} must be one of {', '.join(allowed)}, got {value!r}")
    return builder.positions()


@dataclass(frozen=True, kw_only=True)
class _Builder:
    """Makes the blocks of each position from the choices that it depends on."""

    values: Values
    shape: InputShape

    @property
    def stages(self) -> int:
        return self.values.count("stages")

    @property
    def groups(self) -> int:
        return self.values.count("norm_groups")

    @property
    def out_channels(self) -> int:
        return self.values.count("out_channels") if "out_channels" in self.values else 3

    def may_be(self, *styles: str) -> bool:
        """Whether some network of the space has one of these styles."""
        return any(style in self.values.all("style") for style in styles)

    def check(self) -> None:
        """Refuses settings that no decoder can have.

        Raises:
            UsageError: a name that is not read here, or a value of another type or out of range.
        """
        values = self.values
        values.check_names("decoder", _NAMES)
        sizes = [f"{name}_{s}" for s in range(self.stages) for name in ("width", "resnets")]
        for name in (*sizes, *self._expansion()):
            values.check_whole(name)
        if "post_quant_conv" in values.choices or not isinstance(values.fixed.get("post_quant_conv", False), bool):
            raise UsageError(f"{values.where}: post_quant_conv must be true or false, in [fixed]")

    def positions(self) -> Iterator[Position]:
        """All positions in execution order."""
        last = self.stages - 1
        middle = ("mid", *self._expansion()) if self.may_be("vae", "separable") else ()
        if self.values.fixed.get("post_quant_conv", False):
            yield self._position("post_quant", (), self.post_quant)
        yield self._position("stem", ("style", "width_0"), self.stem)
        yield self._position("mid", ("style", "width_0", *middle), self.mid)
        for s in range(self.stages):
            around = {f"width_{max(s - 1, 0)}": None, f"width_{s}": None, f"width_{min(s + 1, last)}": None}
            names = ("style", *around, *self._counts(s), *self._expansion())
            yield self._position(f"up.{s}", names, partial(self.stage, s=s))
        yield self._position("head", ("style", f"width_{last}", *self._counts(last)), self.head)

    def _expansion(self) -> tuple[str, ...]:
        return ("expansion",) if self.may_be("separable") else ()

    def _counts(self, stage: int) -> tuple[str, ...]:
        """The numbers of blocks that a stage must know: its own, and for TAESD's running numbers all before it."""
        return tuple(f"resnets_{s}" for s in range(0 if self.may_be("taesd") else stage, stage + 1))

    def _position(
        self, name: str, settings: tuple[str, ...], blocks: Callable[[_Chosen], Iterator[BlockSpec]]
    ) -> Position:
        return Position(
            name=name,
            depends=self.values.depends(*settings),
            blocks=lambda chosen: tuple(blocks({**self.values.fixed, **chosen})),
        )

    def _at(self, stage: int) -> tuple[int, int]:
        """Height and width of a stage's input."""
        return self.shape.height << stage, self.shape.width << stage

    # What each place holds, by style

    def post_quant(self, chosen: _Chosen) -> Iterator[BlockSpec]:
        """The 1x1 convolution that a VAE may have in front of its decoder."""
        latent = self.shape.channels
        inputs = {"x": (latent, *self._at(0))}
        yield block("post_quant_conv", "conv", inputs, in_channels=latent, out_channels=latent, kernel=1)

    def stem(self, chosen: _Chosen) -> Iterator[BlockSpec]:
        """From the latent's channels to the first width."""
        inputs = {"x": (self.shape.channels, *self._at(0))}
        widths: dict[str, Any] = {"in_channels": self.shape.channels, "out_channels": int(chosen["width_0"])}
        if chosen["style"] == "taesd":
            yield block("layers.0", "conv", inputs, **widths, before="clamp", after="relu")
        else:
            yield block("conv_in", "stem", inputs, **widths)

    def mid(self, chosen: _Chosen) -> Iterator[BlockSpec]:
        """Two residual blocks at the first width, with attention between them or without."""
        if chosen["style"] == "taesd" or chosen["mid"] == "none":
            return
        width = int(chosen["width_0"])
        yield self._resnet("mid_block.resnets.0", chosen, width, width, 0)
        if chosen["mid"] == "attention":
            inputs = {"x": (width, *self._at(0))}
            yield block("mid_block.attentions.0", "pixel_attention", inputs, channels=width, norm_groups=self.groups)
        yield self._resnet("mid_block.resnets.1", chosen, width, width, 0)

    def stage(self, chosen: _Chosen, *, s: int) -> Iterator[BlockSpec]:
        """A stage's residual blocks, and the doubling after it."""
        if chosen["style"] == "taesd":
            yield from self._tiny_stage(chosen, s)
            return
        last = s == self.stages - 1
        if chosen["style"] == "vae":
            width, out = int(chosen[f"width_{max(s - 1, 0)}"]), int(chosen[f"width_{s}"])
        else:
            width, out = int(chosen[f"width_{s}"]), int(chosen[f"width_{s if last else s + 1}"])
        for j in range(int(chosen[f"resnets_{s}"])):
            yield self._resnet(f"up_blocks.{s}.resnets.{j}", chosen, out if j else width, out, s)
        if not last:
            kind = "upsample" if chosen["style"] == "vae" else "separable_upsample"
            yield block(f"up_blocks.{s}.upsamplers.0", kind, {"x": (out, *self._at(s))}, channels=out)

    def _tiny_stage(self, chosen: _Chosen, s: int) -> Iterator[BlockSpec]:
        """TAESD's stage; its modules are numbered through, those without parameters too."""
        number = 2 + sum(int(chosen[f"resnets_{i}"]) + 2 for i in range(s))
        count, width = int(chosen[f"resnets_{s}"]), int(chosen[f"width_{s}"])
        inputs = {"x": (width, *self._at(s))}
        for j in range(count):
            yield block(f"layers.{number + j}", "tiny_resnet", inputs, in_channels=width, out_channels=width)
        if s < self.stages - 1:
            yield block(
                f"layers.{number + count + 1}",
                "conv",
                inputs,
                in_channels=width,
                out_channels=int(chosen[f"width_{s + 1}"]),
                bias=False,
                before="upsample",
            )

    def head(self, chosen: _Chosen) -> Iterator[BlockSpec]:
        """From the last width to the image's channels."""
        last = self.stages - 1
        width = int(chosen[f"width_{last}"])
        inputs = {"x": (width, *self._at(last))}
        widths: dict[str, Any] = {"in_channels": width, "out_channels": self.out_channels}
        if chosen["style"] == "taesd":
            number = 2 + sum(int(chosen[f"resnets_{i}"]) + 2 for i in range(last)) + int(chosen[f"resnets_{last}"])
            yield block(f"layers.{number}", "conv", inputs, **widths, after="image")
        else:
            yield block("head", "head", inputs, **widths, norm_groups=self.groups, norm_eps=NORM_EPS)

    def _resnet(self, name: str, chosen: _Chosen, width: int, out: int, s: int) -> BlockSpec:
        inputs = {"x": (width, *self._at(s))}
        if chosen["style"] == "vae":
            return block(
                name,
                "resnet",
                inputs,
                in_channels=width,
                out_channels=out,
                time_width=0,
                norm_groups=self.groups,
                norm_eps=NORM_EPS,
            )
        wider: dict[str, Any] = {} if int(chosen["expansion"]) == 1 else {"expansion": int(chosen["expansion"])}
        return block(
            name,
            "separable_decoder",
            inputs,
            in_channels=width,
            out_channels=out,
            norm_groups=self.groups,
            **wider,
        )
