"""The blocks of one position of a diffusion transformer, made from the choices that the position depends on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nas.errors import NasError, UsageError
from nas.families import Values
from nas.network import BlockSpec, InputShape, Scalar, Scale, block

Chosen = Mapping[str, Scalar]

# Settings that a network may leave out.
_DEFAULTS: dict[str, Scalar] = {
    "stages": 1,
    "window": 16,
    "ffn_kind": "gelu",
    "caption_projection": True,
    "middle_attention": "full",
}
_ON_A_GRID = ("kv-compressed", "window", "sparse")
_IN_WINDOWS = ("window", "sparse")
_ATTENTIONS = ("full", "linear", *_ON_A_GRID)
_NAMES = (
    *_DEFAULTS,
    *("width", "patch_size", "ffn_ratio", "heads", "head_width", "kv_sharing", "attention", "text"),
    *("depth", "down_depth", "middle_depth", "up_depth", "middle_ffn_ratio"),
    *("out_channels", "sample_size", "interpolation_scale", "norm_groups"),  # norm_groups: for small copies
)
_FIXED_COUNTS = ("out_channels", "sample_size")
_SMALL_SIDE = 16  # small copies of latents below it have patches of one pixel
_SIZE_IDS = 3  # height, width, aspect ratio


@dataclass(frozen=True, kw_only=True)
class Place:
    """A row of blocks of one kind.

    Attributes:
        path: module path of the row.
        stages: of the networks that have it.
        depth: the setting that says how many blocks it has.
        merges: how often tokens were merged in twos before it.
        attention: the setting of its attention.
        ffn_ratio: the setting of its feed-forward layers.
    """

    path: str
    stages: int
    depth: str
    merges: int = 0
    attention: str = "attention"
    ffn_ratio: str = "ffn_ratio"

    @property
    def ends(self) -> bool:
        """Whether its last block is the network's."""
        return self.merges == 0 and self.path != "down_blocks"


ONLY = Place(path="transformer_blocks", stages=1, depth="depth")
DOWN = Place(path="down_blocks", stages=3, depth="down_depth")
MIDDLE = Place(
    path="mid_blocks",
    stages=3,
    depth="middle_depth",
    merges=1,
    attention="middle_attention",
    ffn_ratio="middle_ffn_ratio",
)
UP = Place(path="up_blocks", stages=3, depth="up_depth")


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Makes the blocks of one position from the choice values that the position depends on."""

    values: Values
    shape: InputShape
    scale: Scale | None
    # Blocks of a row that differ in name only: a space asks for each of them at every place.
    layers: dict[Hashable, BlockSpec] = field(default_factory=dict, repr=False, compare=False)

    # Settings

    def check(self) -> None:
        """Refuses settings that no network of this family can have."""
        self.values.check_names("dit", _NAMES)
        for name, known in (
            ("stages", (1, 3)),
            ("kv_sharing", ("mha", "gqa", "mqa")),
            ("attention", _ATTENTIONS),
            ("middle_attention", _ATTENTIONS),
            ("text", ("cross", "joint")),
        ):
            for value in self.all(name):
                if value not in known:
                    words = ", ".join(map(str, known))
                    raise UsageError(f"{self.values.where}: {name} must be one of {words}, got {value!r}")
        stages = self.all("stages")
        depths = [*(("depth",) if 1 in stages else ()), *(p.depth for p in (DOWN, MIDDLE, UP) if 3 in stages)]
        optional = [name for name in ("heads", *_FIXED_COUNTS) if name in self.values]
        for name in ("width", "patch_size", "window", *depths, *optional):
            if name in self.values or name not in _DEFAULTS:
                self.values.check_whole(name)
        for name in (*_FIXED_COUNTS, "interpolation_scale"):
            if name in self.values.choices:
                raise UsageError(
                    f"{self.values.where}: {name} belongs into [fixed]; the family dit takes no choice of it"
                )
        self.all("ffn_ratio")
        if self.shape.text_tokens < 1:
            raise UsageError(f"{self.values.where}: the family dit needs text_tokens and text_width in [input]")
        if self.shape.size_ids not in (0, _SIZE_IDS):
            raise UsageError(
                f"{self.values.where}: the family dit takes {_SIZE_IDS} size_ids (height, width, aspect ratio) or none,"
                f" got {self.shape.size_ids}"
            )
        if "joint" in self.all("text") and False in self.all("caption_projection"):
            raise UsageError(f"{self.values.where}: text = 'joint' needs caption_projection = true")

    def all(self, name: str) -> tuple[Scalar, ...]:
        """Every value that a setting can take, its default's where it is left out."""
        return self.values.all(name) if name in self.values or name not in _DEFAULTS else (_DEFAULTS[name],)

    def depends(self, *names: str) -> tuple[str, ...]:
        """Which of `names` are choices; those that are left out have no say."""
        return self.values.depends(*(name for name in names if name in self.values))

    def attention_settings(self, place: Place) -> tuple[str, ...]:
        """The names of what a row's attention and feed-forward layers are set by."""
        ratio = place.ffn_ratio if place.ffn_ratio in self.values else "ffn_ratio"
        return place.attention, ratio

    def get(self, chosen: Chosen, name: str) -> Scalar:
        """A setting's value.

        Raises:
            UsageError: it is not there, and has no default.
        """
        for source in (chosen, self.values.fixed, _DEFAULTS):
            if name in source:
                return source[name]
        raise UsageError(f"{self.values.where}: the family needs {name!r} in [choices] or [fixed]")

    def width(self, chosen: Chosen) -> int:
        """Width of the tokens."""
        full = int(self.get(chosen, "width"))
        if self.scale is None:
            return full
        width, rest = divmod(full, self.scale.width_divisor)
        if rest or width % self.scale.head_width:
            raise NasError(
                f"width {full} divided by {self.scale.width_divisor} must be a multiple of the head width"
                f" {self.scale.head_width}"
            )
        return width

    def heads(self, chosen: Chosen) -> int:
        """Number of query heads."""
        width = self.width(chosen)
        by_number = self.scale is None and "heads" in self.values
        divisor = int(self.scale.head_width if self.scale else self.get(chosen, "heads" if by_number else "head_width"))
        quotient, rest = divmod(width, divisor)
        if rest:
            what = f"{divisor} heads" if by_number else f"heads of width {divisor}"
            raise NasError(f"width {width} cannot be divided into {what}")
        return divisor if by_number else quotient

    def patch(self, chosen: Chosen) -> int:
        """Side of a patch."""
        small = self.scale is not None and min(self.shape.height, self.shape.width) < _SMALL_SIDE
        return 1 if small else int(self.get(chosen, "patch_size"))

    def grid(self, chosen: Chosen, merges: int = 0) -> tuple[int, int]:
        """Rows and columns of tokens."""
        step = self.patch(chosen) << merges
        for side in (self.shape.height, self.shape.width):
            if side % step:
                raise NasError(
                    f"a {self.shape.height}x{self.shape.width} latent cannot be divided into tokens of {step}x{step}"
                )
        return self.shape.height // step, self.shape.width // step

    def _tokens(self, chosen: Chosen, merges: int = 0) -> tuple[int, int]:
        rows, columns = self.grid(chosen, merges)
        return rows * columns, self.width(chosen)

    def _joint(self, chosen: Chosen) -> bool:
        return self.get(chosen, "text") == "joint"

    # Blocks

    def patches(self, chosen: Chosen) -> tuple[BlockSpec, ...]:
        """Patch embedding."""
        shape, patch = self.shape, self.patch(chosen)
        self.grid(chosen)
        known = {} if self.scale else self.values.fixed
        side = int(known.get("sample_size", shape.height))
        settings: dict[str, Any] = {
            "in_channels": shape.channels,
            "width": self.width(chosen),
            "patch_size": patch,
            "base_size": side // patch,
        }
        scale = float(known.get("interpolation_scale", max(side // 64, 1)))
        if scale != 1:
            settings["interpolation_scale"] = scale
        inputs = {"x": (shape.channels, shape.height, shape.width)}
        return (block("pos_embed", "patch_embedding", inputs, **settings),)

    def time(self, chosen: Chosen) -> tuple[BlockSpec, ...]:
        """Embedding of the timestep, and of the sizes."""
        inputs: dict[str, tuple[int, ...]] = {"timestep": ()}
        settings: dict[str, Any] = {"width": self.width(chosen)}
        if self._joint(chosen):
            settings["modulation"] = False
        if self.shape.size_ids:
            settings["size_conditions"] = True
            inputs["size_ids"] = (_SIZE_IDS,)
        return (block("adaln_single", "adaln_single", inputs, writes=("temb",), **settings),)

    def text_projection(self, chosen: Chosen) -> tuple[BlockSpec, ...]:
        """Projection of the text, if there is one."""
        if not self.get(chosen, "caption_projection"):
            return ()
        return (
            block(
                "caption_projection",
                "text_projection",
                {"text": (self.shape.text_tokens, self.shape.text_width)},
                writes=("text",),
                text_width=self.shape.text_width,
                width=self.width(chosen),
            ),
        )

    def layer(self, chosen: Chosen, *, place: Place, index: int, sure: bool) -> tuple[BlockSpec, ...]:
        """Block `index` of a row; none where the row is shorter or the network has another number of stages.

        `sure` says that every depth has it and that it is never the last.
        """
        if self.get(chosen, "stages") != place.stages:
            return ()
        depth = index + 2 if sure else int(self.get(chosen, place.depth))
        if index >= depth:
            return ()
        last = place.ends and index == depth - 1
        key = (place, last, *((name, value) for name, value in chosen.items() if name != place.depth))
        if key not in self.layers:
            self.layers[key] = self._layer(chosen, place, last=last)
        return (replace(self.layers[key], name=f"{place.path}.{index}"),)

    def _layer(self, chosen: Chosen, place: Place, *, last: bool) -> BlockSpec:
        width, heads = self.width(chosen), self.heads(chosen)
        attention, ratio = self.attention_settings(place)
        settings: dict[str, Any] = {
            "width": width,
            "heads": heads,
            "kv_heads": _kv_heads(heads, str(self.get(chosen, "kv_sharing"))),
            "ffn_ratio": self.get(chosen, ratio),
            **self._attention(chosen, str(self.get(chosen, attention)), place.merges),
        }
        if self.get(chosen, "ffn_kind") != "gelu":
            settings["ffn_kind"] = self.get(chosen, "ffn_kind")
        text_width = width if self.get(chosen, "caption_projection") else self.shape.text_width
        joint = self._joint(chosen)
        inputs = {
            "x": self._tokens(chosen, place.merges),
            "temb": (width if joint else 7 * width,),
            "text": (self.shape.text_tokens, text_width),
        }
        if not joint:
            return block(place.path, "dit_block", inputs, text_width=text_width, **settings)
        if last:
            return block(place.path, "mmdit_block", inputs, updates_text=False, **settings)
        return block(place.path, "mmdit_block", inputs, writes=("x", "text"), **settings)

    def _attention(self, chosen: Chosen, kind: str, merges: int) -> dict[str, Any]:
        """The settings of an attention, those at a block's defaults left out."""
        if kind == "full":
            return {}
        settings: dict[str, Any] = {"attention": kind}
        if kind in _ON_A_GRID:
            settings["rows"], settings["columns"] = self.grid(chosen, merges)
        if kind in _IN_WINDOWS:
            settings["window"] = self.get(chosen, "window")
        return settings

    def merge(self, chosen: Chosen) -> tuple[BlockSpec, ...]:
        """From the down stage to the middle."""
        return self._resize(chosen, "merge", merges=0)

    def split(self, chosen: Chosen) -> tuple[BlockSpec, ...]:
        """From the middle to the up stage."""
        return self._resize(chosen, "split", merges=1)

    def _resize(self, chosen: Chosen, name: str, merges: int) -> tuple[BlockSpec, ...]:
        if self.get(chosen, "stages") != MIDDLE.stages:
            return ()
        self.grid(chosen, 1)
        rows, columns = self.grid(chosen, merges)
        inputs = {"x": self._tokens(chosen, merges)}
        return (block(name, f"token_{name}", inputs, width=self.width(chosen), rows=rows, columns=columns),)

    def skip(self, chosen: Chosen, *, index: int) -> tuple[BlockSpec, ...]:
        """What joins the down stage's output to the input of the up stage's block `index`."""
        source = int(self.get(chosen, "down_depth")) - 1 - index
        if self.get(chosen, "stages") != UP.stages or index >= int(self.get(chosen, "up_depth")) or source < 0:
            return ()
        tokens = self._tokens(chosen)
        inputs = {"x": tokens, "skip": tokens}
        name, skip = f"up_skips.{index}", f"{DOWN.path}.{source}"
        return (block(name, "token_skip", inputs, skip=skip, width=self.width(chosen)),)

    def head(self, chosen: Chosen) -> tuple[BlockSpec, ...]:
        """Output layer."""
        width, (rows, columns) = self.width(chosen), self.grid(chosen)
        known = {} if self.scale else self.values.fixed
        return (
            block(
                "head",
                "dit_head",
                {"x": self._tokens(chosen), "temb": (width if self._joint(chosen) else 7 * width,)},
                width=width,
                patch_size=self.patch(chosen),
                out_channels=int(known.get("out_channels", self.shape.channels)),
                rows=rows,
                columns=columns,
            ),
        )


def _kv_heads(heads: int, sharing: str) -> int:
    """Key and value heads: all for "mha", one for "mqa", the largest divisor not above half for "gqa"."""
    if sharing == "mha":
        return heads
    if sharing == "mqa":
        return 1
    return max(d for d in range(1, max(heads // 2, 1) + 1) if heads % d == 0)
