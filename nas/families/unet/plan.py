"""What every position of one UNet shares: its settings and their defaults, its stages, its widths and sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from nas.errors import NasError, UsageError
from nas.families import Values
from nas.network import InputShape, Scalar, Scale

Chosen = Mapping[str, Scalar]

# Settings by name, with their defaults; None where there is none. `downscale` is the space's own.
_ONCE: dict[str, Scalar | None] = {
    "stages": None,
    "downscale": None,
    "head_width": None,
    "norm_groups": None,
    "norm_eps": 1e-5,
    "out_channels": None,
    "size_embedding_width": None,
    "head_layout": None,
    "attention": "mha",
    "qk_norm": "none",
    "positions": "none",
    "ffn_ratio": 4,
    "projection": "linear",
    "mid": "full",
    "mid_depth": None,
}
_PER_STAGE: dict[str, Scalar | None] = {
    "width": None,
    "resnets": None,
    "up_resnets": None,
    "conv": "full",
    "attention": None,
    "up_attention": None,
    "depth": None,
    "up_depth": None,
    "self_attention": True,
    "heads": None,
}
_PER_UNIT = ("depth", "up_depth")
_WORDS: dict[str, tuple[str, ...]] = {
    "attention": ("mha", "gqa", "mqa"),
    "conv": ("full", "separable-1", "separable-2"),
    "head_layout": ("8-heads", "64-wide"),
    "mid": ("full", "residual", "none"),
    "positions": ("none", "rope"),
    "projection": ("linear", "conv"),
    "qk_norm": ("none", "rms_norm"),
}
# The whole numbers, with the least that each may be.
_LEAST = {"width": 1, "resnets": 1, "up_resnets": 1, "heads": 1, "depth": 0, "up_depth": 0, "mid_depth": 0}
_FLAGS = ("attention", "up_attention", "self_attention")  # of a stage
_FIXED_ONLY = ("norm_groups", "norm_eps", "out_channels", "size_embedding_width")
_HEADS_8, _WIDE_64 = 8, 64


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings of one UNet or of a space of them; see `nas.families.unet` for their names.

    Raises:
        UsageError: a setting is unknown, missing or out of range.
        NasError: the latent cannot be halved down to the lowest stage.
    """

    values: Values
    shape: InputShape
    scale: Scale | None

    def __post_init__(self) -> None:
        per_stage, per_unit = (f"{stem}_#" for stem in _PER_STAGE), (f"{stem}_#_#" for stem in _PER_UNIT)
        self.values.check_names("unet", (*_ONCE, *per_stage, *per_unit))
        times = self.most_stages - 1
        if self.shape.height % (1 << times) or self.shape.width % (1 << times):
            raise NasError(
                f"a {self.shape.height}x{self.shape.width} latent cannot be halved {times} times,"
                f" as {self.most_stages} stages need"
            )
        self.values.depends(*(f"{stem}_{s}" for s in range(self.most_stages) for stem in ("width", "resnets")))
        for name in (*self.values.choices, *self.values.fixed):
            if _stem(name) in _LEAST:
                self.values.check_whole(name, _LEAST[_stem(name)])
            for value in self.values.all(name):
                if wanted := _wanted(name, value):
                    raise UsageError(f"{self.values.where}: {name} must be {wanted}, got {value!r}")
        for name in _FIXED_ONLY:
            if name in self.values.choices:
                raise UsageError(f"{self.values.where}: {name} must be in [fixed], because all networks share it")

    # Settings

    def depends(self, *names: str) -> tuple[str, ...]:
        """Which of `names` are choices; those that are not set at all have a default."""
        return self.values.depends(*(name for name in names if name in self.values))

    def get(self, chosen: Chosen, name: str) -> Scalar:
        """The value of a setting that is chosen, fixed, or has a default."""
        if name in chosen:
            return chosen[name]
        if name in self.values.fixed:
            return self.values.fixed[name]
        default = _ONCE[name] if name in _ONCE else _PER_STAGE[_stem(name)]
        if default is None:
            raise UsageError(f"{self.values.where}: the family needs {name!r} in [choices] or [fixed]")
        return default

    @cached_property
    def norm_groups(self) -> int:
        """Groups of every GroupNorm."""
        return self.values.count("norm_groups") if self.scale is None else self.scale.norm_groups

    @cached_property
    def norm_eps(self) -> dict[str, Scalar]:
        """The setting `norm_eps` of the blocks; nothing at the default, so that keys do not change."""
        eps = self.get({}, "norm_eps")
        return {} if eps == _ONCE["norm_eps"] else {"norm_eps": eps}

    @cached_property
    def head_width(self) -> int | None:
        """The one head width of every transformer, where heads are not laid out otherwise."""
        if self.scale is not None:
            return self.scale.head_width
        other = "head_layout" in self.values or any(f"heads_{s}" in self.values for s in range(self.most_stages))
        return None if other else self.values.count("head_width")

    # Stages

    @cached_property
    def stage_counts(self) -> tuple[int, ...]:
        """How many stages a network may have, ascending."""
        if "stages" not in self.values.choices:
            return (self.values.count("stages"),)
        counts = self.values.all("stages")
        if any(type(count) is not int or count < 1 for count in counts):
            raise UsageError(f"{self.values.where}: stages must be whole numbers above 0, got {list(counts)}")
        return tuple(sorted(int(count) for count in counts))

    @property
    def most_stages(self) -> int:
        """The largest number of stages."""
        return self.stage_counts[-1]

    def stages(self, chosen: Chosen) -> int:
        """How many stages the network has."""
        return self.stage_counts[0] if len(self.stage_counts) == 1 else int(chosen["stages"])

    def has(self, chosen: Chosen, stage: int) -> bool:
        """Whether the network has a stage; one that every network has needs no look at choices."""
        return stage < self.stage_counts[0] or (stage < self.most_stages and stage < self.stages(chosen))

    def names_of_path(self, side: str, stage: int) -> tuple[str, ...]:
        """What decides whether `stage` exists and, on the up side, the number that its path has."""
        decides = side == "up" or stage >= self.stage_counts[0]
        return ("stages",) if decides and len(self.stage_counts) > 1 else ()

    def path(self, chosen: Chosen, side: str, stage: int) -> str:
        """The module path of a stage."""
        if side == "mid":
            return "mid_block"
        return f"down_blocks.{stage}" if side == "down" else f"up_blocks.{self.stages(chosen) - 1 - stage}"

    # Shapes

    def width(self, chosen: Chosen, stage: int) -> int:
        """Channels of a stage at this scale."""
        value, divisor = self.get(chosen, f"width_{stage}"), 1 if self.scale is None else self.scale.width_divisor
        width, rest = divmod(int(value), divisor)
        if rest or width < 1 or width % self.norm_groups or width % (self.head_width or 1):
            head = f"the head width {self.head_width} and of " if self.head_width else ""
            raise NasError(
                f"width {value} divided by {divisor} must be a multiple of {head}{self.norm_groups} norm groups"
            )
        return width

    def size(self, stage: int) -> tuple[int, int]:
        """Height and width of a stage's feature maps."""
        return self.shape.height >> stage, self.shape.width >> stage

    def names_of_heads(self, stage: int) -> tuple[str, ...]:
        """What decides the number of heads of a stage beside its width."""
        return ("heads_" + str(stage),) if f"heads_{stage}" in self.values else ("head_layout",)

    def heads(self, chosen: Chosen, stage: int) -> int:
        """Query heads of a stage's transformers.

        Raises:
            NasError: they do not divide its width.
        """
        width, name = self.width(chosen, stage), f"heads_{stage}"
        if self.head_width is not None:
            return width // self.head_width
        if name in self.values or ("head_layout" in self.values and self.get(chosen, "head_layout") == "8-heads"):
            heads = int(self.get(chosen, name)) if name in self.values else _HEADS_8
            if heads < 1 or width % heads:
                raise NasError(
                    f"{self.values.where}: width {width} of stage {stage} does not divide into {heads} heads"
                )
            return heads
        wide = _WIDE_64 if "head_layout" in self.values else self.values.count("head_width")
        if width % wide:
            raise NasError(
                f"{self.values.where}: width {width} of stage {stage} does not divide into heads of width {wide}"
            )
        return width // wide

    # Units

    def units(self, chosen: Chosen, side: str, stage: int) -> int:
        """How many units a stage has."""
        name = f"up_resnets_{stage}"
        if side == "up" and name in self.values:
            return int(self.get(chosen, name))
        return int(self.get(chosen, f"resnets_{stage}")) + (side == "up")

    def units_range(self, side: str, stage: int) -> tuple[int, int]:
        """The fewest and most units that a stage may have."""
        name, more = (f"up_resnets_{stage}", 0) if self._own_units(side, stage) else (f"resnets_{stage}", side == "up")
        counts = [int(value) + more for value in self.values.all(name)]
        return min(counts), max(counts)

    def most_units(self, side: str, stage: int) -> int:
        """The most units that a stage may have."""
        return self.units_range(side, stage)[1]

    def names_of_units(self, side: str, stage: int) -> tuple[str, ...]:
        """What decides how many units a stage has."""
        return (f"up_resnets_{stage}",) if self._own_units(side, stage) else (f"resnets_{stage}",)

    def _own_units(self, side: str, stage: int) -> bool:
        return side == "up" and f"up_resnets_{stage}" in self.values

    # Transformers

    def depth_name(self, side: str, stage: int, number: int) -> str:
        """The setting that holds a unit's transformer layers.

        Raises:
            UsageError: there is none.
        """
        names = [f"depth_{stage}_{number}", f"depth_{stage}"]
        if side == "up":
            names = [f"up_depth_{stage}_{number}", f"up_depth_{stage}", f"depth_{stage}"]
        if side == "mid":
            names = ["mid_depth", f"depth_{stage}"]
        for name in names:
            if name in self.values:
                return name
        raise UsageError(
            f"{self.values.where}: the family needs one of {', '.join(map(repr, names))} in [choices] or [fixed]"
        )

    def flag_name(self, side: str, stage: int) -> str | None:
        """The setting that says whether a stage's units attend, or None where their depths say it."""
        names = [f"up_attention_{stage}"] if side == "up" else []
        return next((name for name in (*names, f"attention_{stage}") if name in self.values), None)

    def names_of_attending(self, side: str, stage: int, number: int) -> tuple[str, ...]:
        """What decides whether a unit attends."""
        flag = self.flag_name(side, stage)
        if flag is not None:
            return (flag,)
        depth = self.depth_name(side, stage, number)
        # Where no depth is 0, or all are, the depth decides nothing.
        return (depth,) if len({value == 0 for value in self.values.all(depth)}) == 2 else ()

    def attends(self, chosen: Chosen, side: str, stage: int, number: int) -> bool:
        """Whether a unit attends."""
        flag = self.flag_name(side, stage)
        if flag is not None:
            return bool(self.get(chosen, flag))
        depth = self.depth_name(side, stage, number)
        return int(chosen[depth] if depth in chosen else self.values.all(depth)[0]) > 0


def _wanted(name: str, value: Scalar) -> str:
    """What a setting must be, where it is something else; empty where the value is allowed."""
    stem = _stem(name)
    if stem in _FLAGS and stem != name:
        return "" if isinstance(value, bool) else "true or false"
    if stem in ("ffn_ratio", "norm_eps"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return "" if number and 0 < float(value) < math.inf else "a number above 0"
    words = _WORDS.get(stem, (value,))
    return "" if value in words else f"{', '.join(words[:-1])} or {words[-1]}"


def _stem(name: str) -> str:
    """A setting's name without its stage and unit."""
    return re.sub(r"(_\d+)+$", "", name)
